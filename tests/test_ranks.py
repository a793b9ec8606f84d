"""Several ranks: what they compute is the mean of what each would alone; whatever ends or stops one of them all learn."""
import json
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest
import ranks as together
import torch
from forked import Forked
from test_train import outcome, same

import gan

RANKS = 3  # so that 16 faces are divided unevenly

# A rank that measures what ranks.py does and then lives through several commands, each with a port of its own: [port,
# what is done to it, the arguments of gan.py].
LIVES = """
import contextlib, io, json, os, resource, signal, sys
import torch.distributed as dist
import gan, ranks
rank, real, free_memory = int(os.environ["RANK"]), gan.Trainer.train_minibatch, gan.free_memory
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def live(port, ills, arguments):
    os.environ["MASTER_PORT"] = str(port)
    def train_minibatch(trainer, faces):
        at = trainer.progress.images_seen // 16
        if ills.get("signal") == [rank, at]:
            signal.raise_signal(signal.SIGTERM)
        real(trainer, faces * float("nan") if ills.get("nan") == [rank, at] else faces)
    gan.Trainer.train_minibatch = train_minibatch
    gan.free_memory = lambda device: ills.get("memory", free_memory(device))
    limit = ills.get("disk", resource.RLIM_INFINITY) if rank == 0 else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = gan.main(["train", *arguments])
    if dist.is_initialized():
        dist.destroy_process_group()  # as the end of a process would
    return [code, out.getvalue(), err.getvalue()]
print(json.dumps([ranks.measure(12), *(live(*life) for life in json.loads(sys.argv[1]))]))
"""


def command(data: Path, run: Path, **changes) -> list[str]:
    options = {"data": data, "run": run, "width": 4, "epochs": 3, "batch_size": 16, "device": "cpu", "save_every": 1,
               "keep_every": 2, "precision": "fp32", **changes}
    return [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def alone(data: Path, run: Path, **changes) -> None:
    assert gan.main(["train", *command(data, run, **changes)]) == 0


@pytest.fixture(scope="module")
def lives(dataset, judged_data, tmp_path_factory):
    """(folder of the runs, name of a life -> (exit code, standard output, standard error) of each rank), and under the
    name "measured" what ranks.measure found: all by the same processes, because starting them takes longest."""
    folder = tmp_path_factory.mktemp("ranks")
    alone(dataset, folder / "story", balance=1, epochs=1)
    alone(dataset, folder / "ill", epochs=2)
    for ill in ("not-finite", "full", "refused"):
        gan.shutil.copytree(folder / "ill", folder / ill)
    told = {"story": ({}, command(dataset, folder / "story", balance=1, epochs=3)),
            "whole": ({}, command(dataset, folder / "whole")),
            "signalled": ({"signal": [1, 6]}, command(dataset, folder / "stopped")),
            "going on": ({}, command(dataset, folder / "stopped")),
            "not finite": ({"nan": [2, 9]}, command(dataset, folder / "not-finite", epochs=9)),
            "full": ({"disk": (folder / "full" / "last.pt").stat().st_size - 1}, command(dataset, folder / "full", epochs=9)),
            "refused": ({}, command(dataset, folder / "refused", width=8)),
            "too few": ({}, command(dataset, folder / "too-few", batch_size=2)),
            "judged": ({"memory": 0}, command(judged_data, folder / "judged", epochs=1, batch_size=100))}
    jobs = [[together.free_port(), *life] for life in told.values()]
    with ExitStack() as stack:
        ranks = [stack.enter_context(Forked(json.dumps(jobs), cwd=folder, code=LIVES, **rank)) for rank in together.environments(RANKS)]
        answers = [json.loads(rank.stdout.read()) for rank in ranks]
    return folder, dict(zip(["measured", *told], zip(*answers, strict=True), strict=True))


def codes(lives, name: str) -> list[int]:
    return [code for code, _, _ in lives[1][name]]


def errors(lives, name: str) -> list[str]:
    """What each rank wrote to standard error: one line each, or nothing."""
    found = [error for _, _, error in lives[1][name]]
    assert all(error.count("\n") <= 1 for error in found)
    return found


def test_gradients_are_the_mean_of_the_parts(lives):
    """Losses and gradients of 20 faces on ranks with 6, 7 and 7 of them, weighted by faces. WGAN-GP's critic looks at
    each face for itself: but for the generator's BatchNorm, which knows its own part alone, they are one process's."""
    told = lives[1]["measured"]
    assert [one["mean of the numbers"] for one in told] == [pytest.approx((0 * 6 + 1 * 7 + 2 * 7) / 20)] * RANKS
    for model in gan.OBJECTIVES:
        assert told[0][f"{model}, from the mean of the parts"] < 1e-12
        assert [one[f"{model}, different gradients"] for one in told] == [1] * RANKS
    assert told[0]["WGAN-GP, from one process, generator still"] < 1e-12


def test_weights_are_the_same_in_all_ranks(lives):
    """After 12 balanced minibatches and the end of an epoch: weights, optimizers, random numbers, the averaged generator
    and what the log says have the same bits in each rank, though each has BatchNorm statistics of its own."""
    for told in lives[1]["measured"]:
        for model in gan.OBJECTIVES:
            found = told[f"{model}, after 12 minibatches"]
            assert (found["states"], found["rows"], found["statistics"]) == (1, 1, RANKS)
            assert found["discriminator"] > 0 < found["generator"]


@pytest.mark.parametrize(("size", "count"), [(3, 3), (20, 3), (256, 256), (1000, 7)])
def test_parts_cover_a_minibatch_evenly(size, count):
    """Each face once, no rank has more than one face more than another, and their shares are by faces."""
    ranks = [gan.Ranks(number, count) for number in range(count)]
    for rank in ranks:
        rank.divide(size)
    parts = [rank.part for rank in ranks]
    assert (parts[0].start, parts[-1].stop) == (0, size) and all(a.stop == b.start for a, b in pairwise(parts))
    assert max(part.stop - part.start for part in parts) - min(part.stop - part.start for part in parts) <= 1
    assert [rank.share * size for rank in ranks] == pytest.approx([part.stop - part.start for part in parts])


def test_from_one_process_to_several_and_back_is_one_run(lives, dataset, tmp_path):
    """An epoch alone, two epochs of three ranks, one alone: the turns, the random numbers and the log's epochs are those
    of four epochs of one process."""
    folder, _ = lives
    assert codes(lives, "story") == [0] * RANKS and errors(lives, "story") == [""] * RANKS
    assert [bool(out) for _, out, _ in lives[1]["story"]] == [True] + [False] * (RANKS - 1)
    assert "on 3 × cpu" in lives[1]["story"][0][1]
    alone(dataset, folder / "story", balance=1, epochs=4)
    alone(dataset, tmp_path / "alone", balance=1, epochs=4)
    one, several = (outcome(run) for run in (tmp_path / "alone", folder / "story"))
    assert one["state"]["progress"] | {"seconds": 0} == several["state"]["progress"] | {"seconds": 0}
    assert same(one["state"]["random"], several["state"]["random"])
    assert one["log"][0] == several["log"][0]
    for a, b in zip(one["log"], several["log"], strict=True):
        assert all(a[name] == b[name] for name in ("epoch", "images_seen", "discriminator_updates", "generator_updates"))


def test_a_signal_to_one_rank_stops_all_at_the_same_minibatch(lives):
    """It is saved once, and the same command goes on as if nothing had been."""
    folder, told = lives
    assert codes(lives, "signalled") == [143] * RANKS and errors(lives, "signalled") == [""] * RANKS
    assert "stopped in epoch 2 and saved" in told["signalled"][0][1]
    assert codes(lives, "whole") == codes(lives, "going on") == [0] * RANKS
    assert same(outcome(folder / "whole"), outcome(folder / "stopped"))


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(lives):
    """Each tells of it at the same moment, the first with the way back; nothing of it is saved."""
    assert codes(lives, "not finite") == [1] * RANKS
    lines = errors(lives, "not finite")
    assert all("not finite" in line and "epoch 3" in line for line in lines) and "go on from it with" in lines[0]
    assert gan.read_checkpoint(lives[0] / "not-finite" / "last.pt")["progress"]["epoch"] == 2


def test_a_full_disk_of_the_first_rank_ends_all(lives):
    """It says so; the last checkpoint stays whole."""
    assert codes(lives, "full") == [1] * RANKS
    first, *others = errors(lives, "full")
    assert "last.pt: File too large" in first and all("another process of this run ended" in line for line in others)
    assert gan.read_checkpoint(lives[0] / "full" / "last.pt")["progress"]["epoch"] == 2


def test_what_the_first_rank_refuses_ends_all(lives):
    """Other settings than the checkpoint's, told by the first; a minibatch that is too small for so many, by each."""
    assert codes(lives, "refused") == codes(lives, "too few") == [1] * RANKS
    first, *others = errors(lives, "refused")
    assert "--width 4 (now 8)" in first and all("another process of this run ended" in line for line in others)
    assert errors(lives, "too few") == [
        "gan.py: 2 faces in a minibatch are too few for 3 processes: raise --batch-size\n"] * RANKS


def test_ranks_wait_for_the_judge_and_map_faces(lives, judged_data):
    """Where faces do not fit, all ranks unpack and map the same file; scores stand in the log."""
    assert codes(lives, "judged") == [0] * RANKS and errors(lives, "judged") == [""] * RANKS
    line, = gan.read_log(lives[0] / "judged")
    assert "distance" in line["scores"] and line["images_seen"] == 200
    assert sorted(path.suffix for path in judged_data.glob(".gan-*")) == [".uint8"] * 2  # the held-out ones' too


@pytest.mark.parametrize(("device", "words"), [("cuda", "no cuda device for process 2"), ("mps", "no mps device")])
def test_more_processes_than_devices_are_refused(monkeypatch, device, words):
    """Before they wait for one another."""
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(gan.torch.cuda, "device_count", lambda: 1)
    with pytest.raises(gan.UserError, match=words):
        gan.join_ranks(torch.device(device))


def test_torchrun_restarts_from_the_last_checkpoint(dataset, tmp_path):
    """A rank is killed in epoch 2, after the first has saved epoch 1 and gone on: the other ends, both begin again by themselves, and each epoch stands
    in the log once."""
    (tmp_path / "dying.py").write_text(
        "import os, signal, sys, gan\n"
        "real = gan.Trainer.train_minibatch\n"
        "def train_minibatch(trainer, faces):\n"
        "    if trainer.progress.images_seen == 96 and os.environ['TORCHELASTIC_RESTART_COUNT'] + os.environ['RANK'] == '01':\n"
        "        open('killed', 'x').close()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    real(trainer, faces)\n"
        "gan.Trainer.train_minibatch = train_minibatch\n"
        "code = gan.main(sys.argv[1:])\n"
        "sys.stdout.flush()\n"
        "os._exit(code)\n")  # as gan.py ends: Python's own end may abort inside torch
    with Forked("--standalone", "--nproc-per-node=2", "--max-restarts=1", "--", "dying.py", "train",
                *command(dataset, tmp_path / "run"), cwd=tmp_path, code="import torch.distributed.run as t; t.main()") as torchrun:
        code, told, errors = torchrun.end()
    assert code == 0, errors
    assert (tmp_path / "killed").exists()  # torchrun may name the other one, which ends because of it
    assert f"going on from {tmp_path / 'run' / 'last.pt'}, epoch 1" in told
    assert [line["epoch"] for line in gan.read_log(tmp_path / "run")] == [1, 2, 3]
