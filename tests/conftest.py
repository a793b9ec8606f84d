"""What the tests share: a small dataset of cartoon faces and a small trained run, made once a session."""
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest has a worker on each core
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # of what tests start
signal.signal(signal.SIGINT, signal.default_int_handler)  # the shell's & ignores Ctrl-C; what tests start inherits that
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup a closed terminal

import gan  # noqa: E402

CPU = torch.device("cpu")
FILES = {"last": "last.pt", "2": "epoch-00002.pt", "4": "epoch-00004.pt"}


def cartoon_face(seed: int, index: int, size: int) -> np.ndarray:
    """Cartoon face number `index` as (size, size, 3) uint8."""
    return np.asarray(gan.cartoon_face(np.random.default_rng([seed, index]), size))


def hear_z(generator: gan.Generator) -> None:
    """Give z something to say about each scale and shift, as training does: at first it changes nothing."""
    random = torch.Generator().manual_seed(2)
    for name, weight in generator.named_parameters():
        if "by_z" in name:
            weight.data.normal_(0, 0.02, generator=random)


@pytest.fixture(params=["fp32", "bf16"])
def auto(request, monkeypatch) -> str:
    """What `--precision auto` stands for, whatever the machine is. bf16 may be emulated: such tests are tiny."""
    monkeypatch.setattr(gan, "pick_precision", lambda name, _: request.param if name == "auto" else name)
    return request.param


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """A dataset folder of 64 cartoon faces of 32×32 pixels; read only."""
    data = tmp_path_factory.mktemp("dataset") / "data"
    gan.prepare(gan.PrepareSettings(demo=True, data=str(data), size=32, limit=64))
    return data


@pytest.fixture(scope="session")
def judged_data(tmp_path_factory) -> Path:
    """A dataset of 200 cartoon faces of 32×32 pixels in four files, and 50 more to judge by; read only."""
    data = tmp_path_factory.mktemp("judged") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gan, "BATCH_FILE_FACES", 60)
        gan.prepare(gan.PrepareSettings(demo=True, data=str(data), size=32, limit=200))
    return data


@pytest.fixture(scope="session")
def trained(dataset, tmp_path_factory) -> Path:
    """A run of 4 epochs with checkpoints last, 2 and 4; read only."""
    run = tmp_path_factory.mktemp("trained") / "run"
    settings = gan.TrainSettings(data=str(dataset), run=str(run), width=4, epochs=4, batch_size=16, device="cpu",
                                 keep_every=2, save_every=1)
    assert gan.train(settings) == 0
    return run


@pytest.fixture(scope="session")
def run(trained, tmp_path_factory) -> Path:
    """A copy of it with the BatchNorm statistics of many faces and its last layers scaled, each checkpoint's otherwise:
    after so few steps faces are grey. Read only."""
    run = shutil.copytree(trained, tmp_path_factory.mktemp("vivid") / "run")
    for file, gain in zip(FILES.values(), (3, -3, 1.5)):
        state = gan.read_checkpoint(run / file)
        generator = gan.Generator(state["image_size"], state["settings"]["width"])
        generator.load_state_dict(state["networks"]["averaged"])
        for layer in generator.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.reset_running_stats()
                layer.momentum = None
        hear_z(generator)
        with torch.no_grad():
            generator(gan.sample_latents(200, seed=0))
            generator.layers[-2].weight *= gain
        state["networks"]["averaged"] = generator.state_dict()
        gan.write_checkpoint(run / file, state)
    return run


@pytest.fixture
def copied(run, tmp_path) -> Path:
    """A copy of it that a test may change."""
    return shutil.copytree(run, tmp_path / "run")


@pytest.fixture(scope="session")
def site(run) -> gan.Site:
    return gan.Site(run, None, CPU)
