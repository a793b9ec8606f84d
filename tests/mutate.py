"""Do the tests notice?  python tests/mutate.py --out mutants [--count 200] [--seed 0] [--rooms "A;B"] [--retry]

Needs: pip install cosmic-ray. It makes single changes to gan.py (a comparison, a number, an operator, and/or, a loop,
an exception, a decorator) at places drawn by chance, and runs the tests of the room for each, in a copy of the
checkout. Asked again with the same --out, it goes on where it stopped; --retry tries those that no test noticed against
the tests as they are now. Ends with the changes that no test noticed; some two hours for 200 on one core. The look of
the drawn face, annotations and texts are left alone."""
import argparse
import ast
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkItem, WorkResult

ROOT = Path(__file__).resolve().parent.parent
TESTS = {"header": "dataset cli train", "Settings": "cli networks run", "Faces on disk": "dataset train",
         "Networks": "networks objectives drawing train", "Objectives": "objectives train", "Balance": "balance train",
         "Run directory": "run train judge", "Judge": "judge", "Training": "train judge objectives",
         "Drawing faces": "drawing cli", "Server": "server", "Command line": "cli dataset judge"}
# `is` for `==` mostly changes nothing, a shift of a float is mostly an error
NOT_TRIED = re.compile(r"_(Is(Not)?|RShift|LShift|Bit\w+)$")


def room_of(source: str, line: int) -> str:
    """The room that a line of gan.py belongs to."""
    banners = re.findall(r"^# =+\n# (\w[\w ]*).*\n# =+$", "\n".join(source.splitlines()[:line]), re.MULTILINE)
    return banners[-1] if banners else "header"


def exempt(source: str) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """(start, end) as (line, column) of what no test should pin: the look of the drawn face, and annotations."""
    tree = ast.parse(source)
    spared = [node for node in tree.body if getattr(node, "name", None) in ("draw_face", "mixed_colour")
              or isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("np.array([(")]  # its palettes
    for node in ast.walk(tree):
        spared += [getattr(node, name) for name in ("annotation", "returns") if getattr(node, name, None)]
    for node in spared:
        yield (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)


def draw_changes(module: Path, rooms: list[str], count: int, seed: int) -> Iterator[WorkItem]:
    """So many changes, at most one a place; each place has the same chance, however many changes it allows."""
    source = module.read_text("utf-8")
    spared = list(exempt(source))
    with use_db(":memory:") as everything:
        init([module], everything, {})
        changes = [item.mutations[0] for item in everything.work_items]
    places = defaultdict(list)
    for change in sorted(changes, key=lambda change: (change.operator_name, change.occurrence)):
        if not (NOT_TRIED.search(change.operator_name) or room_of(source, change.start_pos[0]) not in rooms
                or any(start <= change.start_pos < end for start, end in spared)):
            places[change.start_pos].append(change)
    chance = random.Random(seed)
    for number, place in enumerate(chance.sample(sorted(places), min(count, len(places)))):
        yield WorkItem.single(f"{number:05d}", chance.choice(places[place]))


def copy_checkout(out: Path) -> None:
    """Lay the tests anew, and the rest where it is not there yet; gan.py as it was when the changes were drawn."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in names:
        target = out / "checkout" / name
        if name.startswith("tests/") or not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
    if not (out / "gan.py").exists():
        shutil.copy(ROOT / "gan.py", out)
    shutil.copy(out / "gan.py", out / "checkout")  # a process that was killed may have left it changed


def tests_of(room: str) -> str:
    """What runs the tests of a room until one fails."""
    return f"{sys.executable} -m pytest -q -x -p no:cacheprovider " + " ".join(
        f"tests/test_{name}.py" for name in TESTS[room].split())


@cache
def usual_seconds(room: str) -> float:
    """How long the tests of a room take where nothing is changed; they must pass."""
    started = time.monotonic()
    done = subprocess.run(tests_of(room).split(), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the tests of {room} fail without any change:\n{done.stdout[-2000:]}")
    return time.monotonic() - started


def describe(item: WorkItem, result: WorkResult, source: str) -> str:
    """Where a change is, and its lines before and after."""
    line = item.mutations[0].start_pos[0]
    changed = re.findall(r"^[-+](?![-+]).*", result.diff or "", re.MULTILINE)
    return "\n".join([f"{room_of(source, line)}, line {line}", *changed])


def try_changes(work: WorkDB, source: str, retry: bool) -> None:
    """Run the tests with each change that has no result yet; with `retry`, also with those that none noticed."""
    results = dict(work.results)
    pending = [item for item in sorted(work.work_items, key=lambda item: item.job_id) if item.job_id not in results
               or retry and results[item.job_id].test_outcome != TestOutcome.KILLED]
    for number, item in enumerate(pending, 1):
        room = room_of(source, item.mutations[0].start_pos[0])
        limit, started = 30 + 3 * usual_seconds(room), time.monotonic()
        result = mutate_and_test(item.mutations, tests_of(room), limit)
        work.set_result(item.job_id, result)
        print(f"{number}/{len(pending)} {result.test_outcome} in {time.monotonic() - started:.0f} s: "
              + describe(item, result, source), flush=True)


def main() -> None:
    """Draw the changes, or go on with those that were drawn before; print what no test noticed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rooms", help="of these alone, with ; between")
    parser.add_argument("--retry", action="store_true")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    copy_checkout(out)
    os.chdir(out / "checkout")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    source = (out / "gan.py").read_text("utf-8")
    with use_db(out / "session.sqlite") as work:
        if not work.num_work_items:
            rooms = arguments.rooms.split(";") if arguments.rooms else list(TESTS)
            work.add_work_items(draw_changes(Path("gan.py"), rooms, arguments.count, arguments.seed))
        try_changes(work, source, arguments.retry)
        missed = [(item, result) for item, result in work.completed_work_items
                  if result.test_outcome != TestOutcome.KILLED]
        print(f"\n{work.num_results - len(missed)} of {work.num_results} changes noticed; not noticed:")
        for item, result in missed:
            print(describe(item, result, source))


if __name__ == "__main__":
    main()
