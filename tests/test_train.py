"""Training: the same as the plain reference, and a run that is broken off and gone on with is as one that was not."""
import copy
import hashlib
import json
import os
import shutil
import signal
import sys
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import pytest
import reference
import torch
from forked import Forked

import gan

MODELS = ["DCGAN", "WGAN", "WGAN-GP"]
CPU = torch.device("cpu")
LONG_TRAINING = ["train", "--run=run", "--width=4", "--epochs=100000", "--save-every=100000", "--device=cpu"]


def settings(dataset, run, **changes):
    return gan.TrainSettings(**{"data": str(dataset), "run": str(run), "width": 4, "epochs": 3, "batch_size": 16,
                                "device": "cpu", "save_every": 1, "keep_every": 2, **changes})


def outcome(run: Path) -> dict:
    """All that two runs must have in common: the checkpoint, the log but for the clock, the pictures."""
    state = gan.read_checkpoint(run / "last.pt")
    state["settings"].pop("run")
    log = [{k: v for k, v in line.items() if k != "seconds"} for line in gan.read_log(run)]
    return {"state": state, "log": log, "pictures": {p.name: p.read_bytes() for p in (run / "samples").iterdir()}}


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(123.0), b.nan_to_num(123.0))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture
def precision(request):
    """Sets the type that networks and random numbers have, and gives it back."""
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("precision", "bound"), [(torch.float64, 1e-10), (torch.float32, 5e-3)],
                         indirect=["precision"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("turn", ["discriminator", "generator"])
def test_one_update_is_the_references(model, turn, precision, bound):
    """Loss, gradients and new weights of one update are the plain implementation's. In float32 the gradients' relative
    difference is about 1e-6, but up to 2e-3 where rounding takes an activation over a rectifier's kink. The first step of
    Adam and RMSprop is as large for a gradient of next to nothing, whose sign is then chance: weights are compared where
    the gradient is more than a hundredth of the layer's largest, as most are."""
    trainer = gan.Trainer(settings("", "", model=model, width=8, balance=1, precision="fp32"), 32, CPU)
    plain = reference.Reference(model, 32, 8)
    plain.copy_weights(trainer.generator, trainer.discriminator)
    start = {name: [weight.detach().clone() for weight in network.parameters()]
             for name, network in trainer.networks.items()}
    real = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    rng = torch.Generator()
    rng.set_state(trainer.rng.get_state())
    z = torch.randn(20, 128, generator=rng)
    near = partial(pytest.approx, rel=min(bound, 1e-5), abs=min(bound, 1e-6))
    trainer.balance.discriminator_left = int(turn == "discriminator")
    trainer.train_minibatch(real.contiguous(memory_format=torch.channels_last))
    row = dict(zip(gan.COLUMNS, trainer.rows[-1].tolist(), strict=True))
    if turn == "discriminator":
        loss = plain.update_discriminator(real, z, torch.rand(20, generator=rng))
        assert row["discriminator_loss"] + row["gradient_penalty"] == near(loss.item())
        trained, other, oracle = trainer.discriminator, trainer.generator, plain.d
    else:
        loss = plain.update_generator(z)
        assert row["generator_loss"] == near(loss.item())
        trained, other, oracle = trainer.generator, trainer.discriminator, plain.g
    assert all(weight.grad is None for weight in other.parameters()), "computed gradients that nobody uses"
    for ours, theirs, before in zip(trained.parameters(), oracle.parameters(), start[turn], strict=True):
        assert (ours.grad - theirs.grad).norm() <= bound * theirs.grad.norm()
        certain = theirs.grad.abs() > 0.01 * theirs.grad.abs().max()
        assert certain.float().mean() > 0.8
        assert (ours - theirs)[certain].abs().max() <= bound * (theirs - before).abs().max()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("turn", ["discriminator", "generator"])
def test_bf16_goes_the_way_of_float32(model, turn):
    """Scores and losses are float32 in both, and an update's gradient points the same way: cosine above 0.99. The
    discriminator of a real run has an offset in its scores, which in bf16 would drown the differences."""
    trainers = [gan.Trainer(settings("", "", model=model, width=16, balance=1, precision=name), 48, CPU)
                for name in ("fp32", "bf16")]
    real = torch.rand(20, 3, 48, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for trainer in trainers:
        trainer.balance.discriminator_left = int(turn == "discriminator")
        trainer.train_minibatch(real)
    rows = [trainer.rows[-1] for trainer in trainers]
    assert rows[1].dtype == torch.float32 and torch.allclose(*rows, rtol=0.05, atol=0.03, equal_nan=True)
    gradients = [torch.cat([weight.grad.flatten() for weight in trainer.networks[turn].parameters()])
                 for trainer in trainers]
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99
    with torch.autocast("cpu", torch.bfloat16):
        scores = trainers[1].discriminator(real)
    assert scores.dtype == torch.float32 and len(set(scores.tolist())) == 20


@pytest.mark.parametrize(("flags", "expected"), [
    ("vendor_id : AuthenticAMD\nflags : fpu avx512f avx512_bf16 sha", "bf16"), ("flags : fpu amx_bf16 amx_tile", "bf16"),
    ("vendor_id : GenuineIntel\nflags : fpu avx512f avx512_bf16 sha", "fp32"),
    ("vendor_id : AuthenticAMD\nflags : fpu avx512f avx512_bf16x", "fp32"), ("", "fp32")])
def test_bf16_where_the_processor_has_it(monkeypatch, flags, expected):
    """As /proc/cpuinfo tells; float32 where there is no such file; what was asked for stays."""
    pick = gan.pick_precision.__wrapped__  # the answer is kept for a process
    monkeypatch.setattr(gan.Path, "read_text", lambda path: flags)
    assert pick("auto", CPU) == expected
    assert [pick(name, CPU) for name in ("fp32", "bf16")] == ["fp32", "bf16"]

    def missing(path):
        raise FileNotFoundError(path)
    monkeypatch.setattr(gan.Path, "read_text", missing)
    assert pick("auto", CPU) == "fp32"


def test_auto_stays_what_it_was_where_the_run_began(monkeypatch):
    """Gone on with on a processor that would choose otherwise, a run is as one that never left; what is asked for by
    name counts, and a checkpoint that tells nothing changes nothing."""
    def trainer(machine: str, **changes) -> gan.Trainer:
        monkeypatch.setattr(gan, "pick_precision", lambda name, _: machine if name == "auto" else name)
        return gan.Trainer(settings("", "", **changes), 32, CPU)
    real = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    began = trainer("fp32")
    began.train_minibatch(real)
    checkpoint = {**began.state(), "settings": {"balance": "accuracy"}}
    moved, named, older = trainer("bf16"), trainer("bf16", precision="bf16"), trainer("bf16")
    for other in (moved, named):
        other.load_state(copy.deepcopy(checkpoint))
    older.load_state({key: value for key, value in checkpoint.items() if key != "precision"})
    assert [other.precision for other in (moved, named, older)] == ["fp32", "bf16", "bf16"]
    for other in (began, moved, named):
        other.train_minibatch(real)
    assert same(moved.state(), began.state()) and not same(named.state()["networks"], began.state()["networks"])


@pytest.mark.parametrize(("flags", "precision"), [({}, "fp32"), ({"precision": "bf16"}, "bf16")])
def test_bf16_is_gone_on_with_where_it_is_fast(monkeypatch, capsys, flags, precision):
    """Elsewhere it takes a hundred times as long: float32 and a line, unless it is asked for."""
    def trainer(machine: str, **changes) -> gan.Trainer:
        monkeypatch.setattr(gan, "pick_precision", lambda name, _: machine if name == "auto" else name)
        return gan.Trainer(settings("", "", **changes), 32, CPU)
    checkpoint = {**trainer("bf16").state(), "settings": {"balance": "accuracy"}}
    moved = trainer("fp32", **flags)
    moved.load_state(checkpoint)
    assert moved.precision == precision and ("--precision" in capsys.readouterr().out) == (not flags)


def control_groups_of(monkeypatch, about: str, **files: str) -> None:
    """Let the system tell this of the control groups of this process, and nothing else."""
    texts = {"/proc/self/cgroup": about, "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    2048 kB\n",
             **{f"/sys/fs/cgroup/{name}": text for name, text in files.items()}}

    def read_text(path, *_):
        if str(path) not in texts:
            raise FileNotFoundError
        return texts[str(path)]
    monkeypatch.setattr(gan.Path, "read_text", read_text)


@pytest.mark.parametrize(("about", "files", "expected"), [
    ("0::/", {"cpu.max": "max 100000"}, 8), ("0::/", {"cpu.max": "250000 100000"}, 2), ("", {"cpu.max": "oops"}, 8),
    ("0::/", {"cpu.max": "50000 100000"}, 1), ("0::/job/step", {"job/step/cpu.max": "max 1", "job/cpu.max": "300 100"}, 3),
    ("3:memory:/x\n2:cpu,cpuacct:/x\n", {"cpu/x/cpu.cfs_quota_us": "500", "cpu/x/cpu.cfs_period_us": "100"}, 5),
    ("2:cpu:/x", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100"}, 8)])
def test_cores_are_those_a_control_group_grants(monkeypatch, about, files, expected):
    """The quota of a container or of a job, and of what is around it, at least one; without one, the cores that the
    process is bound to."""
    monkeypatch.setattr(gan.os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    control_groups_of(monkeypatch, about, **files)
    assert gan.usable_cores() == expected


@pytest.mark.parametrize("precision", [torch.float64], indirect=True)
@pytest.mark.parametrize(("model", "rule"), [("DCGAN", "accuracy"), ("DCGAN", "half"), ("WGAN", "accuracy"),
                                             ("WGAN-GP", "accuracy")])
def test_the_balanced_loop_takes_the_references_turns(model, precision, rule):
    """Twelve minibatches: the same decisions, and weights that stay together."""
    trainer = gan.Trainer(settings("", "", model=model, width=8), 32, CPU)
    plain = reference.Reference(model, 32, 8)
    plain.copy_weights(trainer.generator, trainer.discriminator)
    rng, faces = torch.Generator(), torch.Generator().manual_seed(2)
    rng.set_state(trainer.rng.get_state())
    trainer.balance, turns = gan.Balance(rule, 0.6), set()
    for _ in range(12):
        real = torch.rand(10, 3, 32, 32, generator=faces) * 2 - 1
        trainer.train_minibatch(real)
        z, mix = torch.randn(10, 128, generator=rng), torch.rand(10, generator=rng)
        turn = plain.train_minibatch(real, z, lambda mix=mix: mix, None if rule == "half" else 0.6)
        assert bool(trainer.rows[-1][-1]) == (turn == "discriminator")
        turns.add(turn)
    assert rule == "half" or len(turns) == 2
    for ours, theirs in zip(trainer.discriminator.parameters(), plain.d.parameters(), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize(("images_seen", "half_lives"), [(20_400, 1), (40_800, 0.5), (2_040_000, 0.01)])
def test_averaged_generator_has_the_half_life_it_says(images_seen, half_lives):
    """5 % of the images seen: against the closed form."""
    trainer = gan.Trainer(settings("", ""), 32, CPU)
    with torch.no_grad():
        for value in trainer.averaged.parameters():
            value.zero_()
        for value in trainer.generator.parameters():
            value.fill_(1)
    trainer.progress.images_seen = trainer.progress.averaged_at = images_seen - 1020
    for _ in range(50):
        trainer.progress.count(20, "discriminator")
    trainer.progress.count(20, "generator")  # 1,020 images since the last one
    trainer.move_average()
    for value in trainer.averaged.parameters():
        assert value.mean().item() == pytest.approx(1 - 0.5 ** half_lives, rel=1e-4)


def test_averaged_generator_has_statistics_of_its_own(dataset):
    """After an epoch its first BatchNorm knows the mean and variance that its own weights give, however far the
    averages of those that past weights had are from them."""
    trainer = gan.Trainer(settings("", "", precision="fp32"), 32, CPU)
    trainer.rows.append(torch.zeros(len(gan.COLUMNS)))
    with torch.no_grad():
        trainer.averaged.layers[0].weight.mul_(3)
        trainer.averaged.layers[2].running_var.fill_(7)
    before = copy.deepcopy(trainer.averaged.layers[:2])
    trainer.finish_epoch()
    with torch.no_grad():
        seen = before(gan.sample_latents(20_000, 99)[:, :, None, None])
    norm = trainer.averaged.layers[2]
    assert torch.allclose(norm.running_mean, seen.mean((0, 2, 3)), atol=0.1 * seen.std())
    assert torch.allclose(norm.running_var, seen.var((0, 2, 3)), rtol=0.1)


@pytest.mark.parametrize(("model", "enough", "share"), [
    ("DCGAN", 0.0, 0), ("WGAN", 0.0, 0.5), ("WGAN-GP", 0.0, 0.5),
    ("DCGAN", 1.1, 1), ("WGAN", 1.1, 1), ("WGAN-GP", 1.1, 1)])
def test_training_balances_by_the_rule_of_its_gan(monkeypatch, model, enough, share):
    """A discriminator that is never behind trains after each update of the generator where it is a critic, else never;
    one that is always behind trains on every minibatch."""
    monkeypatch.setattr(gan.Objective, "enough", enough)
    trainer = gan.Trainer(settings("", "", model=model), 32, CPU)
    for _ in range(8):
        trainer.train_minibatch(torch.rand(4, 3, 32, 32) * 2 - 1)
    assert trainer.progress.discriminator_updates == 8 * share == 8 - trainer.progress.generator_updates


class Killed(BaseException):
    """Stands for SIGKILL at an exact moment: nothing in gan.py catches it."""


def die_at(monkeypatch, moment: str, nth: int) -> None:
    """Raise Killed at the nth time that training passes a moment; a log line or a file is half written then."""
    owner, name = {"rename": (gan.os, "replace"), "fsync": (gan.os, "fsync"), "log": (gan, "append_log"),
                   "update": (gan.Trainer, "train_minibatch"), "grid": (gan, "grid_image"),
                   "file": (gan, "whole_file")}[moment]
    real, calls = getattr(owner, name), []

    def dying(*arguments, **options):
        calls.append(0)
        if len(calls) == nth:
            if moment == "log":
                with open(arguments[0] / "log.jsonl", "a") as file:
                    file.write(json.dumps(arguments[1])[:30])
            if moment == "file":
                arguments[0].with_name(f".gan-{arguments[0].name}.1.tmp").write_bytes(b"half of it")
            raise Killed
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, dying)


@pytest.fixture(scope="module")
def unbroken(dataset, tmp_path_factory):
    """Model -> outcome of a run of 3 epochs that nothing disturbed."""
    @cache
    def outcome_of(model: str, precision: str) -> dict:
        run = tmp_path_factory.mktemp("unbroken") / "run"
        assert gan.train(settings(dataset, run, model=model)) == 0
        return outcome(run)
    return lambda model: outcome_of(model, gan.pick_precision("auto", CPU))


@pytest.mark.parametrize(("model", "moment", "times"), [
    ("DCGAN", "fsync", (2, 7, 12, 15)), ("DCGAN", "update", (1, 5, 7, 12)), ("WGAN", "rename", (1, 3, 5, 8, 9, 10, 11)),
    ("WGAN", "grid", (2, 3, 4)), ("WGAN-GP", "file", (2, 3, 4, 5, 6, 7)), ("WGAN-GP", "log", (1, 2))])
def test_killed_at_any_moment_and_gone_on_with_is_as_never_killed(unbroken, dataset, tmp_path, monkeypatch, model,
                                                                  moment, times):
    """Killed several times over, in the middle of what it writes: bit-identical weights, states, log and pictures."""
    run = tmp_path / "run"
    for nth in times:
        with monkeypatch.context() as patch:
            die_at(patch, moment, nth)
            with suppress(Killed):
                gan.train(settings(dataset, run, model=model))
    assert gan.train(settings(dataset, run, model=model)) == 0
    assert same(outcome(run), unbroken(model))
    assert not list(run.rglob(".gan-*"))


@pytest.mark.parametrize(("model", "auto"), [("DCGAN", "bf16"), ("WGAN", "fp32"), ("WGAN-GP", "bf16")], indirect=["auto"])
def test_stopped_in_mid_epoch_it_goes_on_from_that_minibatch(unbroken, dataset, tmp_path, monkeypatch, capsys, model, auto):
    """SIGTERM and Ctrl-C save within a minibatch, exit 143 and 130, and nothing is trained twice."""
    run, real, trained = tmp_path / "run", gan.Trainer.train_minibatch, []

    def interrupted(trainer, *arguments):
        trained.append(trainer.progress.images_seen)
        if len(trained) in (3, 8):
            signal.raise_signal(signal.SIGTERM if len(trained) == 3 else signal.SIGINT)
        return real(trainer, *arguments)

    monkeypatch.setattr(gan.Trainer, "train_minibatch", interrupted)
    assert [gan.train(settings(dataset, run, model=model)) for _ in range(3)] == [143, 130, 0]
    assert trained == list(range(0, 3 * 64, 16))
    assert "stopped in epoch 1 and saved; the same command goes on" in capsys.readouterr().out
    assert same(outcome(run), unbroken(model))


def test_faces_of_a_run_that_was_stopped_are_of_its_weights(dataset, tmp_path, monkeypatch):
    """In the middle of its first epoch, too, the averaged generator is saved with BatchNorm statistics of its own: those
    of the untrained one would make white faces. To take them anew changes nothing."""
    real = gan.Trainer.train_minibatch

    def interrupted(trainer, *arguments):
        real(trainer, *arguments)
        if trainer.progress.generator_updates == 1:  # its second minibatch of four
            signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(gan.Trainer, "train_minibatch", interrupted)
    assert gan.train(settings(dataset, tmp_path / "run", balance=1, precision="fp32", learning_rate=0.01)) == 130
    saved = gan.load_generator(tmp_path / "run" / "last.pt", CPU)[0].train()
    anew = copy.deepcopy(saved)
    gan.update_bn(gan.sample_latents(gan.STATISTICS_FACES, 2).split(50), anew)
    for ours, theirs in zip(saved.buffers(), anew.buffers(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("number", "code"), [(1, 129), (signal.SIGINT, 130), (signal.SIGTERM, 143)])  # 1: SIGHUP
def test_a_real_signal_to_a_real_process(dataset, tmp_path, number, code):
    """A training process that is signalled after its first epoch exits with the code of the signal, saved."""
    with Forked(*LONG_TRAINING, "--data", dataset, cwd=tmp_path) as process:
        next(line for line in process.stdout if line.startswith("epoch 1/"))
        process.signal(number)
        ended, out, err = process.end()
    assert ended == code and "and saved" in out and "Traceback" not in err
    assert gan.read_checkpoint(tmp_path / "run" / "last.pt")["progress"]["images_seen"] > 0


@pytest.mark.parametrize("how", ["pipe", "terminal"])
def test_training_outlives_the_reader_of_its_output(dataset, tmp_path, how):
    """`train | head -1`, or a terminal that was closed: it trains to the end, with progress bar or without."""
    ours, theirs = os.openpty() if how == "terminal" else os.pipe()
    with Forked("train", "--data", dataset, "--run=run", "--width=4", "--epochs=3", "--batch-size=16", "--device=cpu",
                cwd=tmp_path, outputs=(theirs, theirs)) as process:
        os.close(theirs)
        told = b""
        while b"starting a new run" not in told:
            told += os.read(ours, 4096)
        os.close(ours)
        assert process.wait() == 0
    assert [line["epoch"] for line in gan.read_log(tmp_path / "run")] == [1, 2, 3]
    assert gan.read_checkpoint(tmp_path / "run" / "last.pt")["progress"]["epoch"] == 3


def test_ctrl_c_into_a_pipe_saves(dataset, tmp_path):
    """In `train | tee log` it ends tee, too: the run is saved and the exit code is 130, though nobody reads that."""
    with Forked(*LONG_TRAINING, "--data", dataset, cwd=tmp_path) as process:
        next(line for line in process.stdout if line.startswith("epoch 1/"))
        process.stdout.close()
        process.signal(signal.SIGINT)
        assert process.stderr.read() == "" and process.wait() == 130
    assert gan.read_checkpoint(tmp_path / "run" / "last.pt")["progress"]["images_seen"] > 0


def test_a_second_signal_ends_at_once():
    """With the signal's exit code: the first has the run saved, the second does not wait."""
    with gan.StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.code == 130
        with pytest.raises(SystemExit, match="143"):
            signal.raise_signal(signal.SIGTERM)


def test_the_run_folder_holds_what_is_promised(trained, dataset):
    """config.json, a log line an epoch, grids of real, untrained and each epoch's faces, curves, checkpoints."""
    names = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file()}
    grids = {f"samples/epoch-{epoch:05d}.png" for epoch in range(5)} | {"samples/real.png"}
    assert names == grids | {"config.json", "log.jsonl", "curves.png", "last.pt", "previous.pt", "epoch-00002.pt",
                             "epoch-00004.pt", "train.lock"}
    log = gan.read_log(trained)
    assert [(line["epoch"], line["images_seen"]) for line in log] == [(e, 64 * e) for e in (1, 2, 3, 4)]
    for line in log:
        assert line["discriminator_updates"] + line["generator_updates"] == line["images_seen"] // 16
        assert all(0 <= line[f"{name}_accuracy"] <= 1 for name in ("discriminator", "generator"))
        assert 0 <= line["discriminator_share"] <= 1
    assert log[-1]["discriminator_updates"] == pytest.approx(4 * sum(line["discriminator_share"] for line in log))
    config = json.loads((trained / "config.json").read_text())
    assert config["settings"]["width"] == 4 and config["image_size"] == 32
    with gan.Image.open(trained / "samples" / "epoch-00004.png") as grid:
        assert grid.size == (342, 342)
        first = torch.from_numpy(gan.np.asarray(grid.crop((2, 2, 34, 34))).copy()).permute(2, 0, 1)
    generator, _ = gan.load_generator(trained / "last.pt", CPU)
    assert torch.equal(first, gan.sample_images(generator, gan.sample_latents(100, 0))[0])
    with gan.Image.open(trained / "samples" / "real.png") as grid:
        first = torch.from_numpy(gan.np.asarray(grid.crop((2, 2, 34, 34))).copy()).permute(2, 0, 1)
    assert torch.equal(first, gan.load_faces(dataset)[0][0])


def test_each_epoch_sees_every_face_once_in_another_order(dataset, tmp_path, monkeypatch):
    """The order is reshuffled each epoch from the seed."""
    seen, real = [], gan.Trainer.train_minibatch

    def seeing(trainer, faces):
        seen.append(faces.flatten(1).sum(1))
        real(trainer, faces)

    monkeypatch.setattr(gan.Trainer, "train_minibatch", seeing)
    gan.train(settings(dataset, tmp_path / "run", epochs=2))
    sums = gan.to_face(gan.load_faces(dataset)[0]).flatten(1).sum(1)
    epochs = torch.cat(seen).view(2, 64)
    assert not torch.equal(*epochs)
    for epoch in epochs:
        assert torch.allclose(epoch.sort()[0], sums.sort()[0], rtol=1e-4, atol=1e-2)


def test_an_epoch_can_be_begun_at_any_minibatch(dataset):
    """The rest of an epoch is what it would have been; epochs, seeds and the rest that fills no minibatch differ."""
    faces = gan.TrainingFaces(dataset, 10, 0, CPU)
    whole = list(faces.epoch(3))
    assert len(whole) == faces.minibatches == 6
    assert whole[0].shape == (10, 3, 32, 32) and whole[0].dtype == torch.float32
    assert same(list(faces.epoch(3, 4)), whole[4:]) and list(faces.epoch(3, 6)) == []

    def seen(epoch: int) -> set[bytes]:
        return {face.numpy().tobytes() for real in faces.epoch(epoch) for face in gan.to_image(real).contiguous()}
    assert len(seen(3)) == len(seen(4)) == 60 and len(seen(3) | seen(4)) > 60
    assert not same(list(gan.TrainingFaces(dataset, 10, 1, CPU).epoch(3)), whole)
    assert gan.TrainingFaces(dataset, 100, 0, CPU).batch_size == 64


def test_the_order_of_an_epoch_is_what_it_has_always_been(dataset):
    """Old runs go on in it: a permutation of all faces from the seed and the epoch, every second face mirrored."""
    order = torch.randperm(64, generator=gan.random_stream("order of epoch 7", 3))
    expected = gan.to_face(gan.load_faces(dataset)[0][order[:10]])
    expected[::2] = expected[::2].flip(3)
    assert same(next(gan.TrainingFaces(dataset, 10, 3, CPU).epoch(7)), expected)


def test_half_of_a_minibatch_is_mirrored_and_each_face_now_and_then(dataset):
    """As it lies on disk or mirrored, never otherwise; the same for one process as for three."""
    faces = gan.TrainingFaces(dataset, 10, 0, CPU)
    known = {gan.to_face(images).numpy().tobytes(): number for number, images in enumerate(gan.load_faces(dataset)[0])}
    mirrored = set()
    for epoch in range(10):
        for real in faces.epoch(epoch):
            straight = [face.numpy().tobytes() in known for face in real.contiguous()]
            assert sum(straight) == 5
            mirrored |= {known[face.flip(2).contiguous().numpy().tobytes()] for face, as_is in zip(real, straight)
                         if not as_is}
    assert len(mirrored) == 64
    parts = [gan.TrainingFaces(dataset, 10, 0, CPU, gan.Ranks(number, 3)) for number in range(3)]
    assert same([torch.cat(shares) for shares in zip(*(part.epoch(2) for part in parts))], list(faces.epoch(2)))


def test_faces_that_do_not_fit_are_mapped_from_one_file(judged_data, tmp_path, monkeypatch):
    """Unpacked once, and again where the dataset is another one; the same faces and epochs as those in memory."""
    data = tmp_path / "data"
    gan.shutil.copytree(judged_data, data, ignore=gan.shutil.ignore_patterns(".gan-*"))  # what others unpacked
    resident, held_out = gan.TrainingFaces(data, 20, 0, CPU), gan.load_faces(data, "held_out")[0]
    read, read_batch = [], gan.read_batch
    monkeypatch.setattr(gan, "read_batch", lambda *which: read.append(which[2]["file"]) or read_batch(*which))
    monkeypatch.setattr(gan, "free_memory", lambda device: 2 * resident.images.numel())  # half of it is not enough
    for _ in range(2):
        mapped = gan.TrainingFaces(data, 20, 0, CPU)
        assert torch.equal(mapped.images, resident.images) and mapped.files == resident.files
        assert same([list(mapped.epoch(number, 3)) for number in (0, 1)],
                    [list(resident.epoch(number, 3)) for number in (0, 1)])
        assert sorted(read) == [file["file"] for file in mapped.files]
    unpacked, = data.glob(".gan-*")
    assert unpacked.read_bytes() == resident.images.numpy().tobytes()
    assert sys.platform != "linux" or str(unpacked) in Path("/proc/self/maps").read_text()
    monkeypatch.setattr(gan, "free_memory", lambda device: 0)
    assert torch.equal(gan.load_faces(data, "held_out")[0], held_out)
    gan.prepare(gan.PrepareSettings(demo=True, data=str(data), size=32, limit=64))
    assert not list(data.glob(".gan-*"))
    assert torch.equal(gan.TrainingFaces(data, 20, 0, CPU).images, resident.images[:64])


def test_a_run_on_mapped_faces_is_as_one_in_memory(judged_data, tmp_path, monkeypatch):
    """Weights, log, scores and pictures."""
    data = tmp_path / "data"
    gan.shutil.copytree(judged_data, data, ignore=gan.shutil.ignore_patterns(".gan-*"))  # what others unpacked
    assert gan.train(settings(data, tmp_path / "resident", epochs=1, batch_size=100)) == 0
    monkeypatch.setattr(gan, "free_memory", lambda device: 0)
    assert gan.train(settings(data, tmp_path / "mapped", epochs=1, batch_size=100)) == 0
    resident, mapped = (outcome(tmp_path / name) for name in ("resident", "mapped"))
    assert "scores" in mapped["log"][-1] and same(resident, mapped)


@pytest.mark.parametrize("memory", [10**9, 0], ids=["resident", "mapped"])
def test_a_damaged_file_of_faces_is_named(judged_data, tmp_path, monkeypatch, memory):
    """In one line, before anything of a run is written, and what was unpacked until then does not stay; mended, it is
    read."""
    data = tmp_path / "data"
    gan.shutil.copytree(judged_data, data, ignore=gan.shutil.ignore_patterns(".gan-*"))  # what others unpacked
    monkeypatch.setattr(gan, "free_memory", lambda device: memory)
    name = gan.read_manifest(data)["batches"][3]["file"]
    whole = (data / name).read_bytes()
    (data / name).write_bytes(whole[:-1])
    with pytest.raises(gan.UserError, match=name):
        gan.train(settings(data, tmp_path / "run", epochs=1))
    assert not list(data.glob(".gan-*")) and not (tmp_path / "run").exists()
    (data / name).write_bytes(whole)
    assert len(gan.TrainingFaces(data, 20, 0, CPU).images) == 200


MEGABYTE = {"memory.max": "1048576"}


@pytest.mark.parametrize(("about", "files", "processes", "free"), [
    ("0::/", {"memory.max": "max"}, "1", 2048), ("0::/", MEGABYTE, "1", 1024), ("0::/", {"memory.max": "max"}, "2", 1024),
    ("0::/", MEGABYTE | {"memory.current": "524288"}, "", 512),
    ("0::/", MEGABYTE | {"memory.current": "524288", "memory.stat": "a 1\ninactive_file 262144\nb 2"}, "1", 768),
    ("0::/job", {"job/memory.max": "max", **MEGABYTE, "memory.current": "9999999"}, "1", 0),
    ("4:memory:/x", {"memory/x/memory.limit_in_bytes": "1048576", "memory/x/memory.usage_in_bytes": "1024"}, "1", 1023)])
def test_half_of_what_is_free_is_for_faces(monkeypatch, about, files, processes, free):
    """What Linux calls available, at most what a container or a job may still have, divided among the processes."""
    control_groups_of(monkeypatch, about, **files)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert gan.free_memory(CPU) == free * 1024


def test_no_more_epochs_than_are_done(trained, dataset, capsys):
    """Says so and succeeds."""
    assert gan.train(settings(dataset, trained, epochs=4)) == 0
    assert "has 4 epochs already: ask for more with --epochs" in capsys.readouterr().out


@pytest.mark.parametrize(("change", "words"), [({"width": 8}, "--width 4 (now 8)"),
                                               ({"model": "DCGAN"}, "--model WGAN-GP"),
                                               ({"seed": 1}, "--seed 0 (now 1)"),
                                               ({"batch_size": 8}, "--batch-size 16")])
def test_other_settings_than_the_checkpoints_are_named(trained, dataset, change, words):
    """Settings that a run cannot change are refused by name, before anything is written."""
    before = (trained / "config.json").read_bytes()
    with pytest.raises(gan.UserError) as error:
        gan.train(settings(dataset, trained, epochs=9, **change))
    assert words in str(error.value) and (trained / "config.json").read_bytes() == before


def test_other_faces_than_the_run_began_with_are_refused(trained, tmp_path):
    """Naming a file of the dataset that was not there then."""
    gan.prepare(gan.PrepareSettings(demo=True, data=str(tmp_path), size=32, limit=64, seed=5))
    with pytest.raises(gan.UserError, match=r"the faces changed since .*faces-00000-.*pt\.gz was not among"):
        gan.train(settings(tmp_path, trained, epochs=9))


def test_the_same_faces_packed_otherwise_are_the_same(trained, dataset, tmp_path, monkeypatch):
    """As by another version of torch: a run goes on and is judged by them. A run of before knows its faces by their
    packed bytes, as a dataset of before does."""
    save = torch.save
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda *what: save(*what, _use_new_zipfile_serialization=False))
        gan.prepare(gan.PrepareSettings(demo=True, data=str(tmp_path / "data"), size=32, limit=64))
    before, after = (gan.read_manifest(data)["batches"] for data in (dataset, tmp_path / "data"))
    assert [batch["sha256"] for batch in before] != [batch["sha256"] for batch in after]
    gan.shutil.copytree(trained, tmp_path / "run")
    assert gan.train(settings(tmp_path / "data", tmp_path / "run", epochs=5)) == 0
    facts = gan.load_generator(tmp_path / "run" / "last.pt", CPU)[1]
    assert gan.holds_faces(dataset, facts) and gan.holds_faces(tmp_path / "data", facts)
    facts["faces"] = [batch["sha256"] for batch in before]
    assert gan.holds_faces(dataset, facts) and not gan.holds_faces(tmp_path / "data", facts)


def test_a_new_run_begins_with_the_networks_of_another(dataset, tmp_path, monkeypatch, capsys, auto):
    """--start-from: weights and statistics of all three networks, how many images they saw, by which fine detail goes on as it
    ended there, and nothing else; what they were is told in a line and kept in config.json and the checkpoints, also when the
    run goes on."""
    first, run, found, critics = tmp_path / "first", tmp_path / "run", [], []
    path, real = first / "epoch-00002.pt", gan.training_loop
    assert gan.train(settings(dataset, first, epochs=2)) == 0
    state = gan.read_checkpoint(path)
    state["progress"].update(images_seen=60_000, images_before=40_000)
    gan.write_checkpoint(path, state)

    def beginning(trainer, *arguments):
        found.append(copy.deepcopy(trainer.state()))
        critics.append(trainer.discriminator)
        return real(trainer, *arguments)
    monkeypatch.setattr(gan, "training_loop", beginning)
    gan.prepare(gan.PrepareSettings(demo=True, data=str(tmp_path / "few"), size=32, limit=20, seed=5))
    assert gan.train(settings(tmp_path / "few", run, epochs=1, start_from=str(path))) == 0
    assert f"beginning with the networks of {path}, epoch 2" in capsys.readouterr().out
    new = gan.Trainer(settings("", ""), 32, CPU).state()
    new["progress"]["images_before"] = 100_000
    assert same(found[0]["networks"], gan.read_checkpoint(path)["networks"])
    assert same({**found[0], "networks": 0}, {**new, "networks": 0})
    origin = {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "run": str(first), "epoch": 2}
    assert gan.train(settings(tmp_path / "few", run, epochs=2)) == 0
    assert [critic.detail.gain.item() for critic in critics] == [pytest.approx(0.3)] * 2
    assert gan.read_checkpoint(run / "last.pt")["started_from"] == origin
    assert json.loads((run / "config.json").read_text())["started_from"] == origin
    assert [line["epoch"] for line in gan.read_log(run)] == [1, 2]


def test_a_run_that_was_begun_with_chance_has_no_origin(trained, dataset):
    """Its checkpoints say so, and it cannot get one later."""
    assert gan.read_checkpoint(trained / "last.pt")["started_from"] is None
    with pytest.raises(gan.UserError, match="was begun with networks of its own"):
        gan.train(settings(dataset, trained, epochs=9, start_from=str(trained / "last.pt")))


@pytest.mark.parametrize(("changes", "words"), [
    ({"width": 8}, "last.pt has --width 4 (here 8): its networks do not fit"),
    ({"model": "DCGAN"}, "last.pt has --model WGAN-GP (here DCGAN): its networks do not fit"),
    ({"size": 40}, "last.pt has --size 32 (here 40): its networks do not fit"),
    ({"file": "config.json"}, "config.json is damaged or no checkpoint of gan.py"),
    ({"file": "."}, "cannot read "), ({"file": "no.pt"}, "no.pt: No such file")])
def test_networks_that_do_not_fit_are_refused(trained, dataset, tmp_path, changes, words):
    """In one line, and no run is begun."""
    path, size = trained / changes.pop("file", "last.pt"), changes.pop("size", 32)
    if size != 32:
        gan.prepare(gan.PrepareSettings(demo=True, data=str(tmp_path / "data"), size=size, limit=20))
        dataset = tmp_path / "data"
    with pytest.raises(gan.UserError) as error:
        gan.train(settings(dataset, tmp_path / "run", start_from=str(path), **changes))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run" / "config.json").exists() and not list((tmp_path / "run").glob("*.pt"))


def test_a_run_of_before_goes_on(trained, dataset, tmp_path):
    """One whose generator did not hear z at every scale: what the optimizer knew of each weight is still of that weight."""
    state = gan.read_checkpoint(trained / "last.pt")
    names = [name for name, _ in gan.Generator(32, 4).named_parameters()]
    kept = [name for name in names if "by_z" not in name]
    moments = state["optimizers"]["generator"]["state"]
    expected = {name: moments[names.index(name)]["exp_avg_sq"] for name in kept}
    state["optimizers"]["generator"]["state"] = {i: moments[names.index(name)] for i, name in enumerate(kept)}
    for network in ("generator", "averaged"):
        state["networks"][network] = {k: v for k, v in state["networks"][network].items() if "by_z" not in k}
    trainer = gan.Trainer(settings(dataset, tmp_path), 32, CPU)
    trainer.load_state(state)
    weights = dict(trainer.generator.named_parameters())
    assert {name: trainer.optimizers["generator"].state[weights[name]]["exp_avg_sq"].tolist() for name in kept} == {
        name: moment.tolist() for name, moment in expected.items()}
    shutil.copytree(trained, tmp_path / "run")
    gan.write_checkpoint(tmp_path / "run" / "last.pt", state)
    assert gan.train(settings(dataset, tmp_path / "run", epochs=5)) == 0
    assert gan.read_checkpoint(tmp_path / "run" / "last.pt")["networks"]["averaged"]["layers.2.by_z"].any()


def test_going_on_from_a_kept_checkpoint(unbroken, dataset, tmp_path):
    """--checkpoint 2 goes back to epoch 2 and ends where the run ended the first time."""
    run = tmp_path / "run"
    for which in (None, "2"):
        assert gan.train(settings(dataset, run, model="WGAN", checkpoint=which)) == 0
    result = outcome(run)
    assert result["state"]["settings"].pop("checkpoint") == "2"
    result["state"]["settings"]["checkpoint"] = None
    assert same(result, unbroken("WGAN"))


def test_killed_after_going_back_it_goes_on_from_there(unbroken, dataset, tmp_path, monkeypatch):
    """From the checkpoint that was named, not from the end that was left, though nothing was saved since; the log is
    cut after that."""
    run = tmp_path / "run"
    gan.train(settings(dataset, run))
    with monkeypatch.context() as patch:
        die_at(patch, "log", 1)
        with suppress(Killed):
            gan.train(settings(dataset, run, checkpoint="2"))
    assert gan.train(settings(dataset, run)) == 0
    assert same(outcome(run), unbroken("WGAN-GP"))


@pytest.mark.parametrize("lost", ["samples", "log", "run"])
def test_what_is_tidied_away_in_mid_run_costs_no_epoch(dataset, tmp_path, monkeypatch, capsys, lost):
    """Pictures cost a line at most; where the log cannot be written the run ends, and what it learnt is saved."""
    run, real = tmp_path / "run", gan.append_log

    def tidy(path, line):
        if line["epoch"] == 2:
            if lost == "log":
                (run / "log.jsonl").unlink()
                (run / "log.jsonl").mkdir()
            else:
                gan.shutil.rmtree(run / "samples" if lost == "samples" else run)
        real(path, line)
    monkeypatch.setattr(gan, "append_log", tidy)
    code = gan.main(["train", "--data", str(dataset), "--run", str(run), "--width", "4", "--batch-size", "16", "--epochs",
                     "3", "--device", "cpu"])
    assert code == (lost != "samples") and gan.read_checkpoint(run / "last.pt")["progress"]["epoch"] == 3 - code
    assert "Traceback" not in capsys.readouterr().err and (code or (run / "samples" / "epoch-00002.png").exists())


@pytest.mark.parametrize("stopped", [False, True], ids=["epoch", "stopped"])
@pytest.mark.parametrize("victim", ["loss", "weights"])
def test_numbers_that_are_not_finite_stop_the_run(dataset, tmp_path, monkeypatch, victim, stopped):
    """At the end of an epoch, or when the run is stopped before: with the epoch, the network, and the command that goes
    on from the last good kept checkpoint; nothing bad is saved."""
    real = gan.Trainer.train_minibatch

    def poisoned(trainer, *arguments):
        real(trainer, *arguments)
        if trainer.progress.images_seen >= 16 * 10:  # from minibatch 2 of epoch 3 on
            if victim == "loss":
                trainer.rows[-1][2] = float("nan")
            else:
                next(trainer.averaged.parameters()).data[0] = float("inf")
            if stopped:
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(gan.Trainer, "train_minibatch", poisoned)
    run = tmp_path / "run"
    with pytest.raises(gan.UserError) as error:
        gan.train(settings(dataset, run))
    text = str(error.value)
    assert "epoch 3" in text and f"train --run {run} --checkpoint 2" in text
    for words in ("loss of the discriminator", "minibatch 2") if victim == "loss" else ("weights of the averaged",):
        assert words in text
    assert gan.read_checkpoint(run / "last.pt")["progress"]["epoch"] == 2


def test_out_of_memory_is_one_line(dataset, tmp_path, monkeypatch, capsys):
    """That names the flags to lower, exit 1."""
    def hungry(*_):
        return torch.empty(2 ** 60)

    monkeypatch.setattr(gan.Trainer, "train_minibatch", hungry)
    assert gan.main(["train", "--data", str(dataset), "--run", str(tmp_path / "run"), "--width", "4"]) == 1
    assert "lower --batch-size or --width" in capsys.readouterr().err


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_training_on_a_gpu_goes_on_on_a_cpu(dataset, tmp_path):
    """A run begun on CUDA is finished on the CPU, and back."""
    for epochs, device in ((1, "cuda"), (2, "cpu"), (3, "cuda")):
        assert gan.train(settings(dataset, tmp_path / "run", epochs=epochs, device=device)) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on file sizes")
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(trained, dataset, tmp_path):
    """A limit on the size of files stands for a full disk: exit 1, the path and the reason, last.pt whole."""
    run = tmp_path / "run"
    gan.shutil.copytree(trained, run)
    limit = (run / "last.pt").stat().st_size * 9 // 10
    code = (f"import resource, signal, sys, gan; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); sys.exit(gan.main(sys.argv[1:]))")
    with Forked("train", "--data", dataset, "--run", run, "--width=4", "--batch-size=16", "--epochs=6", "--save-every=1",
                "--device=cpu", cwd=tmp_path, code=code) as process:
        ended, _, errors = process.end()
    assert ended == 1 and "last.pt: File too large" in errors and errors.count("\n") == 1
    assert gan.read_checkpoint(run / "last.pt")["progress"]["epoch"] >= 4 and not list(run.glob(".gan-*"))
    assert gan.main(["generate", "--run", str(run), "--count=1", "--out", str(tmp_path / "faces")]) == 0
