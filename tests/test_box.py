"""The network in the box: what a fresh clone has before anything is trained."""
import json

import box
import pytest
import torch
from conftest import hear_z
from PIL import Image
from torch.nn import functional as F

import gan

CPU = torch.device("cpu")
REAL = gan.BOX / "best.pt"


@pytest.fixture
def boxed(trained, tmp_path, monkeypatch):
    """A small run's network in the box, a folder without any run to work in, and a dataset of 20 faces of its size."""
    (tmp_path / "box").mkdir()
    monkeypatch.setattr(gan, "BOX", tmp_path / "box")
    gan.write_checkpoint(tmp_path / "box" / "best.pt", box.boxed(gan.read_checkpoint(trained / "last.pt")))
    monkeypatch.chdir(tmp_path)
    gan.prepare(gan.PrepareSettings(demo=True, size=32, limit=20))
    return tmp_path / "box" / "best.pt"


def begin(capsys, **changes) -> tuple[dict, str]:
    """(The first checkpoint of a new run on the 20 faces, what was said)."""
    capsys.readouterr()
    settings = {"run": f"runs/{len(list(gan.Path('.').glob('runs/*')))}", "width": 4, "epochs": 1, "device": "cpu",
                "learning_rate": 1e-7, **changes}
    assert gan.train(gan.TrainSettings(**settings)) == 0
    return gan.read_checkpoint(gan.Path(settings["run"]) / "last.pt"), capsys.readouterr().out


def test_a_fresh_clone_makes_faces(tmp_path, monkeypatch, capsys):
    """With the real file: a hundred of them, which differ, and one line that says whose network it is."""
    monkeypatch.chdir(tmp_path)
    assert gan.main(["generate", "--count", "100"]) == 0
    assert capsys.readouterr().err.startswith("no run in runs/ yet: this is the network in the box")
    faces = sorted((tmp_path / "runs/box/generated").glob("face-*.png"))
    assert len({path.read_bytes() for path in faces}) == 100
    with Image.open(faces[0]) as face:
        assert face.size == (80, 80)
    assert not list(gan.BOX.glob("generated*"))


def test_the_real_file_says_what_it_is():
    """Small, whole, and nothing in it but weights and what is told of them."""
    state = gan.read_checkpoint(REAL)
    assert REAL.stat().st_size <= 15_000_000 and state["about"].keys() == {"photos", "commit", "torch"}
    assert state["progress"]["epoch"] >= 200 and state["scores"]["memory"] > 0.9 and "optimizers" not in state
    assert not any(text.startswith(("/", "~")) for text in state["settings"].values() if isinstance(text, str))


def test_the_networks_faces_follow_every_name():
    """Each name that has words is told by the box's z, and its slider's ends are far apart in what it says, and in nothing else
    half as far, of other faces."""
    generator, _ = gan.load_generator(REAL, CPU)
    named = [one for one in gan.find_directions(generator, pairs=300) if "name" in one]
    assert [one["name"] for one in named] == [name for name, words in gan.NAMES.items() if words]
    z = gan.sample_latents(40, seed=5)
    usual = gan.attributes(gan.sample_images(generator, z))[0].std(0)
    for one in named:
        step, own = one["reach"] * torch.tensor(one["vector"]), [*gan.NAMES].index(one["name"])
        high, low = (gan.attributes(gan.sample_images(generator, z + way * step))[0] for way in (1, -1))
        effects = ((high - low).mean(0) / 2 / usual).abs()
        assert effects[own] > 1 and effects[own] > 2 * effects[torch.arange(len(effects)) != own].max()


def test_no_probe_is_believed_of_what_is_no_face_of_its_frame():
    """Of the box's faces all are; of the same upside down, as negatives or in a wider frame only what the picture itself tells."""
    generator, _ = gan.load_generator(REAL, CPU)
    faces = gan.sample_images(generator, gan.sample_latents(100, seed=6))
    assert gan.attributes(faces)[1].all()
    smaller = F.interpolate(F.pad(faces.float(), [40] * 4, value=127), 80).round().to(torch.uint8)
    for others in (faces.flip(2), 255 - faces, smaller):
        known = dict(zip(gan.NAMES, gan.attributes(others)[1].tolist()))
        assert [name for name, one in known.items() if one] == [*filter(gan.BRIGHTER.get, gan.NAMES)]
    original = generator.forward
    generator.forward = lambda z: original(z).flip(2)
    names = {one.get("name") for one in gan.find_directions(generator, pairs=300)}
    assert not names & gan.read_probes().keys() and "light" in names


def test_float16_changes_no_face_by_more_than_a_level(trained):
    """Of 255, of vivid faces."""
    torch.manual_seed(0)
    state = gan.read_checkpoint(trained / "last.pt")
    generator = gan.Generator(32, 4)
    generator.load_state_dict(state["networks"]["averaged"])
    hear_z(generator)
    generator.layers[-2].weight.data *= 3
    state["networks"]["averaged"] = generator.state_dict()
    halved, z = gan.Generator(32, 4), gan.sample_latents(50, seed=1)
    halved.load_state_dict(box.boxed(state)["networks"]["averaged"])
    made, wanted = (gan.sample_images(network, z, precision="fp32").int() for network in (halved, generator))
    assert wanted.float().std() > 20 and 0 < (made - wanted).abs().max() <= 1


def test_whose_network_is_taken(boxed, trained, capsys):
    """A run of one's own before that in the box; a file that is named, from anywhere; without the box one line."""
    assert gan.find_run(None) == gan.BOX and "the network in the box" in capsys.readouterr().err
    assert gan.find_run(None, str(trained / "last.pt")) == trained and not capsys.readouterr().err
    assert gan.main(["generate", "--count", "2", "--checkpoint", str(trained / "last.pt"), "--out", "two"]) == 0
    assert len(list(gan.Path("two").iterdir())) == 2
    gan.Path("runs/mine").mkdir(parents=True)
    gan.Path("runs/mine/last.pt").touch()
    assert gan.find_run(None) == gan.find_run(None, "last") == gan.Path("runs/mine")
    gan.shutil.rmtree("runs")
    boxed.unlink()
    with pytest.raises(gan.UserError, match="no run in runs/: train one"):
        gan.find_run(None)


def test_few_photos_begin_with_the_box(boxed, capsys, monkeypatch):
    """Unless told otherwise: its networks, the line that says so, and where the run remembers it; many photos do not."""
    before = gan.read_checkpoint(boxed)["networks"]["discriminator"]["layers.0.weight"].float()

    def is_boxed(state: dict) -> bool:
        return bool((state["networks"]["discriminator"]["layers.0.weight"] - before).abs().max() < 1e-3)
    state, told = begin(capsys)
    assert is_boxed(state) and "20 faces are few: this run begins with the network in the box (--start-from none" in told
    assert (state["started_from"]["file"], state["started_from"]["epoch"]) == (str(boxed), 4)
    assert json.loads(gan.Path("runs/0/config.json").read_text())["started_from"] == state["started_from"]
    state, told = begin(capsys, start_from="none")
    assert not is_boxed(state) and state["started_from"] is None and "box" not in told
    monkeypatch.setattr(gan, "FEW_FACES", 20)
    state, told = begin(capsys)
    assert not is_boxed(state) and "box" not in told
    state, told = begin(capsys, start_from="box")
    assert is_boxed(state) and "beginning with the networks of" in told and "are few" not in told


def test_a_box_that_does_not_fit_says_what_would(boxed, capsys):
    """And the run begins anew; asked for, it is refused."""
    state, told = begin(capsys, width=8)
    assert state["started_from"] is None and "the network in the box would help, but has --width 4 (here 8)" in told
    with pytest.raises(gan.UserError, match=r"has --width 4 \(here 8\): its networks do not fit"):
        begin(capsys, width=8, start_from="box")


def test_what_needs_the_training_faces_is_absent_where_others_are(boxed, trained, dataset, capsys):
    """`data/` holds somebody else's: the page hears of none, and --best-of says why."""
    told = json.loads(gan.Site(gan.BOX, None, CPU).respond("GET", "/api/model").body)
    assert told["run"] == "box" and told["dataset"] is False and len(told["checkpoints"]) == 1
    assert gan.main(["generate", "--count", "2", "--best-of", "2"]) == 1
    assert "data does not hold the faces that this network was trained on" in capsys.readouterr().err
    assert json.loads(gan.Site(trained, None, CPU).respond("GET", "/api/model").body)["dataset"] is True
