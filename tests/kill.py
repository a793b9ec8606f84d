"""Kill training at random and see that nothing is lost:  python tests/kill.py [--kills 20] [--seed 0] [--ranks 1]

For each of the three GANs a run is killed with SIGKILL again and again and started again with the same command: half of
the times after a random time, half in the middle of a random write (a file's data, fsync or rename: checkpoints, sample
grids, the log). At the end it must be bit-identical to a run that nothing disturbed. Of several ranks any is killed, or
the first in the middle of a write: the others must end by themselves. One that is killed before they have found one
another is torchrun's to tell the others of, and there is no torchrun here: none is. POSIX only; some minutes."""
import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from ranks import start

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import gan  # noqa: E402

# Runs gan.py, but kills itself at the nth write: before the data is out, half way through it, or before a rename.
DYING = """
import builtins, os, signal, sys
import gan
left = [int(sys.argv.pop(1))] if os.environ["RANK"] == "0" else [sys.argv.pop(1) and 0]
def dying(real, half=None):
    def call(*arguments, **options):
        left[0] -= 1
        if left[0] == 0:
            if half: half(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    return call
os.replace, os.fsync = dying(os.replace), dying(os.fsync)
def half_a_line(run, line):
    with open(run / "log.jsonl", "a") as file: file.write('{"epoch": 9')
gan.append_log = dying(gan.append_log, half_a_line)
def half_a_file(path, *_):
    path.with_name(f".gan-{path.name}.{os.getpid()}.tmp").write_bytes(b"half of it")
gan.whole_file = dying(gan.whole_file, half_a_file)
sys.exit(gan.main(sys.argv[1:]))
"""


def is_held_by(run: Path, process: int) -> bool:
    """Whether a process trains in a run's folder: it holds it once all ranks have found one another."""
    lock = run / "train.lock"
    return lock.exists() and lock.read_text() == str(process)


def train(data: Path, run: Path, model: str, ranks: int, *, victim: int = 0, die_at_write: int | None = None,
          die_after: float | None = None) -> bool:
    """Train to epoch 40; returns whether a rank was killed."""
    code = [ROOT / "gan.py"] if die_at_write is None else ["-c", DYING, die_at_write]
    processes = start(ranks, *code, "train", "--data", data, "--run", run, "--model", model, "--width", 8, "--epochs", 40,
                      "--save-every", 1, "--keep-every", 10, "--device", "cpu", stdout=subprocess.DEVNULL)
    while ranks > 1 and processes[0].poll() is None and not is_held_by(run, processes[0].pid):
        time.sleep(0.05)
    try:
        processes[victim].wait(timeout=die_after)
    except subprocess.TimeoutExpired:
        processes[victim].kill()
    codes = [process.wait(timeout=60) for process in processes]
    killed = codes[victim] == -9
    assert set(codes) <= ({1, -9} if killed else {0}) and codes.count(-9) == killed, f"exit codes {codes}"
    return killed


def flatten(value, name: str = ""):
    """(path, leaf) of all leaves of nested dictionaries and lists."""
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flatten(item, f"{name}.{key}")
    else:
        yield name, value


def differences(a: Path, b: Path) -> list[str]:
    """What two finished runs do not have in common, besides the clock and their names."""
    found = []
    states = [dict(flatten(gan.read_checkpoint(run / "last.pt"))) for run in (a, b)]
    for name in states[0].keys() | states[1].keys():
        one, two = (state.get(name) for state in states)
        equal = one.shape == two.shape and torch.equal(one.nan_to_num(9), two.nan_to_num(9)) \
            if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor) else one == two
        found += [] if equal or name == ".settings.run" else [name]
    logs = [[{**line, "seconds": 0} for line in gan.read_log(run)] for run in (a, b)]
    found += ["log.jsonl"] if logs[0] != logs[1] or len(logs[0]) != 40 else []
    pictures = [{p.name: p.read_bytes() for p in (run / "samples").iterdir()} for run in (a, b)]
    return found + (["samples"] if pictures[0] != pictures[1] else []) + [p.name for p in b.rglob(".gan-*")]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    arguments = parser.parse_args()
    chance, failed = random.Random(arguments.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        gan.prepare(gan.PrepareSettings(demo=True, data=str(data), size=32, limit=200))
        for model in gan.OBJECTIVES:
            whole, broken = Path(folder) / f"{model}-whole", Path(folder) / f"{model}-broken"
            train(data, whole, model, arguments.ranks)
            by_time = by_write = 0
            problems = []
            while by_time + by_write < arguments.kills and not problems:
                if chance.random() < 0.5:
                    by_time += train(data, broken, model, arguments.ranks, die_after=chance.uniform(1, 8) * arguments.ranks,
                                     victim=chance.randrange(arguments.ranks))
                else:
                    by_write += train(data, broken, model, arguments.ranks, die_at_write=chance.randint(1, 40))
                log = gan.read_log(broken)
                if log and log[-1]["epoch"] >= 38:  # done before it was killed often enough: compare, and start again
                    train(data, broken, model, arguments.ranks)
                    problems = differences(whole, broken)
                    gan.shutil.rmtree(broken)
            train(data, broken, model, arguments.ranks)
            problems = problems or differences(whole, broken)
            failed += bool(problems)
            print(f"{model}: killed {by_time} times at a random time and {by_write} times in a random write, then "
                  + (f"DIFFERENT: {problems[:5]}" if problems else "bit-identical to a run never killed"), flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
