"""What several ranks compute together:  python tests/ranks.py [--ranks 2 4] [--steps 200]

For each number of ranks it starts as many processes of itself on this machine, with gloo. They tell how far the
gradients of one update are from those that a single process computes of the same minibatch, and whether all their
weights, optimizer and random states are the same, bit by bit, after so many balanced minibatches. test_ranks.py asks
little of it, and starts other programs as ranks by it; slow evidence asks more."""
import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import gan  # noqa: E402

TURNS = ["discriminator", "generator"]
CPU = torch.device("cpu")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(count: int, *command, **options) -> list[subprocess.Popen]:
    """That many ranks of a Python command, without torchrun, which nothing here needs but restarts."""
    ours = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    return [subprocess.Popen([sys.executable, *map(str, command)], text=True,
                             env=os.environ | ours | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **options)
            for rank in range(count)]


def make_pair(model: str, ranks: gan.Ranks | None = None, **changes) -> gan.Pair:
    return gan.Pair(gan.TrainSettings(model=model, width=8, precision="fp32", device="cpu", **changes), 32, CPU, ranks)


def gradients(model: str, dtype: torch.dtype, faces: int, ranks: gan.Ranks) -> list[list[torch.Tensor]]:
    """The gradients, and the losses and BatchNorm's statistics, of a discriminator and of a generator update of fresh
    networks."""
    torch.set_default_dtype(dtype)
    found = []
    for turn in TURNS:
        pair = make_pair(model, ranks, balance=1)
        pair.balance.discriminator_left = int(turn == "discriminator")
        real = torch.rand(faces, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
        losses = pair.train_on(real[ranks.part(faces)])[2:4]
        network = pair.networks()[turn]
        found += [[weight.grad for weight in network.parameters()], [losses, *network.buffers()]]
    torch.set_default_dtype(torch.float32)
    return found


def difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Norm of the difference of all these tensors, relative to their norm."""
    a, b = (torch.cat([tensor.flatten() for tensor in side if tensor.is_floating_point()]) for side in (ours, theirs))
    return ((a - b).norm() / b.norm()).item()


def digest(value) -> str:
    """SHA-256 of nested dictionaries and lists of tensors, names and numbers."""
    if isinstance(value, dict):
        return digest([[str(key), item] for key, item in value.items()])
    if isinstance(value, list | tuple):
        return hashlib.sha256("".join(map(digest, value)).encode()).hexdigest()
    plain = value.contiguous().numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()
    return hashlib.sha256(plain).hexdigest()


def balanced(model: str, steps: int, ranks: gan.Ranks) -> dict:
    """How many different states the ranks have after so many minibatches of 21 faces, and who trained."""
    pair, faces = make_pair(model, ranks), torch.Generator().manual_seed(2)
    for _ in range(steps):
        pair.train_on((torch.rand(21, 3, 32, 32, generator=faces) * 2 - 1)[ranks.part(21)])
    state, states = pair.state(), [None] * ranks.count
    state["progress"]["seconds"] = 0
    dist.all_gather_object(states, digest(state))
    return {"states": len(set(states)), "discriminator": pair.progress.discriminator_updates,
            "generator": pair.progress.generator_updates}


def measure(steps: int) -> dict:
    """What this rank finds: the differences and the states of each GAN."""
    cases = [(model, dtype) for model in gan.OBJECTIVES for dtype in (torch.float64, torch.float32)]
    alone = [gradients(*case, 20, gan.Ranks()) for case in cases]
    with gan.Ranks.joined(CPU) as ranks:
        found = {f"{model} {str(dtype)[6:]}": max(map(difference, gradients(model, dtype, 20, ranks), before))
                 for (model, dtype), before in zip(cases, alone, strict=True)}
        return found | {model: balanced(model, steps, ranks) for model in gan.OBJECTIVES}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    if "RANK" in os.environ:
        print(json.dumps(measure(options.steps)))
        return 0
    failed = 0
    for count in options.ranks:
        processes = start(count, __file__, "--steps", options.steps, stdout=subprocess.PIPE)
        told = [json.loads(process.communicate()[0]) for process in processes]
        for name, value in told[0].items():
            print(f"{count} ranks, {name}:", value if isinstance(value, dict) else
                  f"gradients differ by {max(one[name] for one in told):.1e} from those of one process", flush=True)
        failed += any(value["states"] > 1 for value in told[0].values() if isinstance(value, dict))
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
