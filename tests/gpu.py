"""All there is to learn from a GPU, in one call:  python tests/gpu.py --out DIR [--data DIR] [--seconds 480] [--device cuda]

It needs torch, numpy, pillow and matplotlib, reads prepared faces (makes cartoon faces where no --data is given), and
spends its seconds part by part: what machine it is; whether CUDA computes what the CPU does; how fast it trains; what four
minutes of it give. Each part is a process of its own with a time limit, so one that fails or hangs costs no other. DIR gets
gpu.json, to which each result is appended as a line of JSON as it comes (with the traceback where a part fails), and the log,
curves, last grid and averaged generator (float16) of the training.  `python tests/gpu.py --report DIR` writes its figures
into the table of RESULTS.md.  On a machine without a GPU, `--device cpu --seconds 20 --width 8` rehearses the call."""
import argparse
import contextlib
import importlib.util
import io
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
if importlib.util.find_spec("tqdm") is None:  # a progress bar is all that it is for
    class NoBar:
        format_interval = staticmethod(lambda seconds: f"{seconds:.0f} s")
        write = staticmethod(lambda text, file=sys.stdout: print(text, file=file))
        __init__ = update = __exit__ = lambda self, *_, **__: None
        __enter__ = lambda self: self  # noqa: E731
    sys.modules["tqdm"] = types.SimpleNamespace(tqdm=NoBar)  # type: ignore[assignment]
import reference  # noqa: E402

import gan  # noqa: E402

MODELS = [*gan.OBJECTIVES]
BATCHES = (20, 64, 256)
VARIANTS = ("plain", "not recorded", "recorded")  # CUDA graphs; elsewhere than on CUDA nothing is recorded
BOOSTED = 60_000  # images seen when detail is boosted: what a minibatch costs then
LEAST_SECONDS = 30.0  # that a part is given
TURNS = ("discriminator", "generator")


class Call:
    """What the parts are given, and where their results go."""

    def __init__(self, arguments: argparse.Namespace):
        self.out, self.seconds, self.width = arguments.out, arguments.seconds, arguments.width
        self.device, self.data = torch.device(arguments.device), arguments.data
        self.started, self.size, self.part = time.monotonic(), 80, ""

    def tell(self, **facts) -> None:
        """Append one result."""
        with open(self.out / "gpu.json", "a", encoding="utf-8") as file:
            file.write(json.dumps({"part": self.part, **facts}) + "\n")

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def settings(self, **changes) -> gan.TrainSettings:
        return gan.TrainSettings(**{"width": self.width, "device": self.device.type, "data": str(self.data), **changes})

    def faces(self, count: int) -> torch.Tensor:
        """So many training faces, float on the device; the same ones again where there are too few."""
        images = gan.load_faces(self.data)[0]
        return gan.to_face(images[torch.arange(count) % len(images)]).to(self.device, memory_format=torch.channels_last)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# ---- the variants of a minibatch ----

def plain_loop(model: str, device: torch.device, size: int, width: int) -> Callable:
    """A minibatch of the plain reference."""
    plain, enough = reference.Reference(model, size, width), gan.OBJECTIVES[model].enough
    for network in (plain.g, plain.d):
        network.to(device)

    def minibatch(real):
        z = torch.randn(len(real), 128, device=device)
        plain.train_minibatch(real, z, lambda: torch.rand(len(real), device=device), enough)
    return minibatch


def images_per_second(minibatch: Callable, real: torch.Tensor, seconds: float, device: torch.device) -> float:
    """Of a minibatch repeated for so many seconds, after three that are not counted."""
    for _ in range(3):
        minibatch(real)
    wait(device)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        minibatch(real)
        count += 1
    wait(device)
    return count * len(real) / (time.perf_counter() - started)


# ---- the parts ----

def machine(call: Call) -> None:
    """What is there."""
    facts = {"python": platform.python_version(), "torch": torch.__version__, "cpu": platform.processor(),
             "cores": gan.usable_cores(), "device": call.device.type}
    if call.device.type == "cuda":
        properties = torch.cuda.get_device_properties(call.device)
        facts |= {"name": properties.name, "gigabytes": round(properties.total_memory / 1e9, 1),
                  "capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda,
                  "cudnn": torch.backends.cudnn.version()}
        with contextlib.suppress(OSError):
            asked = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,power.limit,driver_version", "--format=csv"]
            facts["clocks"] = subprocess.run(asked, capture_output=True, text=True, timeout=10).stdout.strip().splitlines()[-1:]
    call.tell(**facts)


def updates(call: Call) -> None:
    """One update of each network of each GAN, on the device and on the CPU: the gradients' relative difference in float64
    and in float32 without TF32 (where rounding takes some rectifiers to their other side), and their cosine in bf16."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    real = call.faces(20).cpu()

    def gradient(device: torch.device, model: str, dtype: torch.dtype, turn: str) -> torch.Tensor:
        precision = "bf16" if dtype == torch.bfloat16 else "fp32"
        trainer = gan.Trainer(call.settings(model=model, precision=precision, balance=1), real.shape[-1], device)
        trainer.balance.discriminator_left = int(turn == "discriminator")
        trainer.rng = gan.random_stream("the same on every device", 0)
        weights_in = torch.float64 if dtype == torch.float64 else torch.float32
        for network in trainer.networks.values():
            network.to(weights_in)
        with numbers_of_the_cpu(weights_in):
            trainer.train_minibatch(real.to(device))
        return torch.cat([weight.grad.flatten().cpu().double() for weight in trainer.networks[turn].parameters()])

    for model in MODELS:
        for turn in TURNS:
            expected = gradient(torch.device("cpu"), model, torch.float64, turn)
            for dtype, most in ((torch.float64, 1e-6), (torch.float32, 1e-2), (torch.bfloat16, 0.3)):
                found = gradient(call.device, model, dtype, turn)
                difference = ((found - expected).norm() / expected.norm()).item()
                cosine = torch.cosine_similarity(found, expected, dim=0).item()
                call.tell(model=model, turn=turn, dtype=str(dtype), difference=difference, cosine=cosine,
                          good=difference < most)


@contextlib.contextmanager
def numbers_of_the_cpu(dtype: torch.dtype):
    """Random numbers are float32 ones of the CPU, moved: generators of devices and types differ."""
    before = {name: getattr(torch, name) for name in ("rand", "randn")}
    for name, make in before.items():
        setattr(torch, name, lambda *shape, generator, device, make=make: make(*shape, generator=generator).to(device, dtype))
    try:
        yield
    finally:
        for name, make in before.items():
            setattr(torch, name, make)


def recorded(call: Call) -> None:
    """200 balanced minibatches as CUDA graphs and without: how far the discriminators are apart."""
    if call.device.type != "cuda":
        return call.tell(not_here="CUDA graphs need CUDA")
    real = call.faces(20)
    for model in MODELS:
        weights, turns = [], []
        for records in (False, False, True):  # twice without: what rounding alone does
            trainer = gan.Trainer(call.settings(model=model, precision="fp32", width=16), real.shape[-1], call.device)
            trainer.records, trainer.progress.images_seen = records, BOOSTED
            trainer.progress.averaged_at = BOOSTED
            for _ in range(200):
                trainer.train_minibatch(real)
            weights.append(torch.cat([weight.flatten() for weight in trainer.discriminator.parameters()]))
            turns.append(trainer.progress.discriminator_updates)
        apart = [((other - weights[0]).norm() / weights[0].norm()).item() for other in weights[1:]]
        call.tell(model=model, without=apart[0], recorded=apart[1], discriminator_updates=turns,
                  good=trainer.records and apart[1] < max(0.05, 3 * apart[0]))


def resumed(call: Call) -> None:
    """A run begun on the device, gone on with on the CPU and back."""
    run, codes = call.out / "resumed", []
    for epochs, device in ((1, call.device.type), (2, "cpu"), (3, call.device.type)):
        codes.append(gan.train(call.settings(run=str(run), width=4, epochs=epochs, device=device)))
    call.tell(codes=codes, epochs=len(gan.read_log(run)), good=codes == [0, 0, 0] and len(gan.read_log(run)) == 3)
    shutil.rmtree(run)


def memory(call: Call) -> None:
    """Out of memory is one line and exit code 1; on a GPU for want of real memory."""
    if call.device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(0.005)
    else:
        gan.Trainer.train_minibatch = lambda trainer, real: torch.empty(2 ** 60)
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        code = gan.main(["train", "--data", str(call.data), "--run", str(call.out / "memory"), "--device", call.device.type,
                         "--width", "128" if call.device.type == "cuda" else "4"])
    call.tell(code=code, line=errors.getvalue(), good=code == 1 and errors.getvalue().count("\n") == 1)
    shutil.rmtree(call.out / "memory", ignore_errors=True)


def suite(call: Call) -> None:
    """The tests of the suite that need CUDA."""
    if call.device.type != "cuda" or importlib.util.find_spec("pytest") is None:
        return call.tell(not_here="CUDA or pytest is not there")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-o", "addopts=", "tests/test_train.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    call.tell(code=done.returncode, end=done.stdout[-800:], good=done.returncode == 0)


def speed(call: Call, model: str) -> None:
    """Images a second of one GAN, by minibatch and way of computing."""
    seconds = min(2.0, call.seconds / 240)
    for faces in BATCHES if call.device.type == "cuda" else BATCHES[:1]:
        real = call.faces(faces)
        for variant in VARIANTS:
            if variant == "plain":
                minibatch = plain_loop(model, call.device, real.shape[-1], call.width)
            else:
                trainer = gan.Trainer(call.settings(model=model), real.shape[-1], call.device)
                trainer.records = trainer.records and variant == "recorded"
                trainer.progress.images_seen = trainer.progress.averaged_at = BOOSTED
                minibatch = trainer.train_minibatch
            found = images_per_second(minibatch, real, seconds, call.device)
            good = variant != "recorded" or call.device.type != "cuda" or trainer.recorded is not None and trainer.records
            call.tell(model=model, faces=faces, variant=variant, images_per_second=round(found, 1), good=good)


def profile(call: Call) -> None:
    """Where a minibatch's time goes: the ten largest kernels, and the share of it in which the device waits."""
    real, trainer = call.faces(20), None
    trainer = gan.Trainer(call.settings(), real.shape[-1], call.device)
    for _ in range(5):
        trainer.train_minibatch(real)
    wait(call.device)
    with torch.profiler.profile() as watched:
        started = time.perf_counter()
        for _ in range(20 if call.device.type == "cuda" else 3):
            trainer.train_minibatch(real)
        wait(call.device)
        wall = time.perf_counter() - started
    cuda = call.device.type == "cuda"
    spent = {event.key: (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
             for event in watched.key_averages()}
    largest = sorted(spent, key=lambda key: -spent[key])[:10]
    call.tell(kernels={key[:80]: round(spent[key] / wall, 4) for key in largest},
              idle=round(1 - sum(spent.values()) / wall, 3) if cuda else None)


def training(call: Call) -> None:
    """WGAN-GP on the faces for half of all seconds, and what the judge says of it."""
    run, seconds = call.out / "run", max(1.0, min(call.seconds / 2, call.left() - min(40.0, call.seconds / 4)))
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
    code = gan.train(call.settings(run=str(run), save_every=25, sample_every=25))
    log = gan.read_log(run)
    call.tell(code=code, epochs=len(log), images=log[-1]["images_seen"] if log else 0, seconds=round(seconds, 1),
              epoch_seconds=sorted(line["seconds"] for line in log)[len(log) // 2] if log else None,
              scores=[{"epoch": line["epoch"], **line["scores"]} for line in log if "scores" in line][-3:])
    for name in ("log.jsonl", "curves.png"):
        if (run / name).exists():
            shutil.copy(run / name, call.out)
    for grid in sorted((run / "samples").glob("epoch-*.png"))[-1:]:
        shutil.copy(grid, call.out / "grid.png")
    state = gan.read_checkpoint(gan.find_checkpoint(run, None))
    half = {name: value.half() if value.is_floating_point() else value for name, value in
            state["networks"]["averaged"].items()}
    torch.save({"epoch": state["progress"]["epoch"], "width": state["settings"]["width"], "averaged": half},
               call.out / "averaged-float16.pt")
    shutil.rmtree(run)


def larger(call: Call) -> None:
    """Images a second at 128 pixels."""
    trainer = gan.Trainer(call.settings(), 128, call.device)
    real = torch.randn(20, 3, 128, 128, device=call.device).clamp(-1, 1).contiguous(memory_format=torch.channels_last)
    found = images_per_second(trainer.train_minibatch, real, min(15.0, call.seconds / 20), call.device)
    call.tell(pixels=128, images_per_second=round(found, 1))


def server(call: Call) -> None:
    """`eval` has no --device."""
    call.tell(not_here="the page's server computes on the CPU: one small face is faster there than a trip to a GPU")


PARTS: dict[str, tuple[Callable, float]] = {  # and the share of all seconds that it may take
    "machine": (machine, 0.1), "updates": (updates, 0.15), "recorded": (recorded, 0.15), "resumed": (resumed, 0.15),
    "memory": (memory, 0.1), "suite": (suite, 0.15), "training": (training, 0.6),
    **{f"speed {model}": (partial(speed, model=model), 0.12) for model in reversed(MODELS)},
    "larger": (larger, 0.1), "profile": (profile, 0.1), "server": (server, 0.1)}


def run_part(call: Call, name: str) -> None:
    """A part, in the process of its own."""
    call.part = name
    with open(call.out / "output.txt", "a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        try:
            PARTS[name][0](call)
        except BaseException:
            call.tell(failed=traceback.format_exc()[-4000:])
    os._exit(0)  # no thread of torch is waited for


def run_all(call: Call) -> None:
    """Every part in turn, killed when its time is over."""
    fork = multiprocessing.get_context("fork")  # torch is imported once; CUDA is touched by the parts alone
    for name, (_, share) in PARTS.items():
        process = fork.Process(target=run_part, args=(call, name))
        began = time.monotonic()
        process.start()
        process.join(max(LEAST_SECONDS, min(share * call.seconds, call.left())))
        if process.is_alive():
            process.kill()
            process.join()
            call.part = name
            call.tell(failed=f"killed after {time.monotonic() - began:.0f} s")
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)


def results(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "gpu.json").read_text("utf-8").splitlines()]


def table(found: list[dict]) -> str:
    """The rows of the table in RESULTS.md."""
    def cell(model: str, faces: int, variant: str) -> str:
        rows = [row for row in found if (row.get("model"), row.get("faces"), row.get("variant")) == (model, faces, variant)]
        return next((f"{row['images_per_second']:,.0f}" for row in rows if "images_per_second" in row),
                    "failed" if rows else "not run")
    lines = [f"| images/s, minibatch | {' | '.join(VARIANTS)} |", f"|---|{'---|' * len(VARIANTS)}"]
    lines += [f"| {model}, {faces} | {' | '.join(cell(model, faces, variant) for variant in VARIANTS)} |"
              for model in MODELS for faces in BATCHES]
    return "\n".join(lines)


def report(found: list[dict]) -> None:
    """Write the table, and a line of what else was found, into RESULTS.md."""
    page = ROOT / "tests" / "RESULTS.md"
    about = next((row for row in found if row["part"] == "machine"), {})
    name = f"{about.get('name', about.get('cpu', ''))}, torch {about.get('torch')}" if about else "not run"
    bad = [row for row in found if "failed" in row or row.get("good") is False]
    text = f"<!-- gpu -->\n{name}; {len(bad)} of {len(found)} checks failed.\n\n{table(found)}\n<!-- /gpu -->"
    page.write_text(re.sub(r"<!-- gpu -->.*<!-- /gpu -->", lambda _: text, page.read_text("utf-8"), flags=re.DOTALL), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--data", type=Path, help="prepared faces (default: cartoon faces, made in DIR)")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--report", type=Path, metavar="DIR", help="write the results in DIR into RESULTS.md, and run nothing")
    arguments = parser.parse_args()
    if arguments.report:
        return report(results(arguments.report))
    if not arguments.out:
        parser.error("--out DIR is needed")
    arguments.out.mkdir(parents=True, exist_ok=True)
    call = Call(arguments)
    if call.data is None:
        call.data = arguments.out / "faces"
        subprocess.run([sys.executable, ROOT / "gan.py", "prepare", "--demo", "--data", call.data, "--limit", "400"], check=True)
    run_all(call)
    for row in results(arguments.out):
        if "failed" in row or row.get("good") is False:
            print(json.dumps(row)[:2000])


if __name__ == "__main__":
    main()
