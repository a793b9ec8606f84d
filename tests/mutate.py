"""Do the tests notice?  python tests/mutate.py --out mutants [--count 200] [--seed 0] [--rooms "A;B"] [--retry]

Needs: pip install cosmic-ray pytest-cov. Makes single changes to gan.py (a comparison, a number, an operator, and/or, a
loop, an exception, a decorator) at places chosen by chance, in a copy of the checkout, and runs for each the tests that
come past the place, quick ones first. Asked again with the same --out, it goes on where it stopped; --retry tries those
that no test noticed against the tests as they are now. Ends with the changes that no test noticed. The look of the
cartoon face, annotations and texts are left alone."""
import argparse
import ast
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkItem, WorkResult
from coverage import CoverageData

ROOT = Path(__file__).resolve().parent.parent
# In one process: with workers coverage does not tell tests apart.
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts="]
# `is` for `==` mostly changes nothing, a shift of a float is mostly an error
NOT_TRIED = re.compile(r"_(Is(Not)?|RShift|LShift|Bit\w+)$")


@cache
def room_of(source: str, line: int) -> str:
    """The room that a line of gan.py belongs to."""
    banners = re.findall(r"^# =+\n# (\w[\w ]*).*\n# =+$", "\n".join(source.splitlines()[:line]), re.MULTILINE)
    return banners[-1] if banners else "header"


def exempt(source: str) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """(start, end) as (line, column) of what no test should pin: the look of the cartoon face, and annotations."""
    tree = ast.parse(source)
    spared = [node for node in tree.body if getattr(node, "name", None) in ("cartoon_face", "mixed_colour")
              or isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("np.array([(")]  # its palettes
    for node in ast.walk(tree):
        spared += [getattr(node, name) for name in ("annotation", "returns") if getattr(node, name, None)]
    for node in spared:
        yield (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)


def choose_changes(module: Path, rooms: list[str] | None, count: int, seed: int) -> Iterator[WorkItem]:
    """So many changes, at most one a place; each place has the same chance, however many changes it allows."""
    source = module.read_text("utf-8")
    spared = list(exempt(source))
    with use_db(":memory:") as everything:
        init([module], everything, {})
        changes = [item.mutations[0] for item in everything.work_items]
    places = defaultdict(list)
    for change in sorted(changes, key=lambda change: (change.operator_name, change.occurrence)):
        spare = any(start <= change.start_pos < end for start, end in spared)
        wanted = rooms is None or room_of(source, change.start_pos[0]) in rooms
        if wanted and not spare and not NOT_TRIED.search(change.operator_name):
            places[change.start_pos].append(change)
    chance = random.Random(seed)
    for number, place in enumerate(chance.sample(sorted(places), min(count, len(places)))):
        yield WorkItem.single(f"{number:05d}", chance.choice(places[place]))


def copy_checkout(out: Path) -> None:
    """Lay the tests anew, and the rest where it is not there yet; gan.py as it was when the changes were chosen."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in names:
        target = out / "checkout" / name
        if name.startswith("tests/") or not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
    if not (out / "gan.py").exists():
        shutil.copy(ROOT / "gan.py", out)
    shutil.copy(out / "gan.py", out / "checkout")  # a process that was killed may have left it changed


class Tests:
    """Which tests come past a line of gan.py, and how many seconds each takes: from one run of all, which must pass."""

    def __init__(self, source: str, report: Path):
        self.source, self.tree = source, ast.parse(source)
        if not report.exists():
            subprocess.run([*PYTEST, "tests", f"--junitxml={report}.new", "--cov=gan", "--cov-context=test",
                            "--cov-report="], check=True)
            os.replace(f"{report}.new", report)
        cases = ElementTree.parse(report).iter("testcase")
        self.seconds = {f"{case.get('classname').replace('.', '/')}.py::{case.get('name')}": float(case.get("time"))
                        for case in cases}
        listed = subprocess.run([*PYTEST, "--collect-only", "tests"], stdout=subprocess.PIPE, text=True, check=True)
        self.now = {line for line in listed.stdout.splitlines() if "::" in line}
        data = CoverageData()
        data.read()
        contexts = data.contexts_by_lineno(str(Path("gan.py").resolve()))
        self.past = {line: {name.rpartition("|")[0] for name in names} - {""} for line, names in contexts.items()}

    def statement(self, line: int) -> range:
        """The lines of the statement around a line; of a compound one, those before its body."""
        found = range(line, line + 1)
        for node in ast.walk(self.tree):
            if isinstance(node, ast.stmt) and node.lineno <= line <= node.end_lineno:
                body = getattr(node, "body", None)
                found = range(node.lineno, max(node.lineno + 1, body[0].lineno) if body else node.end_lineno + 1)
        return found

    def of(self, line: int) -> list[str]:
        """Those that come past the line's statement, quick ones first; where it is run by the import alone, those that
        come past any line of its room. Then those that were written since."""
        names = set().union(*(self.past.get(each, set()) for each in self.statement(line)))
        if not names:
            room = room_of(self.source, line)
            names = set().union(*(past for each, past in self.past.items() if room_of(self.source, each) == room))
        known = sorted(names & self.now, key=lambda name: (self.seconds[name], name))
        return known + sorted(self.now - self.seconds.keys())


def describe(item: WorkItem, result: WorkResult, source: str) -> str:
    """Where a change is, and its lines before and after."""
    line = item.mutations[0].start_pos[0]
    changed = re.findall(r"^[-+](?![-+]).*", result.diff or "", re.MULTILINE)
    return "\n".join([f"{room_of(source, line)}, line {line}", *changed])


def try_changes(work: WorkDB, tests: Tests, retry: bool) -> None:
    """Run the tests with each change that has no result yet; with `retry`, also with those that none noticed. What
    takes least comes first."""
    results = dict(work.results)
    pending = [(item, tests.of(item.mutations[0].start_pos[0])) for item in work.work_items
               if item.job_id not in results or retry and results[item.job_id].test_outcome != TestOutcome.KILLED]
    pending.sort(key=lambda both: sum(tests.seconds.get(name, 0) for name in both[1]))
    for number, (item, names) in enumerate(pending, 1):
        limit, started = 60 + 5 * sum(tests.seconds.get(name, 0) for name in names), time.monotonic()
        result = mutate_and_test(item.mutations, shlex.join([*PYTEST, "-x", *names]), limit)
        work.set_result(item.job_id, result)
        print(f"{number}/{len(pending)} {result.test_outcome.value} by {len(names)} tests in "
              f"{time.monotonic() - started:.0f} s: {describe(item, result, tests.source)}", flush=True)


def main() -> None:
    """Choose the changes, or go on with those that were chosen before; print what no test noticed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rooms", help="choose in these alone, with ; between")
    parser.add_argument("--retry", action="store_true")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    copy_checkout(out)
    os.chdir(out / "checkout")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    source = (out / "gan.py").read_text("utf-8")
    tests = Tests(source, out / "tests.xml")
    with use_db(out / "session.sqlite") as work:
        if not work.num_work_items:
            rooms = arguments.rooms.split(";") if arguments.rooms else None
            work.add_work_items(choose_changes(Path("gan.py"), rooms, arguments.count, arguments.seed))
        try_changes(work, tests, arguments.retry)
        missed = [(item, result) for item, result in work.completed_work_items
                  if result.test_outcome != TestOutcome.KILLED]
        print(f"\n{work.num_results - len(missed)} of {work.num_results} changes noticed; not noticed:")
        for item, result in missed:
            print(describe(item, result, source))


if __name__ == "__main__":
    main()
