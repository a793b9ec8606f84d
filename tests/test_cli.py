"""The command line as a user meets it: real processes where they are interrupted, and one-line errors."""
import ast
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from urllib.request import urlopen

import pytest
from conftest import ROOT
from forked import Forked

import gan


def test_from_photos_to_a_face_in_the_browser(tmp_path, monkeypatch, capsys):
    """prepare → train → interrupted → gone on with → generate → eval, with defaults where there are some."""
    monkeypatch.chdir(tmp_path)
    assert gan.main(["prepare", "--demo", "--size", "32", "--limit", "60"]) == 0
    told = capsys.readouterr().out
    assert "60 faces" in told and "warning: 60 faces are few" in told

    with Forked("train", "--width=4", "--epochs=100000", cwd=tmp_path) as process:
        next(line for line in process.stdout if line.startswith("epoch 2/"))
        process.signal(signal.SIGINT)
        code, told, _ = process.end()
        assert code == 130 and "the same command goes on from there" in told.splitlines()[-1]
    done = json.loads((tmp_path / "runs/wgan-gp/log.jsonl").read_text().splitlines()[-1])["epoch"]
    assert gan.main(["train", "--width=4", f"--epochs={done + 2}"]) == 0
    assert f"going on from runs/wgan-gp/last.pt, epoch {done}" in capsys.readouterr().out

    assert gan.main(["generate", "--count", "3"]) == 0
    assert sorted(path.name for path in (tmp_path / "runs/wgan-gp/generated").iterdir()) == [
        "face-00000.png", "face-00001.png", "face-00002.png"]
    assert (tmp_path / "runs/wgan-gp/generated-grid.png").exists()

    z = gan.sample_latents(3, seed=0)[1].tolist()
    with Forked("eval", "--port=0", cwd=tmp_path) as server:
        url = re.search(r"http://127\.0\.0\.1:\d+/", server.stdout.readline())[0]
        with urlopen(f"{url}generate?values={','.join(map(str, z))}", timeout=60) as answer:
            served = gan.Image.open(answer).convert("RGB")
    with gan.Image.open(tmp_path / "runs/wgan-gp/generated/face-00001.png") as written:
        difference = gan.np.abs(gan.np.asarray(served).astype(int) - gan.np.asarray(written).astype(int))
    assert difference.max() <= 1  # the same face, whichever others were made with it


@pytest.mark.parametrize(("arguments", "code", "words"), [
    (["train", "--epohcs", "3"], 2, "unrecognized arguments: --epohcs"),
    (["train", "--epochs", "0"], 2, "--epochs: 0 is not from 1"),
    (["train", "--epochs", "many"], 2, "'many' is not a whole number"),
    (["train", "--model", "VAE"], 2, "none of DCGAN, WGAN, WGAN-GP"),
    (["train", "--balance", "sometimes"], 2, "'sometimes' is neither accuracy nor half nor a whole number"),
    (["train", "--epoch", "3"], 2, "unrecognized"), (["train", "100"], 2, "unrecognized arguments: 100 (see"),
    (["prepare", "--dataset", "photos/a.jpg", "photos/b.jpg"], 2, "made many words of a pattern, name the folder instead"),
    (["prepare", "--size", "81"], 2, "none of 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256"),
    (["prepare", "--crop", "nan"], 2, "nan is not from 0.05 to 1"),
    (["prepare", "--demo", "--download"], 1, "choose one"),
    (["generate", "--min-abs", "9"], 2, "9 is not from 0.0 to 3.0"),
    ([], 2, "required: command"), (["fly"], 2, "invalid choice"),
    (["train"], 1, "data: make one with `gan.py prepare`, or name yours with --data"),
    (["eval", "--run", "nowhere"], 1, "no run in nowhere"),
    (["train", "--device", "cuda"], 1, "--device cuda is not available")])
def test_mistakes_get_one_line(tmp_path, monkeypatch, capsys, arguments, code, words):
    """What is wrong, in which flag or file, and what to do; 2 for bad usage, 1 for failure; nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gan.torch.cuda, "is_available", lambda: False)
    try:
        result = gan.main(arguments)
    except SystemExit as ended:
        result = ended.code
    error = capsys.readouterr().err
    assert (result, error.count("\n"), list(tmp_path.iterdir())) == (code, 1, [])
    assert words in error


@pytest.mark.parametrize(("command", "name", "low", "high"), [
    ("prepare", "crop", 0.05, 1.0), ("prepare", "per_person", 0, 10**6), ("train", "learning_rate", 1e-7, 1.0),
    ("train", "balance", 1, 1000), ("generate", "min_abs", 0.0, 3.0), ("eval", "port", 0, 65535)])
def test_numbers_are_taken_from_end_to_end(command, name, low, high):
    """Both ends of a setting's range, what lies between, and nothing beyond."""
    def read(value):
        return getattr(gan.make_parser().parse_args([command, f"--{name.replace('_', '-')}={value}"]), name)
    middle = type(low)((low + high) / 2)
    assert [read(value) for value in (low, middle, high)] == [low, middle, high]
    for beyond in (low - 1, high + 1):
        with pytest.raises(SystemExit):
            read(beyond)


PATHS = {("prepare", "dataset"), ("prepare", "data"), ("prepare", "png"), ("train", "data"), ("train", "run"),
         ("train", "checkpoint"), ("train", "start_from"), ("generate", "run"), ("generate", "checkpoint"), ("generate", "out"),
         ("judge", "run"), ("judge", "checkpoint"), ("judge", "data"), ("eval", "run"), ("eval", "checkpoint"),
         ("invert", "photo"), ("invert", "run"), ("invert", "checkpoint"), ("invert", "out"), ("export", "file"),
         ("export", "run"), ("export", "checkpoint")}


def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch):
    """Also behind `=`, where no shell makes it one."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    paths = set()
    for command, (declaration, _, _) in gan.COMMANDS.items():
        needed = [item for item in fields(declaration) if item.metadata["positional"]]
        for item in fields(declaration):
            flag = ["~/x"] if item in needed else [*("x" for _ in needed), f"--{item.name.replace('_', '-')}=~/x"]
            if "str" in str(item.type) and item.metadata["parse"] is os.path.expanduser:
                paths.add((command, item.name))
                assert getattr(gan.make_parser().parse_args([command, *flag]), item.name) == "/home/me/x"
    assert paths >= PATHS


def test_a_link_to_gan_py_finds_its_page(trained, tmp_path):
    """As in ~/bin: `export` writes the page that is beside the file itself."""
    (tmp_path / "gan.py").symlink_to(ROOT / "gan.py")
    done = subprocess.run([sys.executable, "gan.py", "export", "--run", trained, "page.html"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "") and "<html" in (tmp_path / "page.html").read_text("utf-8")


@pytest.mark.skipif(os.name != "posix", reason="closes a file descriptor")
def test_output_may_be_closed_from_the_beginning(trained, tmp_path):
    """As by `>&- 2>&-` or where there is no console: the work is done all the same."""
    def close():
        os.close(1)
        os.close(2)
    done = subprocess.run([sys.executable, ROOT / "gan.py", "generate", "--run", trained, "--count", "1", "--out", "x"],
                          cwd=tmp_path, preexec_fn=close, timeout=100)
    assert done.returncode == 0 and (tmp_path / "x" / "face-00000.png").exists()


@pytest.mark.parametrize("bad", [10, 11])
def test_the_first_ten_skipped_photos_are_listed(tmp_path, capsys, bad):
    """And how many more there are, if any."""
    (tmp_path / "photos").mkdir()
    gan.Image.new("RGB", (64, 64)).save(tmp_path / "photos" / "good.png")
    for number in range(bad):
        (tmp_path / "photos" / f"bad{number}.png").write_text("no photo")
    assert gan.main(["prepare", "--dataset", str(tmp_path / "photos"), "--data", str(tmp_path / "data")]) == 0
    told = capsys.readouterr().out
    assert len(re.findall("^skipped bad", told, re.MULTILINE)) == 10
    assert ("... and 1 more" in told) == (bad == 11)


@pytest.mark.parametrize("flags", [[], ["--model", "wgan-gp"], ["--model", "Wgan-Gp"]])
def test_case_of_a_model_does_not_matter(flags):
    """--model wgan-gp is WGAN-GP, and so is no --model at all."""
    assert gan.make_parser().parse_args(["train", *flags]).model == "WGAN-GP"


def test_a_fault_of_ours_is_not_hidden(monkeypatch):
    """Only what a user can cause becomes one line; a bug keeps its traceback."""
    monkeypatch.setitem(gan.COMMANDS, "train", (gan.TrainSettings, lambda _: 1 // 0, ""))
    with pytest.raises(ZeroDivisionError):
        gan.main(["train"])


def test_every_setting_has_help_and_a_range(capsys):
    """--help of each command shows each flag with its default."""
    for name, (declaration, _, _) in gan.COMMANDS.items():
        with pytest.raises(SystemExit):
            gan.main([name, "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        for item in fields(declaration):
            flag = f"--{item.name.replace('_', '-')}"
            assert (item.metadata["metavar"] if item.metadata["positional"] else flag) in shown
            assert item.default in (None, False, "") or f"(default {item.default})" in shown


def test_import_does_nothing(tmp_path):
    """No folder is made, no device is probed, matplotlib and kagglehub are not loaded."""
    code = ("import sys, gan; print([m for m in ('matplotlib', 'kagglehub') if m in sys.modules], "
            "gan.torch.cuda.is_initialized())")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert (done.stdout, done.stderr, list(tmp_path.iterdir())) == ("[] False\n", "", [])


def test_demo(tmp_path):
    """The page stands from the first moment of training, which is another process, and shows what it has learnt; Ctrl-C
    ends both, saved, and the run stays."""
    gan.prepare(gan.PrepareSettings(demo=True, data=str(tmp_path / gan.DEMO_RUN / "data"), size=32, limit=400))
    with Forked("demo", "--port=0", cwd=tmp_path) as demo:
        lines = iter(demo.stdout.readline, "")
        url = next(found[0] for line in lines if (found := re.search(r"http://127\.0\.0\.1:\d+/", line)))
        trainer = int((tmp_path / gan.DEMO_RUN / "train.lock").read_text())
        assert trainer != demo.pid
        next(line for line in lines if line.startswith("epoch 1/"))

        def learnt() -> dict:
            with urlopen(url + "api/model", timeout=60) as answer:
                return json.load(answer)
        while not (model := learnt())["checkpoints"][0]["epoch"]:  # the file is there when its writer is done
            pass
        assert model["training"]["epochs"] == 24 and 0 < model["training"]["seconds_left"] <= gan.DEMO_SECONDS
        demo.signal(signal.SIGINT)
        code, rest, _ = demo.end()
        assert code == 130 and "stopped in epoch" in rest
    with pytest.raises(ProcessLookupError):
        os.kill(trainer, 0)
    state = gan.read_checkpoint(tmp_path / gan.DEMO_RUN / "last.pt")
    assert (state["progress"]["epoch"], state["progress"]["minibatch"]) > (1, 0)


def test_inline_metadata_lists_the_requirements():
    """`uv run gan.py` installs what requirements.txt does (PEP 723)."""
    source = (ROOT / "gan.py").read_text("utf-8")
    block = re.search(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", source)["content"]
    dependencies = ast.literal_eval(re.search(r"dependencies = (\[.*?\])", block.replace("\n#", ""), re.DOTALL)[1])
    assert dependencies == (ROOT / "requirements.txt").read_text().split()


def test_within_another_process_gan_py_ends_itself_alone(trained, tmp_path):
    """As %run of a notebook starts it, and profilers do; also with -OO, where there are no docstrings."""
    cell = (f"import runpy, sys\nsys.argv = ['gan.py', 'generate', '--run', {str(trained)!r}, '--count=1', '--out=g']\n"
            f"try:\n    runpy.run_path({str(ROOT / 'gan.py')!r}, run_name='__main__')\n"
            "except SystemExit as end:\n    print('it ended with', end.code)")
    done = subprocess.run([sys.executable, "-OO", "-c", cell], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout.endswith("it ended with 0\n") and (tmp_path / "g" / "face-00000.png").exists()


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "2", "RANK": "0"}, {"WORLD_SIZE": "two"}, {"LOCAL_RANK": "-1"}, {
    "WORLD_SIZE": "2", "RANK": "5", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}])
def test_an_environment_of_other_jobs_gets_a_line(trained, dataset, monkeypatch, capsys, environment):
    """As clusters leave it to what is not started by torchrun; what is empty counts as not there."""
    for name, value in {"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": "", "LOCAL_WORLD_SIZE": "", **environment}.items():
        monkeypatch.setenv(name, value)
    assert gan.main(["train", "--data", str(dataset), "--run", str(trained), "--device", "cpu"]) == 1
    told = capsys.readouterr().err
    assert "torchrun" in told and told.count("\n") == 1
    for name in environment:
        monkeypatch.setenv(name, "")
    assert gan.join_ranks(gan.torch.device("cpu")).count == 1


@pytest.mark.parametrize(("command", "flag"), [("train", "--batch-size"), ("generate", "--count"), ("prepare", "--limit")])
def test_what_helps_against_too_little_memory_is_a_flag_of_the_command(monkeypatch, capsys, command, flag):
    """By name."""
    def hungry(settings):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    monkeypatch.setitem(gan.COMMANDS, command, (gan.COMMANDS[command][0], hungry, ""))
    assert gan.main([command]) == 1 and f"out of memory: lower {flag}" in capsys.readouterr().err


def test_auto_is_no_device_that_nobody_has_seen(monkeypatch):
    """Apple's MPS is taken where it is asked for."""
    monkeypatch.setattr(gan.torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(gan.torch.cuda, "is_available", lambda: False)
    assert [gan.pick_device(name).type for name in ("auto", "mps")] == ["cpu", "mps"]
