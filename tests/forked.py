"""Processes that are forked from one that has imported gan, which takes seconds: for tests that need a process, but not its
beginning. Where forking is not safe they are begun as any other."""
import multiprocessing
import os
import runpy
import sys
from contextlib import suppress
from multiprocessing.connection import Connection

import matplotlib.figure  # noqa: F401
import pytest
import torch._dynamo  # the first optimizer imports it, which takes as long as torch itself
import torch.distributed  # noqa: F401

import gan  # noqa: F401

CONTEXT = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
CONTEXT.set_forkserver_preload([__name__])


def begin(code: str | None, arguments: list[str], cwd: str, environment: dict[str, str], outputs: list[Connection]) -> None:
    """What the new process does: gan.py as a user runs it, or other code."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, output in enumerate(outputs, 1):
        os.dup2(output.fileno(), number)
        output.close()
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", 1, closefd=False)
    sys.argv = ["gan.py", *arguments]
    try:
        exec(code, {"__name__": "__main__"}) if code else runpy.run_module("gan", run_name="__main__", alter_sys=True)
        end = 0
    except SystemExit as ended:
        end = ended.code or 0
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(end)


class Forked:
    """gan.py, or other Python code, with these arguments. Its output and errors are pipes to read text from, unless file
    descriptors are given; it is killed at the end of a `with`."""

    def __init__(self, *arguments, cwd, code: str | None = None, outputs: tuple[int, ...] = (), **environment: str):
        if os.name != "posix":
            pytest.skip("needs pipes and signals of POSIX")
        pipes = [CONTEXT.Pipe(duplex=False) for _ in range(2)]
        self.stdout, self.stderr = (os.fdopen(os.dup(ours.fileno())) for ours, _ in pipes)
        theirs = [Connection(os.dup(number), readable=False) for number in outputs] or [theirs for _, theirs in pipes]
        self.process = CONTEXT.Process(target=begin, args=(
            code, [*map(str, arguments)], str(cwd), os.environ | environment, theirs))
        self.process.start()
        self.pid = self.process.pid
        for end in theirs:
            end.close()

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = 120) -> int | None:
        """Its exit code; None where it has not ended by then."""
        self.process.join(seconds)
        return self.process.exitcode

    def end(self) -> tuple[int | None, str, str]:
        """Exit code, and what is still in the pipes."""
        rest = self.stdout.read(), self.stderr.read()
        return self.wait(), *rest

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.join()
        self.stdout.close()
        self.stderr.close()
