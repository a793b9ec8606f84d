"""Training: the same as the plain reference, and a run that is broken off and gone on with is as one that was not."""
import copy
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import reference
import torch
from conftest import run_gan
from torch.utils._python_dispatch import TorchDispatchMode

import gan

MODELS = ["DCGAN", "WGAN", "WGAN-GP"]
CPU = torch.device("cpu")


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
    pair = gan.Pair(settings("", "", model=model, width=8, balance=1, precision="fp32"), 32, CPU)
    plain = reference.Reference(model, 32, 8)
    plain.copy_weights(pair.generator, pair.discriminator)
    start = {name: [weight.detach().clone() for weight in network.parameters()]
             for name, network in pair.networks().items()}
    real = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    draws = torch.Generator()
    draws.set_state(pair.random.get_state())
    z = torch.randn(20, 128, generator=draws)
    near = partial(pytest.approx, rel=min(bound, 1e-5), abs=min(bound, 1e-6))
    pair.balance.discriminator_left = int(turn == "discriminator")
    row = pair.train_on(real.contiguous(memory_format=torch.channels_last))
    row = dict(zip(gan.COLUMNS, row.tolist(), strict=True))
    if turn == "discriminator":
        loss = plain.update_discriminator(real, z, torch.rand(20, generator=draws))
        assert row["discriminator_loss"] + row["gradient_penalty"] == near(loss.item())
        trained, other, oracle = pair.discriminator, pair.generator, plain.d
    else:
        loss = plain.update_generator(z)
        assert row["generator_loss"] == near(loss.item())
        trained, other, oracle = pair.generator, pair.discriminator, plain.g
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
    pairs = [gan.Pair(settings("", "", model=model, width=16, balance=1, precision=name), 48, CPU)
             for name in ("fp32", "bf16")]
    for pair in pairs:
        pair.balance.discriminator_left = int(turn == "discriminator")
    real = torch.rand(20, 3, 48, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    rows = [pair.train_on(real) for pair in pairs]
    assert torch.allclose(*rows, rtol=0.05, atol=0.03, equal_nan=True)
    gradients = [torch.cat([weight.grad.flatten() for weight in pair.networks()[turn].parameters()]) for pair in pairs]
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99
    with torch.autocast("cpu", torch.bfloat16):
        scores = pairs[1].discriminator(real)
    assert scores.dtype == torch.float32 and len(set(scores.tolist())) == 20


@pytest.mark.parametrize(("flags", "expected"), [
    ("flags : fpu avx2 avx512f avx512_bf16 sha", "bf16"), ("flags : fpu amx_bf16 amx_tile", "bf16"),
    ("flags : fpu avx2 avx512f avx512_bf16x", "fp32"), ("", "fp32")])
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


@pytest.mark.parametrize(("quota", "expected"), [
    ("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("oops", 8)])
def test_cores_are_those_a_container_grants(monkeypatch, quota, expected):
    """The quota of cgroup 2, at least one; without one, the cores that the process is bound to."""
    monkeypatch.setattr(gan.os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(gan.Path, "read_text", lambda path: quota)
    assert gan.usable_cores() == expected


def test_the_writer_keeps_order_and_tells_failures():
    """Jobs run one after the other; after a failure no more do, and it reaches who asks next, who waits, or the end; it
    hides no other."""
    done = []
    with gan.Writer() as writer:
        for number in range(20):
            writer.ask(done.append, number)
        writer.finish()
        assert done == list(range(20))

    def full(path):
        raise gan.UserError(f"cannot write {path}")

    def ask_again(writer):
        writer.waiting[-1].exception()  # waits until it has failed
        writer.ask(done.append, "never")

    for afterwards in (ask_again, gan.Writer.finish, lambda writer: None):
        with pytest.raises(gan.UserError, match="cannot write x"), gan.Writer() as writer:
            gate = threading.Event()
            writer.ask(gate.wait)
            writer.ask(full, "x")
            writer.ask(done.append, "never")
            gate.set()
            afterwards(writer)
    assert "never" not in done
    with pytest.raises(KeyError), gan.Writer() as writer:
        writer.ask(full, "x")
        raise KeyError


@pytest.mark.parametrize("precision", [torch.float64], indirect=True)
@pytest.mark.parametrize("rule", ["accuracy", "half"])
@pytest.mark.parametrize("model", MODELS)
def test_the_balanced_loop_takes_the_references_turns(model, precision, rule):
    """Twelve minibatches: the same decisions, and weights that stay together."""
    pair = gan.Pair(settings("", "", model=model, width=8), 32, CPU)
    plain = reference.Reference(model, 32, 8)
    plain.copy_weights(pair.generator, pair.discriminator)
    draws, faces = torch.Generator(), torch.Generator().manual_seed(2)
    draws.set_state(pair.random.get_state())
    pair.balance, turns = gan.Balance(rule, 0.6), set()
    for _ in range(12):
        real = torch.rand(20, 3, 32, 32, generator=faces) * 2 - 1
        row = pair.train_on(real)
        turn = plain.train_on(real, torch.randn(20, 128, generator=draws), lambda: torch.rand(20, generator=draws),
                              None if rule == "half" else 0.6)
        assert bool(row[-1]) == (turn == "discriminator")
        turns.add(turn)
    assert rule == "half" or len(turns) == 2
    for ours, theirs in zip(pair.discriminator.parameters(), plain.d.parameters(), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def tensors(value) -> list[torch.Tensor]:
    if isinstance(value, dict | list | tuple):
        return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in tensors(item)]
    return [value] if isinstance(value, torch.Tensor) else []


class Recorder(TorchDispatchMode):
    """Stands for CUDA graphs on a CPU: logs the tensor operations of a step and repeats them on the same memory. What
    Python does besides is not repeated, and reading a number back is an error, as in a real recording."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        assert "_local_scalar_dense" not in str(function), "a recorded step waits for the device"
        result = function(*arguments, **options or {})
        self.operations.append((function, arguments, options or {}, result))
        return result

    def replay(self, name, operations) -> None:
        self.replayed.add(name)
        for function, arguments, options, before in operations:
            now = function(*arguments, **options)
            for old, new in zip(tensors(before), tensors(now), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def record(self, steps: dict) -> dict:
        replays, self.replayed = {}, set()
        for name, step in steps.items():
            self.operations = []
            with self:
                step()
            replays[name] = partial(torch.no_grad()(self.replay), name, self.operations)
        return replays


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_recorded_steps_do_what_plain_ones_do(model, precision):
    """A pair whose steps are recorded after some minibatches stays bit-identical to one whose steps are not: nothing
    that a step needs is outside the memory that it always reads."""
    plain, recorded = (gan.Pair(settings("", "", model=model, width=8, precision=precision), 32, CPU) for _ in range(2))
    plain.balance, recorded.balance = gan.Balance(1), gan.Balance(1)  # each in turn, later by accuracy: all steps
    faces = torch.Generator().manual_seed(3)
    recorder = Recorder()
    for minibatch in range(25):
        real = torch.rand(20, 3, 32, 32, generator=faces) * 2 - 1
        if minibatch == 4:
            parts = [*recorded.networks().values(), *recorded.optimizers.values()]
            memory = tensors([part.state_dict() for part in parts])
            before = [tensor.clone() for tensor in memory]
            recorded.record_steps(recorder.record)
            for tensor, value in zip(memory, before, strict=True):  # a CPU cannot record without running
                tensor.copy_(value)
        if minibatch == 8:
            plain.balance, recorded.balance = gan.Balance("half"), gan.Balance("half")
        rows = [pair.train_on(real) for pair in (plain, recorded)]
        assert same(*rows)
    assert recorder.replayed == set(recorded.steps)
    assert same(plain.state(), recorded.state())


@pytest.mark.parametrize(("images_seen", "half_lives"), [(20_400, 1), (40_800, 0.5), (2_040_000, 0.01)])
def test_averaged_generator_has_the_half_life_it_says(images_seen, half_lives):
    """5 % of the images seen, BatchNorm statistics averaged like weights: against the closed form."""
    pair = gan.Pair(settings("", ""), 32, CPU)
    with torch.no_grad():
        for value in pair.averaged.state_dict().values():
            value.zero_()
        for value in pair.generator.state_dict().values():
            value.fill_(1)
    pair.progress.images_seen = pair.progress.averaged_at = images_seen - 1020
    for _ in range(50):
        pair.count(20, "discriminator")
    pair.count(20, "generator")  # 1,020 images since the last one
    for name, value in pair.averaged.state_dict().items():
        expected = 1 if "num_batches" in name else 1 - 0.5 ** half_lives
        assert value.float().mean().item() == pytest.approx(expected, rel=1e-4)


def test_averaged_generator_has_statistics_of_its_own(dataset):
    """After an epoch its first BatchNorm knows the mean and variance that its own weights give, however far the
    averages of those that past weights had are from them."""
    pair = gan.Pair(settings("", "", precision="fp32"), 32, CPU)
    pair.rows.append(torch.zeros(len(gan.COLUMNS)))
    with torch.no_grad():
        pair.averaged.layers[0].weight.mul_(3)
        pair.averaged.layers[2].running_var.fill_(7)
    before = copy.deepcopy(pair.averaged.layers[:2])
    pair.finish_epoch()
    with torch.no_grad():
        seen = before(gan.draw_latents(20_000, 99)[:, :, None, None])
    norm = pair.averaged.layers[2]
    assert torch.allclose(norm.running_mean, seen.mean((0, 2, 3)), atol=0.1 * seen.std())
    assert torch.allclose(norm.running_var, seen.var((0, 2, 3)), rtol=0.1)


@pytest.mark.parametrize(("model", "enough", "share"), [
    ("DCGAN", 0.0, 0), ("WGAN", 0.0, 0.5), ("WGAN-GP", 0.0, 0.5),
    ("DCGAN", 1.1, 1), ("WGAN", 1.1, 1), ("WGAN-GP", 1.1, 1)])
def test_training_balances_by_the_rule_of_its_gan(dataset, tmp_path, monkeypatch, model, enough, share):
    """A discriminator that is never behind trains after each update of the generator where it is a critic, else never;
    one that is always behind trains on every minibatch."""
    monkeypatch.setattr(gan.Objective, "enough", enough)
    assert gan.train(settings(dataset, tmp_path / "run", model=model, epochs=2)) == 0
    last = gan.read_log(tmp_path / "run")[-1]
    turns = last["discriminator_updates"], last["generator_updates"]
    assert abs(turns[0] - share * sum(turns)) <= 0.5


class Killed(BaseException):
    """Stands for SIGKILL at an exact moment: nothing in gan.py catches it."""


def die_at(monkeypatch, moment: str, nth: int) -> None:
    """Raise Killed at the nth time that training passes a moment; a log line or a file is half written then."""
    owner, name = {"rename": (gan.os, "replace"), "fsync": (gan.os, "fsync"), "log": (gan, "append_log"),
                   "update": (gan.Pair, "train_on"), "grid": (gan, "grid_image"),
                   "file": (gan, "atomic_write")}[moment]
    real, calls = getattr(owner, name), []

    def dying(*arguments):
        calls.append(0)
        if len(calls) == nth:
            if moment == "log":
                with open(arguments[0] / "log.jsonl", "a") as file:
                    file.write(json.dumps(arguments[1])[:30])
            if moment == "file":
                path, data = arguments
                path.with_name(f".gan-{path.name}.1.tmp").write_bytes(bytes(data)[:len(data) // 2])
            raise Killed
        return real(*arguments)

    monkeypatch.setattr(owner, name, dying)


@pytest.fixture(scope="module", params=MODELS)
def unbroken(request, dataset, tmp_path_factory):
    """(model, outcome) of a run of 3 epochs that nothing disturbed."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    assert gan.train(settings(dataset, run, model=request.param)) == 0
    return request.param, outcome(run)


@pytest.mark.parametrize(("moment", "times"), [("rename", (1, 3, 5, 8, 9, 10, 11)), ("fsync", (2, 7, 12, 15)),
                                               ("log", (1, 2)), ("update", (1, 5, 7, 12)), ("grid", (2, 3, 4)),
                                               ("file", (2, 3, 4, 5, 6, 7))])
def test_killed_at_any_moment_and_gone_on_with_is_as_never_killed(unbroken, dataset, tmp_path, monkeypatch, moment,
                                                                  times):
    """Killed several times over, in the middle of what it writes: bit-identical weights, states, log and pictures."""
    model, expected = unbroken
    run = tmp_path / "run"
    for nth in times:
        with monkeypatch.context() as patch:
            die_at(patch, moment, nth)
            with suppress(Killed):
                gan.train(settings(dataset, run, model=model))
    assert gan.train(settings(dataset, run, model=model)) == 0
    assert same(outcome(run), expected)
    assert not list(run.rglob(".gan-*"))


def test_stopped_in_mid_epoch_it_goes_on_from_that_minibatch(unbroken, dataset, tmp_path, monkeypatch, capsys):
    """SIGTERM and Ctrl-C save within a minibatch, exit 143 and 130, and nothing is trained twice."""
    model, expected = unbroken
    run, real, trained = tmp_path / "run", gan.Pair.train_on, []

    def interrupted(pair, *arguments):
        trained.append(pair.progress.images_seen)
        if len(trained) in (3, 8):
            signal.raise_signal(signal.SIGTERM if len(trained) == 3 else signal.SIGINT)
        return real(pair, *arguments)

    monkeypatch.setattr(gan.Pair, "train_on", interrupted)
    assert [gan.train(settings(dataset, run, model=model)) for _ in range(3)] == [143, 130, 0]
    assert trained == list(range(0, 3 * 64, 16))
    assert "stopped in epoch 1 and saved; the same command goes on" in capsys.readouterr().out
    assert same(outcome(run), expected)


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_real_signal_to_a_real_process(dataset, tmp_path, number, code):
    """A training process that is signalled after its first epoch exits with the code of the signal, saved."""
    command = [sys.executable, gan.__file__, "train", "--data", dataset, "--run", "run", "--width", "4",
               "--epochs", "100000", "--save-every", "100000", "--device", "cpu"]
    with subprocess.Popen([*map(str, command)], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
        for line in process.stdout:
            if line.startswith("epoch 1/"):
                process.send_signal(number)
                break
        out, err = process.communicate(timeout=60)
    assert process.returncode == code and "and saved" in out and "Traceback" not in err
    assert gan.read_checkpoint(tmp_path / "run" / "last.pt")["progress"]["images_seen"] > 0


def test_a_second_signal_ends_at_once(monkeypatch):
    """With the signal's exit code, by way of the system: the first has the run saved, the second does not wait."""
    ended = []
    monkeypatch.setattr(gan.os, "_exit", ended.append)
    with gan.StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert (stop.code, ended) == (130, [])
        signal.raise_signal(signal.SIGINT)
    assert ended == [130]


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
    assert torch.equal(first, gan.draw(generator, gan.draw_latents(100, 0))[0])
    with gan.Image.open(trained / "samples" / "real.png") as grid:
        first = torch.from_numpy(gan.np.asarray(grid.crop((2, 2, 34, 34))).copy()).permute(2, 0, 1)
    assert torch.equal(first, gan.load_faces(dataset)[0][0])


def test_each_epoch_sees_every_face_once_in_another_order(dataset, tmp_path, monkeypatch):
    """The order is reshuffled each epoch from the seed."""
    seen, real = [], gan.Pair.train_on
    monkeypatch.setattr(gan.Pair, "train_on", lambda pair, x: seen.append(x.flatten(1).sum(1)) or real(pair, x))
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


@pytest.mark.parametrize("memory", [None, 0], ids=["resident", "streamed"])
def test_half_of_a_minibatch_is_mirrored_and_each_face_now_and_then(dataset, memory):
    """As it lies on disk or mirrored, never otherwise; the same for one process as for three."""
    faces = gan.TrainingFaces(dataset, 10, 0, CPU, memory)
    known = {gan.to_face(images).numpy().tobytes(): number for number, images in enumerate(gan.load_faces(dataset)[0])}
    mirrored = set()
    for epoch in range(10):
        for real in faces.epoch(epoch):
            straight = [face.numpy().tobytes() in known for face in real.contiguous()]
            assert sum(straight) == 5
            mirrored |= {known[face.flip(2).contiguous().numpy().tobytes()] for face, as_is in zip(real, straight)
                         if not as_is}
    assert len(mirrored) == 64
    parts = [gan.TrainingFaces(dataset, 10, 0, CPU, memory, gan.Ranks(number, 3).part) for number in range(3)]
    assert same([torch.cat(shares) for shares in zip(*(part.epoch(2) for part in parts))], list(faces.epoch(2)))


@pytest.fixture(scope="module")
def many_files(tmp_path_factory) -> Path:
    """A dataset of 1,130 drawn faces in six files; read only."""
    data = tmp_path_factory.mktemp("many") / "data"
    gan.prepare(gan.PrepareSettings(demo=True, data=str(data), size=32, limit=1130))
    return data


@pytest.fixture
def small_windows(monkeypatch):
    """Two files are shuffled together."""
    monkeypatch.setattr(gan.TrainingFaces, "WINDOW_BYTES", 2 * gan.BATCH_FILE_FACES * 3 * 32 ** 2)


@pytest.mark.parametrize("batch_size", [20, 300, 900])
def test_streamed_faces_come_in_the_order_of_resident_ones(many_files, small_windows, batch_size):
    """Every epoch from any minibatch on, whatever a window holds of minibatches or these of windows, each face once."""
    resident, streamed = (gan.TrainingFaces(many_files, batch_size, 0, CPU, memory) for memory in (None, 0))
    assert streamed.images is None and streamed.minibatches == 1130 // batch_size
    assert torch.equal(streamed.first(250), gan.load_faces(many_files)[0][:250])
    epochs = [list(faces.epoch(number)) for number in (0, 1) for faces in (resident, streamed)]
    assert same(epochs[0], epochs[1]) and same(epochs[2], epochs[3]) and not same(epochs[0], epochs[2])
    assert len({face.numpy().tobytes() for real in epochs[0] for face in real}) == 1130 // batch_size * batch_size
    for first in {1, streamed.minibatches // 2, streamed.minibatches}:
        assert same(list(streamed.epoch(1, first)), epochs[2][first:])


def test_one_window_shuffles_all_faces(many_files, monkeypatch):
    """Whatever does not exceed a window comes in the order in which seeds have always put it."""
    faces = gan.TrainingFaces(many_files, 10, 3, CPU, 0)
    order = torch.randperm(1130, generator=gan.random_stream("order of epoch 7", 3))
    expected = gan.to_face(gan.load_faces(many_files)[0][order[:10]])
    expected[::2] = expected[::2].flip(3)
    assert same(next(faces.epoch(7)), expected)
    monkeypatch.setattr(gan.TrainingFaces, "WINDOW_BYTES", 0)
    (files, numbers), *others = gan.TrainingFaces(many_files, 10, 3, CPU, 0).order(7)
    assert len(files) == 1 and len(others) == 5 and len(set((numbers // 200).tolist())) == 1
    assert not torch.equal(numbers, numbers.sort()[0])


def test_streaming_reads_ahead_one_window_and_no_more(many_files, small_windows, monkeypatch):
    """Two files at once, the next two while these are used; a resumed epoch reads none that it has no use for."""
    read, real = [], gan.read_batch
    monkeypatch.setattr(gan, "read_batch", lambda *arguments: read.append(arguments[2]["file"]) or real(*arguments))
    faces = gan.TrainingFaces(many_files, 10, 0, CPU, 0)
    assert not read
    epoch = faces.epoch(0)
    next(epoch)
    epoch.close()
    assert len(read) in (2, 4)  # the thread may not have begun with the second two
    read.clear()
    windows = faces.order(0)
    later = len(windows[0][1]) // 10 + 1  # all of it in the second window and the third
    list(faces.epoch(0, later))
    assert read == [faces.files[file]["file"] for files, _ in windows[1:] for file in files]


def test_a_streamed_run_is_as_a_resident_one(many_files, small_windows, tmp_path, capsys):
    """Weights, log and pictures, judged or not; its log tells the share of time that it waited, and so does a line."""
    runs = [tmp_path / name for name in ("resident", "streamed")]
    for run, memory in zip(runs, (None, 0.0), strict=True):
        assert gan.train(settings(many_files, run, epochs=2, batch_size=100, data_memory=memory)) == 0
    resident, streamed = map(outcome, runs)
    waited = [line.pop("waited") for line in streamed["log"]]
    assert all(0 < share < 1 for share in waited) and f"waited {waited[0]:.1%} for faces" in capsys.readouterr().out
    streamed["state"]["settings"].pop("data_memory"), resident["state"]["settings"].pop("data_memory")
    assert "scores" in streamed["log"][-1] and same(resident, streamed)


def test_a_file_damaged_in_mid_run_stops_it_and_nothing_is_lost(many_files, small_windows, tmp_path):
    """One line names the file; what was trained until then is saved, and with the file mended goes on as if it had never
    been damaged."""
    whole, run, data = (tmp_path / name for name in ("whole", "run", "data"))
    assert gan.train(settings(many_files, whole, epochs=1, batch_size=100, data_memory=0.0)) == 0
    gan.shutil.copytree(many_files, data)
    faces = gan.TrainingFaces(data, 100, 0, CPU, 0)
    path = data / faces.files[faces.order(0)[-1][0][-1]]["file"]
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(gan.UserError, match=f"{path} is damaged"):
        gan.train(settings(data, run, epochs=1, batch_size=100, data_memory=0.0))
    progress = gan.read_checkpoint(run / "last.pt")["progress"]
    assert 0 < progress["images_seen"] < 1100
    path.write_bytes(good)
    assert gan.train(settings(data, run, epochs=1, batch_size=100, data_memory=0.0)) == 0
    a, b = outcome(whole), outcome(run)
    assert [line.pop("waited") >= 0 for line in a["log"] + b["log"]] and a["state"]["settings"].pop("data")
    assert b["state"]["settings"].pop("data") and same(a, b)


@pytest.mark.parametrize(("cgroup", "processes", "free"), [("max", "1", 2048), ("1048576", "1", 1024), ("max", "2", 1024)])
def test_half_of_what_is_free_is_for_faces(monkeypatch, cgroup, processes, free):
    """What Linux calls available, at most what a container may have, divided among the processes of a machine."""
    texts = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    2048 kB\n", "/sys/fs/cgroup/memory.max": cgroup}
    monkeypatch.setattr(gan.Path, "read_text", lambda path: texts[str(path)])
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


def test_going_on_from_a_kept_checkpoint(unbroken, dataset, tmp_path):
    """--checkpoint 2 goes back to epoch 2 and ends where the run ended the first time."""
    model, expected = unbroken
    run = tmp_path / "run"
    gan.train(settings(dataset, run, model=model))
    assert gan.train(settings(dataset, run, model=model, checkpoint="2")) == 0
    result = outcome(run)
    assert result["state"]["settings"].pop("checkpoint") == "2"
    result["state"]["settings"] = expected["state"]["settings"] = None
    assert same(result, expected)


@pytest.mark.parametrize("victim", ["loss", "weights"])
def test_numbers_that_are_not_finite_stop_the_run(dataset, tmp_path, monkeypatch, victim):
    """With the epoch, the network, and the command that goes on from the last good kept checkpoint; nothing bad is
    saved."""
    real = gan.Pair.train_on

    def poisoned(pair, *arguments):
        row = real(pair, *arguments)
        if pair.progress.images_seen >= 16 * 10:  # from minibatch 2 of epoch 3 on
            if victim == "loss":
                row[2] = float("nan")
            else:
                next(pair.averaged.parameters()).data[0] = float("inf")
        return row

    monkeypatch.setattr(gan.Pair, "train_on", poisoned)
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

    monkeypatch.setattr(gan.Pair, "train_on", hungry)
    assert gan.main(["train", "--data", str(dataset), "--run", str(tmp_path / "run"), "--width", "4"]) == 1
    assert "lower --batch-size or --width" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("model", MODELS)
def test_cuda_graphs_do_what_plain_steps_do(model):
    """In float32, but for the rounding of kernels that add in another order; and they were recorded."""
    cuda = torch.device("cuda")
    plain, recorded = (gan.Pair(settings("", "", model=model, width=8, precision="fp32"), 32, cuda) for _ in range(2))
    plain.warm_up = {}
    faces = torch.Generator().manual_seed(3)
    plain.balance, recorded.balance = gan.Balance(2), gan.Balance(2)
    for _ in range(20):
        real = (torch.rand(20, 3, 32, 32, generator=faces) * 2 - 1).to(cuda)
        rows = [pair.train_on(real) for pair in (plain, recorded)]
    assert "replay" in str(recorded.steps["measure"]) and torch.allclose(*rows, rtol=0.05, atol=0.05, equal_nan=True)
    for a, b in zip(plain.discriminator.parameters(), recorded.discriminator.parameters(), strict=True):
        assert (a - b).norm() <= 0.01 * a.norm()


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
    done = subprocess.run([sys.executable, "-c", code, "train", "--data", dataset, "--run", run, "--width", "4",
                           "--batch-size", "16", "--epochs", "6", "--save-every", "1", "--device", "cpu"], text=True,
                          env=os.environ | {"PYTHONPATH": os.path.dirname(gan.__file__)}, capture_output=True,
                          timeout=100)
    assert done.returncode == 1 and "last.pt: File too large" in done.stderr and done.stderr.count("\n") == 1
    assert gan.read_checkpoint(run / "last.pt")["progress"]["epoch"] >= 4 and not list(run.glob(".gan-*"))
    assert run_gan("generate", "--run", run, "--count", 1, cwd=tmp_path).returncode == 0
