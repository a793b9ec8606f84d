"""What several ranks compute together:  python tests/ranks.py [--ranks 2 4] [--steps 200]

For each number of ranks it starts as many processes of itself on this machine, with gloo. They tell how far the
gradients of one update are from the mean of those of the parts of the minibatch, which they must be, and from those of
all of it in a single process, which BatchNorm makes others; and whether all their weights, optimizer and random states
are the same, bit by bit, after so many balanced minibatches. test_ranks.py asks little of it; slow evidence asks more."""
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
FACES = 20  # in a minibatch of all ranks
CPU = torch.device("cpu")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environments(count: int) -> list[dict[str, str]]:
    """What torchrun tells so many ranks; nothing here needs more of it but restarts."""
    ours = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    return [ours | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def start(count: int, *command, **options) -> list[subprocess.Popen]:
    """That many ranks of a Python command."""
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    return [subprocess.Popen([sys.executable, *map(str, command)], text=True, env=os.environ | path | rank, **options)
            for rank in environments(count)]


def make_trainer(model: str, ranks: gan.Ranks) -> gan.Trainer:
    settings = gan.TrainSettings(model=model, width=8, balance=1, precision="fp32", device="cpu")
    return gan.Trainer(settings, 32, CPU, ranks)


def gradients(model: str, ranks: gan.Ranks, still: bool = False) -> list[torch.Tensor]:
    """The losses and gradients of a discriminator and of a generator update of fresh networks in float64, on this
    rank's part of FACES. `still`: the generator's BatchNorm normalises with running statistics, not with a minibatch's."""
    torch.set_default_dtype(torch.float64)
    found = []
    for turn in TURNS:
        trainer = make_trainer(model, ranks)
        trainer.generator.train(not still)
        trainer.balance.discriminator_left = int(turn == "discriminator")
        real = torch.rand(FACES, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
        trainer.train_minibatch(real[ranks.part])
        found += [trainer.rows[-1][2:4], *(weight.grad for weight in trainer.networks[turn].parameters())]
    torch.set_default_dtype(torch.float32)
    return found


def mean_of_parts(model: str, count: int) -> list[torch.Tensor]:
    """What gradients() of so many ranks must be: those of each part of the faces for itself, by this process alone,
    averaged with the numbers of faces as weights."""
    means = []
    for number in range(count):
        ranks = gan.Ranks(number, count)
        ranks.divide(FACES)
        ranks.count = 1  # nobody to average with
        means.append([ranks.share * tensor for tensor in gradients(model, ranks)])
    return [sum(parts) for parts in zip(*means, strict=True)]


def difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Norm of the difference of all these tensors, relative to their norm."""
    a, b = (torch.cat([tensor.flatten() for tensor in side]) for side in (ours, theirs))
    return ((a - b).norm() / b.norm()).item()


def digest(value) -> str:
    """SHA-256 of nested dictionaries and lists of tensors, names and numbers."""
    if isinstance(value, dict):
        return digest([[str(key), item] for key, item in value.items()])
    if isinstance(value, list | tuple):
        return hashlib.sha256("".join(map(digest, value)).encode()).hexdigest()
    plain = value.contiguous().numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()
    return hashlib.sha256(plain).hexdigest()


def different(value, ranks: gan.Ranks) -> int:
    """How many different values the ranks have."""
    digests = [""] * ranks.count
    dist.all_gather_object(digests, digest(value))
    return len(set(digests))


def balanced(model: str, steps: int, ranks: gan.Ranks) -> dict:
    """How many different states the ranks have after so many minibatches and the end of an epoch, and who trained."""
    trainer, faces = make_trainer(model, ranks), torch.Generator().manual_seed(2)
    trainer.balance = gan.Balance("accuracy", 0.6)
    for _ in range(steps):
        trainer.train_minibatch((torch.rand(FACES, 3, 32, 32, generator=faces) * 2 - 1)[ranks.part])
    rows = different(trainer.rows, ranks)
    trainer.finish_epoch()
    state = trainer.state()
    statistics = [state["networks"]["generator"].pop(name) for name in list(state["networks"]["generator"])
                  if "running" in name]
    for name in [name for name in state["networks"]["discriminator"] if "running" in name]:
        del state["networks"]["discriminator"][name]
    return {"states": different(state, ranks), "rows": rows, "statistics": different(statistics, ranks),
            "discriminator": trainer.progress.discriminator_updates, "generator": trainer.progress.generator_updates}


def measure(steps: int) -> dict:
    """What the ranks find; the first alone computes what their gradients are compared with."""
    ranks = gan.join_ranks(CPU)
    ranks.divide(FACES)
    number = torch.tensor([float(ranks.number)])
    ranks.average(number)
    found = {"mean of the numbers": number.item()}
    for model in gan.OBJECTIVES:
        ours, still = gradients(model, ranks), gradients(model, ranks, still=True)
        found |= {f"{model}, different gradients": different([ours, still], ranks),
                  f"{model}, after {steps} minibatches": balanced(model, steps, ranks)}
        if ranks.number == 0:
            found |= {f"{model}, from the mean of the parts": difference(ours, mean_of_parts(model, ranks.count)),
                      f"{model}, from one process": difference(ours, gradients(model, gan.Ranks())),
                      f"{model}, from one process, generator still": difference(still, gradients(model, gan.Ranks(), True))}
    dist.destroy_process_group()
    return found


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
            print(f"{count} ranks, {name}:", f"{value:.3g}" if isinstance(value, float) else value, flush=True)
        failed += any(value["states"] > 1 if isinstance(value, dict) else "parts" in name and value > 1e-12
                      for name, value in told[0].items())
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
