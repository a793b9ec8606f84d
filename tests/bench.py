"""Measure gan.py's training against a plain implementation:  python tests/bench.py [--json]

Of each GAN, gan.py's minibatches against tests/reference.py's, the same sequence of updates on both sides; then a real
training process for its memory and for what sampling, logging and checkpoints cost.

Both sides take turns, A B A B, so that a noisy machine is noisy for both; medians and spreads (least to most) are
printed. Slow evidence, not collected by pytest: let nothing else run beside it."""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import reference
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import gan  # noqa: E402

TURNS = ["discriminator"] + 5 * ["generator", "discriminator"]  # 55 % discriminator updates, as real runs of critics


def alternate(sides: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of each side's function in each round, after one round that does not count."""
    seconds = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, function in sides.items():
            started = time.perf_counter()
            function()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def summary(seconds: dict[str, list[float]], items: int, unit: str) -> dict:
    """Rates of both sides and their ratio, from the seconds that `items` took in each round."""
    rates = {name: sorted(items / value for value in values) for name, values in seconds.items()}
    found = {name: {f"{unit} a second": round(statistics.median(values), 1),
                    "spread": [round(values[0], 1), round(values[-1], 1)]} for name, values in rates.items()}
    ratios = sorted(plain / ours for plain, ours in zip(*seconds.values(), strict=True))
    return found | {"ratio": round(statistics.median(ratios), 2),
                    "ratio's spread": [round(ratios[0], 2), round(ratios[-1], 2)]}


class Scripted:
    """A balance that measures like any other but takes the turns of TURNS."""
    taken = 0

    @property
    def decided(self) -> bool:
        return self.taken % len(TURNS) in range(2, len(TURNS), 2)

    def choose(self, accuracy, _) -> str:
        if not self.decided:
            float(accuracy)  # waits for a GPU as others do
        self.taken += 1
        return TURNS[(self.taken - 1) % len(TURNS)]


class ScriptedReference(reference.Reference):
    """The plain loop on any device, with the accuracies of all pairs at once and the turns of TURNS."""

    def __init__(self, model: str, size: int, device: torch.device):
        super().__init__(model, size)
        self.g.to(device)
        self.d.to(device)
        self.balance = Scripted()

    def accuracies(self, real, fake):
        accuracies = (real[:, None] > fake).float().mean().item(), (fake >= real.mean()).float().mean().item()
        self.discriminator_left = 0
        return (0, 1) if self.balance.choose(*accuracies) == "discriminator" else (1, 0)


def matrix_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the fastest of forty products of 2048×2048 matrices; half of them written as convolutions, which on
    some processors another library multiplies, and faster."""
    a, b = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))
    image = a.view(1, 32, 64, 2048).permute(0, 3, 1, 2)  # channels last: the same memory
    best = 0.0
    for product in 20 * [lambda: a @ b, lambda: torch.nn.functional.conv2d(image, b[:, :, None, None])]:
        started = time.perf_counter()
        product()
        wait(device)
        best = max(best, 2 * 2048 ** 3 / (time.perf_counter() - started))
    return best


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def images_a_second(model: str, options) -> dict:
    """Of gan.py and of the plain loop, and what share of the processor's arithmetic the first uses."""
    device, size = gan.pick_device(options.device), 80
    settings = gan.TrainSettings(model=model, precision=options.precision)
    trainer, plain = gan.Trainer(settings, size, device), ScriptedReference(model, size, device)
    real = torch.rand(20, 3, size, size, device=device) * 2 - 1
    trainer.balance, ours = Scripted(), real.contiguous(memory_format=torch.channels_last)

    def fast_cycle() -> None:
        for _ in TURNS:
            trainer.train_minibatch(ours)
        wait(device)

    def plain_cycle() -> None:
        for _ in TURNS:
            plain.train_minibatch(real, torch.randn(20, 128, device=device), lambda: torch.rand(20, device=device))
        wait(device)

    dtype = torch.bfloat16 if trainer.precision == "bf16" else torch.float32
    found = {"precision": trainer.precision, "threads": torch.get_num_threads(), "torch": torch.__version__,
             "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}
    seconds = alternate({"plain": plain_cycle, "gan.py": fast_cycle}, options.rounds)
    found |= summary(seconds, 20 * len(TURNS), "images")
    flops = len(TURNS) * flops_of_a_minibatch(settings)
    speed, peak = flops / statistics.median(seconds["gan.py"]), matrix_peak(dtype, device)
    found |= {"GFLOP/s": round(speed / 1e9), "matrix peak GFLOP/s": round(peak / 1e9),
              "share of peak": round(speed / peak, 2)}
    if device.type == "cuda":
        found["peak device MiB of both"] = torch.cuda.max_memory_allocated() >> 20
    return found


def flops_of_a_minibatch(settings: gan.TrainSettings) -> float:
    """FLOPs of 20 faces of 80×80 pixels, the mean over TURNS, counted on the CPU."""
    trainer = gan.Trainer(settings, 80, torch.device("cpu"))
    trainer.balance, real = Scripted(), torch.rand(20, 3, 80, 80).contiguous(memory_format=torch.channels_last)
    with FlopCounterMode(display=False) as counter:
        for _ in TURNS:
            trainer.train_minibatch(real)
    return counter.get_total_flops() / len(TURNS)


# A training process that tells when its first minibatch began and its last file was written.
TIMED = """
import sys, time
import gan
real, began = gan.Trainer.train_minibatch, []
def first(trainer, faces):
    began or began.append(time.monotonic())
    real(trainer, faces)
gan.Trainer.train_minibatch = first
code = gan.main(sys.argv[1:])
print(time.monotonic() - began[0])
"""
PEAK = """
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


def whole_training(options) -> dict:
    """Memory of a training process beyond torch's own, and the share of its time that is not training."""
    if not options.epochs:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or Path(folder) / "data"
        if not options.data:
            gan.prepare(gan.PrepareSettings(demo=True, data=str(data)))
        run = Path(folder) / "run"
        arguments = ["train", "--data", data, "--run", run, "--model", options.model or "WGAN-GP", "--epochs", options.epochs,
                     "--precision", options.precision, "--device", options.device]
        bare, = numbers_printed("import torch" + PEAK)
        whole, peak = numbers_printed(TIMED + PEAK, *arguments)
        log = gan.read_log(run)
    training = sum(line["seconds"] for line in log)
    return {"whole training of": options.model or "WGAN-GP", "faces": log[0]["images_seen"],
            "seconds an epoch": [line["seconds"] for line in log],
            "share of time beside training": round(1 - training / whole, 4),
            "peak resident MiB": round(peak / 1024), "of which importing torch": round(bare / 1024)}


def numbers_printed(code: str, *arguments) -> list[float]:
    """The numbers that a Python process prints at its end, each in a line of its own (PEAK: KiB, on Linux)."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True,
                          check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return [float(line) for line in done.stdout.splitlines() if line.replace(".", "", 1).isdigit()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--data", type=Path, help="a dataset written by prepare (default: cartoon faces)")
    parser.add_argument("--model", choices=list(gan.OBJECTIVES), help="this one alone")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--epochs", type=int, default=10, help="of the whole training, 0 for none")
    options = parser.parse_args()
    stdout, sys.stdout = sys.stdout, sys.stderr if options.json else sys.stdout
    models = [options.model] if options.model else list(gan.OBJECTIVES)
    found = {model: images_a_second(model, options) for model in models} | whole_training(options)
    if options.json:
        print(json.dumps(found, indent=1), file=stdout)
    else:
        for name, value in found.items():
            print(f"{name}: {value}")


if __name__ == "__main__":
    main()
