"""Generated faces: latent vectors as they should be, and a face that depends on its own vector alone."""
import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import hear_z

import gan


@pytest.fixture
def vivid():
    """A generator whose BatchNorm statistics differ from a minibatch's, and whose faces are vivid."""
    torch.manual_seed(0)
    generator = gan.Generator(32, 8)
    for layer in generator.layers:
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.005, 0.02)
    hear_z(generator)
    return generator


def test_a_face_does_not_depend_on_the_others(vivid):
    """Made alone, in tens or in one chunk: the same within the rounding of one grey level. In training mode it does
    depend: the wrong way is told apart."""
    z = gan.sample_latents(30, seed=1)
    together = gan.sample_images(vivid, z).int()
    assert together.float().std() > 20
    for chunk in (1, 10):
        assert (gan.sample_images(vivid, z, chunk).int() - together).abs().max() <= 1
    wrong = gan.to_image(vivid.train()(z[:5])).int()
    assert (wrong - together[:5]).abs().max() > 10


@pytest.mark.parametrize("training", [True, False])
def test_sampling_changes_nothing(vivid, training):
    """Neither the mode, nor BatchNorm's statistics, nor anyone's random numbers."""
    vivid.train(training)
    before, torch_state = {k: v.clone() for k, v in vivid.state_dict().items()}, torch.get_rng_state()
    gan.sample_images(vivid, gan.sample_latents(3, seed=0))
    assert vivid.training == training and torch.equal(torch.get_rng_state(), torch_state)
    assert all(torch.equal(value, before[name]) for name, value in vivid.state_dict().items())


@pytest.mark.parametrize("least", [0.0, 0.3, 1.0, 3.0])
def test_latent_vectors_are_normal_but_for_the_gap(least):
    """Mean 0, both signs alike, and the mean size φ(A)/(1 − Φ(A)) of a normal number beyond A; none nearer to 0."""
    z = gan.sample_latents(2000, seed=3, min_abs=least)
    assert z.shape == (2000, 128) and z.dtype == torch.float32
    assert z.abs().min() >= torch.tensor(least)
    density = math.exp(-least ** 2 / 2) / math.sqrt(2 * math.pi)
    beyond = math.erfc(least / math.sqrt(2)) / 2
    assert z.abs().mean().item() == pytest.approx(density / beyond, rel=0.01)
    assert abs(z.sign().mean()) < 0.01


@pytest.mark.parametrize("least", [0.0, 0.5])
def test_latent_vectors_depend_on_the_seed_alone(least):
    """Not on which ones were sampled before."""
    assert torch.equal(gan.sample_latents(5, 7, least), gan.sample_latents(5, 7, least))
    assert not torch.equal(gan.sample_latents(5, 7, least), gan.sample_latents(5, 8, least))


def test_generate_takes_the_newest_run_and_the_named_checkpoint(trained, tmp_path, monkeypatch, capsys):
    """Without --run the run saved last; --checkpoint, --seed, --count and --out do what they say."""
    monkeypatch.chdir(tmp_path)
    for name, age in (("older", 1000), ("newer", 2000)):
        gan.shutil.copytree(trained, tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name / "last.pt", (age, age))
    assert gan.main(["generate", "--count=12", "--checkpoint=2", "--seed=4", "--out=faces", "--interpolate"]) == 0
    told = capsys.readouterr().out
    assert f"{Path('runs/newer/epoch-00002.pt')} (epoch 2, seed 4) in faces" in told
    assert len(list((tmp_path / "faces").glob("face-*.png"))) == 12
    generator, facts = gan.load_generator(trained / "epoch-00002.pt", torch.device("cpu"))
    expected = gan.sample_images(generator, gan.sample_latents(12, 4), precision="fp32")[11].permute(1, 2, 0).numpy()
    with gan.Image.open(tmp_path / "faces" / "face-00011.png") as face:
        assert gan.np.abs(gan.np.asarray(face).astype(int) - expected).max() <= 1
    assert (facts["model"], facts["epoch"], facts["image_size"]) == ("WGAN-GP", 2, 32)
    with gan.Image.open(tmp_path / "faces-grid.png") as grid:
        assert grid.size == (342, 70)
    with gan.Image.open(tmp_path / "faces-film.webp") as film:  # 11 ways of 24 pictures, and the last face
        assert (film.n_frames, film.size) == (265, (64, 64))


def test_faces_of_before_do_not_stay_among_new_ones(trained, tmp_path):
    """Fewer faces in a folder that held more: those of the new seed alone. What we never wrote is not ours to remove."""
    own = ["face-of-a-friend.png", "face-1.png", "face-00003.jpg", "notes.txt"]
    arguments = ["generate", "--run", str(trained), "--out", str(tmp_path / "faces")]
    assert gan.main([*arguments, "--count=9"]) == 0
    for name in own:
        (tmp_path / "faces" / name).write_bytes(b"mine")
    assert gan.main([*arguments, "--count=2", "--seed=5"]) == 0
    there = {path.name: path.read_bytes() for path in (tmp_path / "faces").iterdir()}
    assert there.keys() == {"face-00000.png", "face-00001.png", *own} and all(there[name] == b"mine" for name in own)
    generator, _ = gan.load_generator(gan.find_checkpoint(trained, None), torch.device("cpu"))
    expected = gan.sample_images(generator, gan.sample_latents(2, 5), precision="fp32")[1].permute(1, 2, 0).numpy()
    with gan.Image.open(tmp_path / "faces" / "face-00001.png") as face:
        assert gan.np.abs(gan.np.asarray(face).astype(int) - expected).max() <= 1


def test_faces_of_saved_vectors(trained, tmp_path, capsys, auto):
    """What the page (`values`) and invert (a list) save, one or many: those faces, and no more of --count."""
    z = [[round(number, 5) for number in vector] for vector in gan.sample_latents(3, 9).tolist()]
    generator, _ = gan.load_generator(gan.find_checkpoint(trained, None), torch.device("cpu"))
    expected = gan.sample_images(generator, torch.tensor(z), precision="fp32").permute(0, 2, 3, 1).numpy()
    for told, which in ((z[1], [1]), ({"values": z[2]}, [2]), (z, [0, 1, 2]), ([{"values": z[1]}, {"values": z[0]}], [1, 0]),
                        ({"values": z[:2]}, [0, 1])):
        (tmp_path / "z.json").write_text(json.dumps(told))
        assert gan.main(["generate", "--run", str(trained), "--vectors", str(tmp_path / "z.json"),
                         "--out", str(tmp_path / "faces")]) == 0
        assert f"{len(which)} faces" in capsys.readouterr().out
        faces = [gan.np.asarray(gan.Image.open(path)) for path in sorted((tmp_path / "faces").glob("*.png"))]
        assert len(faces) == len(which)
        assert gan.np.abs(gan.np.stack(faces).astype(int) - expected[which]).max() <= 1
    assert gan.main(["generate", "--run", str(trained), "--vectors", str(tmp_path / "z.json"), "--best-of", "2"]) == 1
    assert "--best-of chooses among new faces" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{}", "[]", "[1, 2]", "7", "null", '{"values": 3}', "[" * 9000, json.dumps([[0.0] * 127]),
                                  json.dumps([0.0] * 256), json.dumps([0.0] * 127 + [float("nan")]),
                                  json.dumps([0.0] * 127 + ["0"]), json.dumps([0.0] * 127 + [1e9]),
                                  json.dumps([[[0.0] * 128]]), "\x89PNG"])
def test_what_is_no_vector_is_refused_in_a_line(text, tmp_path):
    """Other shapes, other kinds, numbers far beyond any that a network was trained on."""
    (tmp_path / "z.json").write_text(text)
    with pytest.raises(gan.UserError, match=r"z.json does not hold latent vectors: 128 numbers"):
        gan.read_vectors(tmp_path / "z.json")


@pytest.mark.parametrize("suffix, kind", [("webp", "WEBP"), ("GIF", "GIF"), ("png", "PNG")])
def test_films_by_suffix(trained, tmp_path, suffix, kind):
    """The film's own format, all its pictures, and for ever; another suffix is refused before anything is written."""
    film = tmp_path / f"film.{suffix}"
    arguments = ["generate", "--run", str(trained), "--count=2", "--out", str(tmp_path / "faces"), "--interpolate"]
    assert gan.main([*arguments, str(film)]) == 0
    with gan.Image.open(film) as image:
        assert (image.format, image.n_frames, image.size, image.info["loop"]) == (kind, 25, (64, 64), 0)


def test_a_film_of_no_such_kind_is_refused_first(trained, tmp_path, capsys):
    assert gan.main(["generate", "--run", str(trained), "--out", str(tmp_path / "faces"), "--interpolate", "film.mp4"]) == 1
    assert capsys.readouterr().err == "gan.py: film.mp4 ends in none of .webp, .gif, .png: choose one\n"
    assert not (tmp_path / "faces").exists()


def test_the_best_of_some_is_the_most_realistic(trained, dataset, tmp_path, auto):
    """Of each three the one nearest, in its neighbourhoods, to a training face: worked out face by face, as the paper has
    it (half of the neighbourhoods, the smaller ones, count)."""
    assert gan.main(["generate", "--run", str(trained), "--count=4", "--best-of=3", "--seed=2",
                     "--out", str(tmp_path / "faces")]) == 0
    generator, facts = gan.load_generator(gan.find_checkpoint(trained, None), torch.device("cpu"))
    candidates = gan.sample_images(generator, gan.sample_latents(12, 2), precision="fp32")
    known = gan.NearestFaces(*gan.load_known_faces(facts))
    real, found = known.features.double(), known.space(candidates).double()
    radii = [sorted((real - one).norm(dim=1).tolist())[gan.NEIGHBOURS] for one in real]
    median = sorted(radii)[(len(radii) - 1) // 2]
    realism = [max(radius / (one - other).norm().item() for radius, other in zip(radii, real) if radius <= median)
               for one in found]
    assert torch.allclose(known.realism(candidates).double(), torch.tensor(realism, dtype=torch.float64), rtol=1e-3)
    chosen = [max(range(i, i + 3), key=realism.__getitem__) for i in range(0, 12, 3)]
    faces = gan.np.stack([gan.np.asarray(gan.Image.open(path)) for path in sorted((tmp_path / "faces").glob("*.png"))])
    assert gan.np.abs(faces.astype(int) - candidates[chosen].permute(0, 2, 3, 1).numpy()).max() <= 1


def test_the_best_cannot_be_told_without_the_training_faces(trained, tmp_path, monkeypatch, capsys):
    """One line, and the faces of before stay."""
    monkeypatch.chdir(tmp_path)
    state = torch.load(trained / "last.pt", weights_only=True)
    state["settings"]["data"] = str(tmp_path / "gone")
    torch.save(state, tmp_path / "moved.pt")
    assert gan.main(["generate", "--run", str(trained), "--checkpoint", str(tmp_path / "moved.pt"), "--best-of=2",
                     "--out", str(tmp_path / "faces")]) == 1
    assert "data does not hold the faces" in capsys.readouterr().err and not (tmp_path / "faces").exists()


@pytest.mark.parametrize("written", ["g/face-00007.png", "g-grid.png", "g-film.webp", "film.gif", "film.png", "page.html",
                                     "net.onnx", "face.png", "photo-face.png", "z.json", "png/face-00000.png"])
def test_no_output_replaces_what_is_not_ours(trained, tmp_path, monkeypatch, capsys, written):
    """Somebody's file of that name stays and is told in a line, and so does all else; our own is written anew."""
    if written.endswith("onnx"):
        pytest.importorskip("onnx")
    monkeypatch.chdir(tmp_path)
    gan.Image.new("RGB", (200, 200), (90, 20, 200)).save("photo.png")
    monkeypatch.setattr(gan, "find_faces", lambda image: [((0.0, 0.0, 200.0, 200.0), 0.0)])
    monkeypatch.setattr(gan, "network_json", lambda *_: "{}")
    arguments = {"g": ["generate", "--run", str(trained), "--count=8", "--out=g", "--interpolate"],
                 "film": ["generate", "--run", str(trained), "--count=2", "--out=g", f"--interpolate={written}"],
                 "png": ["prepare", "--demo", "--limit=20", "--size=32", "--png=png"],
                 "page": ["export", "page.html", "--run", str(trained)], "net": ["export", "net.onnx", "--run", str(trained)],
                 "photo": ["invert", "photo.png", "--run", str(trained)]}.get(
        re.match(r"[a-z]+", written)[0], ["invert", "photo.png", "--run", str(trained), "--out", written])
    for _ in range(2):
        assert gan.main(arguments) == 0
        ours, there = Path(written).read_bytes(), sorted(tmp_path.rglob("*"))
    Path(written).write_bytes(theirs := b"a photo of a friend")
    capsys.readouterr()
    assert gan.main(arguments) == 1 and Path(written).read_bytes() == theirs != ours
    told = capsys.readouterr().err
    assert Path(written).name in told and told.count("\n") == 1 and sorted(tmp_path.rglob("*")) == there


def test_an_output_that_is_an_input_is_refused(trained, tmp_path, monkeypatch, capsys):
    """Were it written by this program, under another name, or as the page that it exports."""
    monkeypatch.chdir(tmp_path)
    assert gan.main(["generate", "--run", str(trained), "--count=1", "--out=g"]) == 0
    gan.os.link("g/face-00000.png", "same.png")
    for arguments in (["invert", "same.png", "--out=g/face-00000.png"], ["export", str(gan.PAGE)]):
        before = Path(arguments[-1].removeprefix("--out=")).read_bytes()
        assert gan.main([*arguments, "--run", str(trained)]) == 1
        assert "is read, too" in capsys.readouterr().err
        assert Path(arguments[-1].removeprefix("--out=")).read_bytes() == before


@pytest.mark.parametrize(("out", "code"), [("me.jpg", 1), ("z.JSON", 0), ("f.PNG", 0), ("me", 1)])
def test_the_suffix_tells_what_invert_writes(trained, tmp_path, monkeypatch, out, code):
    """Or is refused."""
    monkeypatch.chdir(tmp_path)
    gan.Image.new("RGB", (200, 200)).save("photo.png")
    monkeypatch.setattr(gan, "find_faces", lambda image: [((0.0, 0.0, 200.0, 200.0), 0.0)])
    assert gan.main(["invert", "photo.png", "--run", str(trained), "--out", out]) == code
    assert code or Path(out).read_bytes()[:4] == (b"\x89PNG" if "PNG" in out else Path(out).read_bytes()[:4])
    assert code or out != "z.JSON" or len(json.loads(Path(out).read_text())) == 128


def test_faces_into_the_current_folder(trained, tmp_path, monkeypatch):
    """Their grid lies beside it, under its name."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert gan.main(["generate", "--run", str(trained), "--count=1", "--out=."]) == 0
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["face-00000.png", "here", "here-grid.png"]
