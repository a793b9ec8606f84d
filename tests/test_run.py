"""The run folder: checkpoints that tell damage, a writer, a lock, a log; nothing that a kill or bad file can spoil."""
import errno
import io
import json
import os
import pickle
import re
import stat
import subprocess
import sys
import threading
import zipfile
from contextlib import nullcontext, suppress
from functools import partial
from itertools import pairwise

import pytest
import torch
from forked import Forked

import gan

STATE = {"version": gan.CHECKPOINT_FORMAT, "settings": {"width": 4},
         "progress": {"images_seen": 10, "epoch": 1}, "weights": torch.arange(500.0)}


@pytest.fixture
def checkpoint(tmp_path):
    gan.write_checkpoint(tmp_path / "last.pt", STATE)
    return tmp_path / "last.pt"


def test_checkpoint_round_trip(checkpoint):
    """What is read is what was written; torch's own safe loader and any zip reader take the file as it is."""
    for state in (gan.read_checkpoint(checkpoint), torch.load(checkpoint, weights_only=True)):
        assert torch.equal(state.pop("weights"), STATE["weights"])
        assert state == {name: value for name, value in STATE.items() if name != "weights"}
    assert zipfile.ZipFile(checkpoint).testzip() is None


def test_every_truncation_is_told(checkpoint):
    """Cut at any length, empty included."""
    data = checkpoint.read_bytes()
    for length in [*range(70), *range(70, len(data), 97), *range(len(data) - 130, len(data))]:
        checkpoint.write_bytes(data[:length])
        with pytest.raises(gan.UserError, match="last.pt is damaged"):
            gan.read_checkpoint(checkpoint)


def test_a_changed_byte_is_refused_or_changes_nothing(checkpoint):
    """Anywhere in the file: what is loaded in spite of it is what was saved; in the weights, where torch's reader does
    not look, it is always told."""
    data, refused = checkpoint.read_bytes(), set()
    expected = {name: value for name, value in STATE.items() if name != "weights"}
    folders = [entry.start() + 38 for entry in re.finditer(b"PK\1\2", data)]  # where a zip tells folders by a bit
    for position in [*range(0, len(data), 37), *folders]:
        damaged = bytearray(data)
        damaged[position] ^= 0x10 if position in folders else 1 << position % 8
        checkpoint.write_bytes(damaged)
        try:
            state = gan.read_checkpoint(checkpoint)
        except gan.UserError as error:
            assert "last.pt" in str(error)
            refused.add(position)
        else:
            assert torch.equal(state.pop("weights"), STATE["weights"]) and state == expected, position
    start = data.index(STATE["weights"].numpy().tobytes())
    assert {position for position in range(0, len(data), 37) if start <= position < start + 2000} <= refused


class Malicious:
    def __reduce__(self):
        return open, ("executed", "w")


@pytest.mark.parametrize("payload", ["pickle", "torch", "text", "zip", "list"])
def test_a_foreign_or_malicious_file_is_refused_and_not_executed(tmp_path, monkeypatch, payload):
    """Even a whole zip file of torch's: the safe loader executes nothing."""
    monkeypatch.chdir(tmp_path)
    def saved(value) -> bytes:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return buffer.getvalue()
    path = tmp_path / "last.pt"
    path.write_bytes({"pickle": pickle.dumps(Malicious()), "text": b"hello", "zip": b"PK\x05\x06" + bytes(18),
                      "torch": saved({"version": gan.CHECKPOINT_FORMAT, "evil": Malicious()}),
                      "list": saved([1, 2])}[payload])
    with pytest.raises(gan.UserError, match="last.pt"):
        gan.read_checkpoint(path)
    assert not (tmp_path / "executed").exists()


def test_another_format_is_named(tmp_path):
    """A checkpoint of a later gan.py says which format it has."""
    gan.write_checkpoint(tmp_path / "last.pt", STATE | {"version": 99})
    with pytest.raises(gan.UserError, match=f"format 99, this gan.py reads {gan.CHECKPOINT_FORMAT}"):
        gan.read_checkpoint(tmp_path / "last.pt")


class Killed(BaseException):
    """Stands for SIGKILL: no handler of gan.py may catch it."""


def save_three(run):
    """previous.pt at 10 images, last.pt at 20, a kept epoch 1 at 5."""
    for images in (10, 20):
        gan.save_last(run, STATE | {"progress": {"images_seen": images, "epoch": images // 10}})
    gan.write_checkpoint(run / "epoch-00001.pt", STATE | {"progress": {"images_seen": 5, "epoch": 1}})


def test_the_writer_writes_one_thing_while_the_next_is_made():
    """What is asked for begins when the one before is done, behind the back of who asks; the end waits for the last."""
    done, gates = [], [threading.Event() for _ in range(20)]

    def write(number, gate):
        assert gate.wait(60)
        done.append(number)
    with gan.Writer() as writer:
        for number, gate in enumerate(gates):
            if number:
                gates[number - 1].set()
            writer.ask(write, number, gate)
            assert done == list(range(number))
        gates[-1].set()
    assert done == list(range(20))


def test_a_failed_write_is_told(capsys):
    """To who asks next, whose own is not begun, or at the end; it hides no other error."""
    def full(path):
        raise gan.UserError(f"cannot write {path}")
    never = []
    for afterwards in (lambda writer: writer.ask(never.append, 0), lambda writer: None):
        with pytest.raises(gan.UserError, match="cannot write x"), gan.Writer() as writer:
            writer.ask(full, "x")
            afterwards(writer)
    with pytest.raises(KeyError), gan.Writer() as writer:
        writer.ask(full, "x")
        raise KeyError
    assert not never


@pytest.mark.parametrize(("broken", "images"), [([], 20), (["last.pt"], 10), (["last.pt", "previous.pt"], 5),
                                                (["previous.pt"], 20)])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_going_on_from_the_newest_whole_checkpoint(tmp_path, capsys, broken, images, how):
    """Damaged ones are passed over by name."""
    save_three(tmp_path)
    for name in broken:
        if how == "gone":
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:100])
    assert gan.newest_checkpoint(tmp_path, None)[1]["progress"]["images_seen"] == images
    said = capsys.readouterr().out
    assert how == "gone" or "last.pt" not in broken or "passed over" in said and "last.pt" in said


@pytest.mark.parametrize("nth", [1, 2])
def test_a_damaged_checkpoint_never_takes_the_place_of_a_good_one(tmp_path, monkeypatch, nth):
    """Killed at a rename of the first save after last.pt was found damaged, the run still has a whole one."""
    save_three(tmp_path)
    (tmp_path / "epoch-00001.pt").unlink()
    (tmp_path / "last.pt").write_bytes(b"damaged")
    assert gan.newest_checkpoint(tmp_path, None)[1]["progress"]["images_seen"] == 10
    calls, real = [], os.replace

    def dying(*arguments):
        calls.append(arguments)
        if len(calls) > nth:
            raise Killed
        return real(*arguments)

    monkeypatch.setattr(gan.os, "replace", dying)
    with pytest.raises(Killed):
        for images in (20, 30):
            gan.save_last(tmp_path, STATE | {"progress": {"images_seen": images, "epoch": 1}})
    gan.remove_orphans(tmp_path)
    assert gan.newest_checkpoint(tmp_path, None)[1]["progress"]["images_seen"] >= 10


def test_no_whole_checkpoint_is_an_error_and_none_at_all_a_new_run(tmp_path):
    """A run that cannot be read is never silently begun anew."""
    assert gan.newest_checkpoint(tmp_path, None) == (None, {})
    save_three(tmp_path)
    for path in tmp_path.glob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(gan.UserError, match="start anew with another --run"):
        gan.newest_checkpoint(tmp_path, None)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("nth", range(1, 5))
def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path, monkeypatch, call, nth):
    """At every fsync and rename of save_last, before it is done: the old or the new one can be gone on from."""
    gan.save_last(tmp_path, STATE | {"progress": {"images_seen": 1, "epoch": 0}})
    gan.save_last(tmp_path, STATE | {"progress": {"images_seen": 2, "epoch": 0}})
    calls, real = [], getattr(os, call)

    def dying(*arguments):
        calls.append(arguments)
        if len(calls) == nth:
            raise Killed
        return real(*arguments)

    monkeypatch.setattr(gan.os, call, dying)
    with suppress(Killed):
        gan.save_last(tmp_path, STATE | {"progress": {"images_seen": 3, "epoch": 0}})
    monkeypatch.undo()
    assert gan.newest_checkpoint(tmp_path, None)[1]["progress"]["images_seen"] in (2, 3)
    gan.remove_orphans(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"last.pt", "previous.pt"}


def test_find_checkpoint(tmp_path):
    """best where it is known, else last; an epoch number; a file; what is not there is answered with what is."""
    save_three(tmp_path)
    assert gan.find_checkpoint(tmp_path, None).name == "last.pt"
    assert gan.find_checkpoint(tmp_path, "LAST").name == "last.pt"
    assert gan.find_checkpoint(tmp_path, "1").name == gan.find_checkpoint(tmp_path, "00001").name == "epoch-00001.pt"
    assert gan.find_checkpoint(tmp_path, str(tmp_path / "previous.pt")).name == "previous.pt"
    with pytest.raises(gan.UserError, match="no checkpoint 7 in .*there are last, 1"):
        gan.find_checkpoint(tmp_path, "7")
    (tmp_path / "best.pt").touch()
    assert gan.find_checkpoint(tmp_path, None).name == "best.pt"
    with pytest.raises(gan.UserError, match="no run in"):
        gan.find_checkpoint(tmp_path / "nowhere", None)


@pytest.mark.parametrize("tail", ["", '{"epoch": 4, "lo', "\x00\x00"])
def test_the_log_is_cut_to_the_checkpoint(tmp_path, tail):
    """Lines of epochs that will be trained again are left out, and so is a last line that a kill cut short."""
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({"epoch": e}) + "\n" for e in (1, 2, 3)) + tail)
    assert [line["epoch"] for line in gan.read_log(tmp_path, 2)] == [1, 2]
    assert [line["epoch"] for line in gan.read_log(tmp_path)] == [1, 2, 3]


def test_a_second_training_is_refused_and_a_dead_ones_lock_is_not(tmp_path):
    """The refusal names the process; the lock of a killed process blocks nobody."""
    code = ("import gan, pathlib, signal, sys\nwith gan.locked(pathlib.Path(sys.argv[1])):\n"
            "    print('locked', flush=True)\n    signal.pause()")
    with Forked(tmp_path, cwd=tmp_path, code=code) as holder:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(gan.UserError, match=f"trained by process {holder.pid}"), gan.locked(tmp_path):
            pass
    with gan.locked(tmp_path):
        assert (tmp_path / "train.lock").read_text() == str(os.getpid())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows locks otherwise")
@pytest.mark.parametrize(("code", "refused"), [("ENOSYS", False), ("EOPNOTSUPP", False), ("ENOLCK", False), ("EAGAIN", True),
                                               ("EACCES", True)])
def test_a_file_system_without_locks_is_no_other_training(tmp_path, monkeypatch, capsys, code, refused):
    """Lustre and some NFS have none: it is told once, and the run is trained. A lock that somebody has is refused."""
    import fcntl

    def flock(file, operation):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
    monkeypatch.setattr(fcntl, "flock", flock)
    if refused:
        (tmp_path / "train.lock").write_text("4711")
        with pytest.raises(gan.UserError, match="trained by process 4711"), gan.locked(tmp_path):
            pass
    else:
        with gan.locked(tmp_path):
            assert (tmp_path / "train.lock").read_text() == str(os.getpid())
        said = capsys.readouterr().out
        assert f"{tmp_path} cannot be locked ({os.strerror(getattr(errno, code))})" in said and said.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="Windows opens no folders")
def test_a_file_is_written_where_folders_cannot_be_synced(tmp_path, monkeypatch):
    """Some file systems of networks and of other machines answer EINVAL."""
    real, folders = os.fsync, []

    def fsync(number):
        if stat.S_ISDIR(os.fstat(number).st_mode):
            folders.append(number)
            raise OSError(errno.EINVAL, "Invalid argument")
        real(number)
    monkeypatch.setattr(gan.os, "fsync", fsync)
    gan.atomic_write(tmp_path / "file", b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole" and folders
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(folders[0])  # it was closed


def test_failing_writes_name_the_file_and_leave_it_whole(tmp_path, monkeypatch):
    """The file before stays, and nothing half written."""
    path = tmp_path / "file"
    gan.atomic_write(path, b"before")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gan.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as told:
        gan.atomic_write(path, b"after")
    assert told.value.filename == str(path)
    assert path.read_bytes() == b"before" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_only_our_own_orphans_are_removed(tmp_path):
    """Not those in folders below, which may belong to somebody else: --run may name any folder."""
    (tmp_path / "data" / ".gan-prepare").mkdir(parents=True)
    for name in (".gan-last.pt", ".gan-x.png.17.tmp", ".gan-0123456789abcdef.uint8", ".gan-notes"):
        (tmp_path / name).touch()
    gan.remove_orphans(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".gan-notes", ".gan-prepare", "data"]


def test_curves_are_plotted_without_a_display(tmp_path, monkeypatch):
    """And with missing values, which a minibatch without a discriminator update has."""
    monkeypatch.delenv("DISPLAY", raising=False)
    line = dict.fromkeys(gan.COLUMNS, 0.5) | {"epoch": 1, "gradient_penalty": None}
    gan.write_accessory(tmp_path / "curves.png", gan.plot_curves, "run", [line, line | {"epoch": 2}])
    with gan.Image.open(tmp_path / "curves.png") as image:
        assert image.width >= 800 and len(image.convert("RGB").getcolors(10**6)) > 10


LINE = dict.fromkeys(gan.COLUMNS, 0.5) | {"epoch": 1}


@pytest.mark.parametrize("name", ["costs $5", "a_{b$^x$", "日本", "b\udce4r", "x\ny", "%s {} \\"], ids=ascii)
def test_curves_of_a_run_of_any_name(monkeypatch, recwarn, name):
    """A name is no formula, and letters that the font lacks, or that are none, end nothing; nobody is warned of them."""
    image = gan.Image.open(io.BytesIO(gan.plot_curves(name, [LINE])))
    plain = gan.Image.open(io.BytesIO(gan.plot_curves("run", [LINE])))
    assert image.size == plain.size and image.tobytes() != plain.tobytes() and not recwarn


def test_curves_are_plotted_whatever_a_matplotlibrc_says(monkeypatch):
    """TeX need not be here, and sizes and colours are ours."""
    import matplotlib
    plain = gan.plot_curves("run", [LINE])
    with matplotlib.rc_context({"text.usetex": True, "font.size": 40, "axes.facecolor": "black"}):
        assert gan.plot_curves("run", [LINE]) == plain


def test_curves_do_not_need_the_backend_of_a_notebook(tmp_path):
    """Colab and Jupyter name theirs to all that they start, where it is not installed."""
    code = f"import gan; gan.write_accessory(gan.Path('curves.png'), gan.plot_curves, 'run', [{LINE}])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=100,
                          env=os.environ | {"MPLBACKEND": "module://a_notebook.that_is_not_here"})
    assert (done.returncode, done.stdout) == (0, "") and (tmp_path / "curves.png").stat().st_size > 10_000


def test_a_picture_that_cannot_be_made_ends_nothing(tmp_path, monkeypatch, capsys):
    """It is told in a line, and the one from before stays; a folder that is gone is made anew."""
    def plot_curves(title, lines):
        raise RuntimeError("no latex here\nat all")
    (tmp_path / "curves.png").write_bytes(b"before")
    gan.write_accessory(tmp_path / "curves.png", plot_curves, "run", [LINE])
    assert capsys.readouterr().out == "no curves.png: no latex here at all\n"
    assert (tmp_path / "curves.png").read_bytes() == b"before"
    (tmp_path / "x.png").mkdir()
    gan.write_accessory(tmp_path / "x.png", gan.plot_curves, "run", [LINE])
    assert capsys.readouterr().out.startswith("no x.png: ")
    gan.write_accessory(tmp_path / "samples" / "1.png", gan.grid_png, torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    assert (tmp_path / "samples" / "1.png").exists()


@pytest.mark.parametrize(("denials", "good"), [(0, True), (15, True), (1000, False)])
def test_a_replacement_that_is_denied_is_tried_again_for_two_seconds(tmp_path, monkeypatch, denials, good):
    """A virus scanner that looks at a new file lets go of it; who may not write at all is told."""
    waited, real, calls = [], os.replace, []

    def denied(*arguments):
        calls.append(arguments)
        if len(calls) <= denials:
            raise PermissionError(errno.EACCES, "Access is denied")
        real(*arguments)
    monkeypatch.setattr(gan.os, "replace", denied)
    monkeypatch.setattr(gan.time, "sleep", waited.append)
    with nullcontext() if good else pytest.raises(PermissionError):
        gan.atomic_write(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] * good and (good or 1.9 < sum(waited) < 2.1)


def test_a_save_never_takes_last_away(tmp_path, monkeypatch):
    """At every call of the system there is a whole last.pt, also on a file system without hard links."""
    def looking(real, *arguments, **options):
        gan.read_checkpoint(tmp_path / "last.pt")
        return real(*arguments, **options)
    for links in (True, False):
        if not links:
            monkeypatch.setattr(gan.os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
        gan.save_last(tmp_path, STATE)
        for call in ("replace", "unlink", "fsync"):
            monkeypatch.setattr(gan.os, call, partial(looking, getattr(os, call)))
        for images in (1, 2):
            gan.save_last(tmp_path, STATE | {"progress": {"images_seen": images}})
        assert [gan.read_checkpoint(tmp_path / name)["progress"]["images_seen"]
                for name in ("previous.pt", "last.pt")] == [1, 2]


@pytest.mark.parametrize(("before", "epochs", "told"), [
    (b'\xef\xbb\xbf{"epoch": 1}\n{"epoch": 2}\n', [1, 2], []), (b'{"epoch": 1}\n\n \n{"epoch": 2}\n', [1, 2], []),
    (b'{"epoch": 1}\n{"ep\xffoch": 2}\n{"epoch": 3}\n', [1, 3], [2]), (b'{"a": 1}\n[]\n7\n{"epoch": 2}', [2], [1, 2, 3]),
    (b'{"epoch": 1}\n{"epoch": 2', [1], []), (b'{"epoch": "1"}\r\n{"epoch": 2}\r\n', [2], [1])])
def test_a_damaged_line_costs_no_other(tmp_path, before, epochs, told):
    """A byte order mark and blank lines are nothing, a last line may be cut, and others that are damaged are told."""
    (tmp_path / "log.jsonl").write_bytes(before)
    lines, damaged = gan.parse_log(tmp_path)
    assert ([line["epoch"] for line in lines], damaged) == (epochs, told)


@pytest.mark.parametrize("name", ["config.json", "log.jsonl", "best.pt", "samples", "last.pt"])
def test_a_new_run_writes_over_nothing_of_others(dataset, tmp_path, name):
    """Which training of gan.py did not write, as its config.json tells."""
    (tmp_path / name).write_text('{"theirs": 1}')
    settings = gan.TrainSettings(data=str(dataset), run=str(tmp_path), width=4, epochs=1, batch_size=16, device="cpu")
    with pytest.raises(gan.UserError, match="another (folder with )?--run"):
        gan.train(settings)
    assert (tmp_path / name).read_text() == '{"theirs": 1}'


def test_files_of_a_long_run_thin_out():
    """Grids: every epoch up to 50, then about 2 % apart, some 250 of 3,000; checkpoints: powers of two; or every so
    many."""
    grids = [epoch for epoch in range(1, 3001) if gan.is_kept(epoch, None, gan.Run.GRIDS_PER_DOUBLING)]
    assert grids[:50] == list(range(1, 51)) and 240 <= len(grids) <= 260
    assert all(later - earlier <= 1 + earlier / 50 for earlier, later in pairwise(grids))
    kept = [epoch for epoch in range(1, 3001) if gan.is_kept(epoch, None, gan.Run.CHECKPOINTS_PER_DOUBLING)]
    assert kept == [2 ** power for power in range(12)]
    assert [epoch for epoch in range(1, 100) if gan.is_kept(epoch, 30, 1)] == [30, 60, 90]


def test_the_demos_run_never_takes_the_place_of_ones_own(tmp_path, monkeypatch):
    """The run saved last is taken, the demo's only where it is alone."""
    monkeypatch.chdir(tmp_path)
    for seconds, name in enumerate(["dcgan", "wgan-gp", "demo"]):
        path = tmp_path / "runs" / name / "last.pt"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (seconds, seconds))
    assert gan.find_run(None) == gan.Path("runs/wgan-gp") and gan.find_run("runs/demo") == gan.DEMO_RUN
    for name in ("dcgan", "wgan-gp"):
        gan.shutil.rmtree(tmp_path / "runs" / name)
    assert gan.find_run(None) == gan.DEMO_RUN


def test_what_is_told_of_a_run_that_is_trained(tmp_path):
    """Its epoch, how many there will be, and the time left at the last one's pace, or until it is ended; nothing of one
    that is over, was ended, has been silent for long, or is none."""
    def told(*seconds: float, silent: float = 0.0, **more):
        lines = [json.dumps({"epoch": epoch, "seconds": one}) + "\n" for epoch, one in enumerate(seconds, 1)]
        (tmp_path / "log.jsonl").write_text("".join(lines))
        now = (tmp_path / "log.jsonl").stat().st_mtime
        os.utime(tmp_path / "log.jsonl", (now - silent, now - silent))
        return gan.training_under_way(tmp_path, **more)
    assert told(5) is None
    (tmp_path / "config.json").write_text('{"settings": {"epochs": 4}}')
    with gan.locked(tmp_path):
        assert told() == {"epoch": 0, "epochs": 4, "seconds_left": None}
        assert told(most=200) == {"epoch": 0, "epochs": 4, "seconds_left": 200}
        left = told(900, 1000, silent=500)
        assert (left["epoch"], left["epochs"]) == (2, 4) and 1400 < left["seconds_left"] <= 1500
        assert told(900, 1000, most=60)["seconds_left"] == 60
        assert [told(5, 5, 5, 5), told(5, 5, most=-1), told(5, 5, silent=100)] == [None] * 3
    assert told(5, 5) is None  # stopped: nobody holds the folder
