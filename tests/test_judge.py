"""The judge: its measures against oracles, what it must put in order, and what training makes of it.

GAN_TEST_DATA=DIR has the order tested on the faces of a dataset of yours, with at least 1,000 held out."""
import json
import math
import os
from itertools import pairwise
from pathlib import Path

import perceptual
import pytest
import torch
from conftest import cartoon_face
from forked import Forked
from torch.nn import functional

import gan

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def faces() -> tuple[torch.Tensor, torch.Tensor]:
    """(Faces to train on, as many held-out ones): cartoon faces of 32 pixels unless GAN_TEST_DATA names others."""
    if "GAN_TEST_DATA" in os.environ:
        own = Path(os.environ["GAN_TEST_DATA"])
        return gan.load_faces(own)[0], gan.load_faces(own, "held_out")[0][:1000]
    with gan.ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda i: torch.tensor(cartoon_face(5, i, 32)), range(400)))
    return torch.stack(found).permute(0, 3, 1, 2).contiguous().split(200)


@pytest.fixture(scope="module")
def judge(faces) -> gan.Judge:
    return gan.Judge(*faces, CPU)


def blurred(images, sigma: float):
    offsets = torch.arange(-9, 10.0)
    window = torch.exp(-offsets ** 2 / (2 * sigma ** 2))
    window = (window / window.sum()).expand(3, 1, 1, 19)
    x = functional.pad(images.float(), (9, 9, 9, 9), mode="reflect")
    x = functional.conv2d(functional.conv2d(x, window, groups=3), window.transpose(2, 3), groups=3)
    return x.round().clamp(0, 255).byte()


def repeated(images, kinds: int):
    return images[torch.arange(len(images)) % kinds]


def principal_components(faces, count: int, kept: int):
    """Samples of the normal distribution of the training faces' first principal components."""
    flat = faces.flatten(1).float()
    _, spread, directions = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    numbers = torch.randn(count, kept, generator=torch.Generator().manual_seed(0)) * spread[:kept] / len(faces) ** 0.5
    return (flat.mean(0) + numbers @ directions[:kept]).view(count, *faces.shape[1:]).round().clamp(0, 255).byte()


def test_worse_faces_score_worse(faces, judge):
    """Other real faces < slight blur < strong blur < noise; reals < many repeated < fewer < 5; reals < PCA samples. The
    repeated ones have few neighbourhoods of real faces covered and are alike."""
    training, chance = faces[0], torch.Generator().manual_seed(1)
    others = training[torch.randperm(len(training), generator=chance)[:judge.count]]
    noise = torch.randint(0, 256, others.shape, generator=chance, dtype=torch.uint8)
    real, slight, strong, noisy, half, fifty, five, pca = (judge.score(images) for images in (
        others, blurred(others, 0.7), blurred(others, 1.5), noise, repeated(others, len(others) // 2),
        repeated(others, 50), repeated(others, 5),
        principal_components(training, len(others), min(200, len(training) // 3))))
    for series in ((real, slight, strong, noisy), (real, half, fifty, five)):
        distances = [found["distance"] for found in series]
        assert distances == sorted(distances) and len(set(distances)) == 4, distances
    assert pca["distance"] > real["distance"], (pca, real)
    assert pca["coverage"] < real["coverage"], (pca, real)
    assert five["coverage"] < 0.1 < real["coverage"] and five["recall"] <= real["recall"]
    assert five["variety"] < 0.9 < real["variety"]


def test_memory_tells_learning_by_heart(faces, judge):
    """Training faces are at distance 0 of themselves, others as far as held-out ones."""
    training, held_out = faces
    assert judge.score(training[:judge.count])["memory"] == pytest.approx(0, abs=0.01)
    assert judge.score(held_out[:judge.count])["memory"] == 1


def test_copies_are_found(faces):
    """Of training faces mirrored, moved by a pixel, darker, blurred, with noise, at half the resolution or as JPEG of
    quality 50: the nearest face is the one that was copied."""
    copied, chance = faces[0][:50], torch.Generator().manual_seed(0)

    def jpeg(face: torch.Tensor) -> torch.Tensor:
        buffer = gan.io.BytesIO()
        gan.Image.fromarray(face.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=50)
        return torch.tensor(gan.np.asarray(gan.Image.open(buffer))).permute(2, 0, 1)
    small = functional.avg_pool2d(copied.float(), 2)
    copies = {"mirrored": copied.flip(3), "moved": torch.cat([copied[..., :1], copied[..., :-1]], 3),
              "dark": 0.8 * copied, "blurred": blurred(copied, 0.7), "JPEG": torch.stack([jpeg(face) for face in copied]),
              "noisy": copied + 8 * torch.randn(copied.shape, generator=chance),
              "small": functional.interpolate(small, scale_factor=2, mode="bicubic")}
    known = gan.NearestFaces(*faces)
    for name, images in copies.items():
        _, which = known.nearest(images.round().clamp(0, 255).byte(), 1)
        assert which[:, 0].tolist() == [*range(50)], name


def test_held_out_faces_that_are_training_faces_too(faces):
    """Photos that are there twice: real faces are then at no distance of each other, and all scores are numbers still,
    least for these faces themselves."""
    judge = gan.Judge(faces[0], faces[0], CPU)
    same, other = judge.score(faces[0][:judge.count]), judge.score(blurred(faces[1][:judge.count], 1.5))
    assert all(math.isfinite(value) for found in (same, other) for value in found.values())
    assert same["distance"] < 0.01 < other["distance"] and same["memory"] < other["memory"]


def test_figures_do_not_depend_on_the_batch_size(faces, judge, monkeypatch):
    """Nor on when they are taken."""
    generated = blurred(faces[1], 1.0)
    first = judge.score(generated)
    monkeypatch.setattr(gan, "JUDGE_BATCH", 77)
    assert gan.Judge(*faces, CPU).score(generated) == pytest.approx(first, rel=1e-3, abs=2e-3)


def test_as_many_generated_faces_as_there_are_real_ones(faces, judge):
    """Any other number is refused, and so are too few faces."""
    with pytest.raises(ValueError, match="the number"):
        judge.score(faces[1][:-1])
    for parts in ((faces[0], faces[1][:19]), (faces[0][:19], faces[1])):
        with pytest.raises(gan.UserError, match="20 of each"):
            gan.Judge(*parts, CPU)


def test_few_held_out_faces_tell_worse_faces_too(faces):
    """30 of them against 400 generated ones: in order, by more than the spread, and 1 for training faces; the alarm
    hears that few faces are made again and again, and no alarm comes before."""
    judge = gan.Judge(faces[0], faces[1][:30], CPU)
    series = [judge.score(images) for images in (faces[0], blurred(faces[0], 1.5), repeated(faces[0], 5))]
    assert series[0]["distance"] == 1
    assert all(better["distance"] + 2 * better["spread"] < worse["distance"] for better, worse in pairwise(series))
    assert all(math.isfinite(value) for found in series for value in found.values())
    assert not gan.collapsed([*series[1::-1] * 3]) and gan.collapsed([series[0]] + 3 * [series[2]])


def test_spread_is_that_of_judgements_of_other_faces(faces):
    """Of one distribution, here the real one, 40 faces at a time: the spread that each judgement tells is near the
    standard deviation of their distances."""
    judge = gan.Judge(faces[0][:40], faces[1][:40], CPU)
    found = [judge.score(part) for part in torch.cat([faces[0][40:], faces[1][40:]]).split(40)]
    distances, told = (torch.tensor([scores[name] for scores in found]) for name in ("distance", "spread"))
    assert 0.5 < told.mean() / distances.std() < 2


def test_frechet_distance_of_known_distributions():
    """Means 3 apart and independent coordinates with deviations 1 and 2: 9 + Σ (1 − 2)². Symmetric, 0 to itself."""
    chance = torch.Generator().manual_seed(0)
    a = torch.randn(500, 4, generator=chance, dtype=torch.double)
    a = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(a.T))).T  # exactly mean 0 and covariance 1
    b = 2 * a + torch.tensor([3.0, 0, 0, 0])
    assert gan.frechet_distance(a, b) == pytest.approx(9 + 4) == gan.frechet_distance(b, a)
    assert gan.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_neighbourhoods_are_the_papers():
    """Against the definitions, written as loops over points."""
    chance = torch.Generator().manual_seed(0)
    real, fake = torch.randn(40, 3, generator=chance), 0.7 * torch.randn(30, 3, generator=chance) + 0.5

    def far(a, b) -> float:
        return (a - b).norm().item()
    radius = {name: [sorted(far(x, y) for y in points)[3] for x in points]
              for name, points in (("r", real), ("f", fake))}
    inside = [[far(r, f) < radius["r"][i] for i, r in enumerate(real)] for f in fake]
    expected = {"precision": sum(map(any, inside)) / 30,
                "recall": sum(any(far(r, f) < radius["f"][j] for j, f in enumerate(fake)) for r in real) / 40,
                "coverage": sum(map(any, zip(*inside, strict=True))) / 40}
    assert gan.neighbourhoods(real, fake, k=3) == pytest.approx(expected)


def test_rank_correlation_is_spearmans():
    """1 for the same order, whatever the distances, -1 for the reverse; between, Spearman's formula for lists without
    ties: 1 - 6 Σ d² / (n (n² - 1)). Equal values share a rank, whatever their order."""
    assert perceptual.rank_correlation([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1)
    assert perceptual.rank_correlation([1, 2, 3], [1, 2, 2]) == pytest.approx(0.75 ** 0.5)
    assert perceptual.rank_correlation([1, 2, 30], [4, 5, 6]) == pytest.approx(1)
    assert perceptual.rank_correlation([1, 2, 30], [6, 5, 4]) == pytest.approx(-1)
    assert perceptual.rank_correlation([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_distance_is_a_multiple_of_real_faces(faces, judge):
    """1 for training faces, whatever the held-out ones; 0 for the held-out ones themselves."""
    assert judge.score(faces[0][:judge.count])["distance"] == pytest.approx(1, abs=0.01)
    assert judge.score(faces[1][:judge.count])["distance"] == pytest.approx(0, abs=0.01)
    few = gan.Judge(faces[0][:100], faces[1], CPU).score(faces[0].flip(0))
    assert few["distance"] == pytest.approx(1, abs=3 * few["spread"])  # real ones, also where few are trained on


def test_distance_sees_what_is_faint_and_what_is_coarse(faces, judge):
    """Half the resolution, a checkerboard of 2 grey levels, a darker picture: farther than other real faces, by far more than
    chance."""
    real = faces[0][:judge.count].float()
    board = (torch.arange(real.shape[-1])[:, None] + torch.arange(real.shape[-1])) % 2 * 4 - 2
    wrong = {"half": functional.interpolate(functional.avg_pool2d(real, 2), scale_factor=2, mode="bicubic"),
             "board": real + board, "dark": 0.8 * real}
    for x in wrong.values():
        scores = judge.score(x.round().clamp(0, 255).byte())
        assert scores["distance"] > 1 + 3 * scores["spread"]


def test_scores_are_those_of_earlier_versions():
    """Figures of runs and of other people compare only while the judge's random filters and constants stay as they are:
    who changes one knowingly changes these numbers, and says so in RESULTS.md."""
    random = torch.Generator().manual_seed(0)

    def blots(grain: float) -> torch.Tensor:
        coarse, fine = (torch.rand(200, 3, side, side, generator=random) for side in (6, 48))
        x = functional.interpolate(coarse, size=48, mode="bicubic") + grain * (fine - 0.5)
        return (255 * x).round().clamp(0, 255).byte()
    found = gan.Judge(blots(0.1), blots(0.1), CPU).score(blots(0.3))
    assert found == pytest.approx({"distance": 1.084, "spread": 0.0088, "precision": 0.77, "recall": 0.805,
                                   "coverage": 0.88, "variety": 1.0016, "memory": 1.0107}, rel=2e-3, abs=1e-4)


def scores(coverage: float, variety: float = 1.0) -> dict:
    return {"coverage": coverage, "variety": variety}


@pytest.mark.parametrize(("judged", "expected"), [
    ([scores(c) for c in (0.1, 0.5, 0.8, 0.7, 0.9, 0.6, 0.9)], False),  # noisy but healthy
    ([scores(c) for c in (0.1, 0.5, 0.8, 0.3, 0.3, 0.8)], False),  # it recovered
    ([scores(c) for c in (0.1, 0.5, 0.8, 0.3, 0.2, 0.1)], True),
    ([scores(c) for c in (0.8, 0.1, 0.1)], False),  # too early to tell
    ([scores(0.01, v) for v in (1, 0.9, 0.4, 0.5, 0.3, 0.3)] + [scores(0.5, 0.6)], False),  # the blurs of a beginning
    ([scores(0.8, v) for v in (0.9, 1, 0.7, 0.5, 0.2)], True),
    ([scores(0.8, v) for v in (0.9, 1, 0.8, 0.9, 0.8, 0.9)], False)])
def test_collapse_is_a_clear_and_lasting_fall(judged, expected):
    """Three judgements in a row below half of the best coverage, or much less various than at best."""
    assert gan.collapsed(judged) == expected


def settings(data, run, **changes) -> gan.TrainSettings:
    return gan.TrainSettings(**{"data": str(data), "run": str(run), "width": 4, "batch_size": 50, "epochs": 6,
                                "device": "cpu", "save_every": 2, "keep_every": 3, "judge_every": 2, **changes})


@pytest.fixture(scope="module")
def judged_run(judged_data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("judged") / "run"
    assert gan.train(settings(judged_data, run)) == 0
    return run


def test_training_keeps_the_best(judged_run):
    """Judged are the epochs asked for and the kept ones; best.pt has the least distance and is taken by default."""
    judged = {line["epoch"]: line["scores"] for line in gan.read_log(judged_run) if "scores" in line}
    assert list(judged) == [2, 3, 4, 6] and set(gan.SCORES) <= set(judged[2])
    best = min(judged, key=lambda epoch: judged[epoch]["distance"])
    state = gan.read_checkpoint(judged_run / "best.pt")
    assert (state["progress"]["epoch"], state["scores"]) == (best, judged[best])
    assert gan.read_checkpoint(judged_run / "epoch-00003.pt")["scores"] == judged[3]
    assert gan.find_checkpoint(judged_run, None).name == "best.pt"
    assert (judged_run / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize(("told", "anew", "then"), [(1e3, 1.0, 2.0), (1e-3, 2.0, 1.0)])
def test_a_worse_checkpoint_never_replaces_the_best(judged_data, judged_run, tmp_path, monkeypatch, told, anew, then):
    """Also when the run goes on from an earlier epoch, whose log no longer knows of the best, and whatever an earlier
    version's judge said of that: it is judged anew."""
    run, scores = gan.shutil.copytree(judged_run, tmp_path / "run"), iter([anew, then])
    monkeypatch.setattr(gan.Judge, "score", lambda *_: {**dict.fromkeys(gan.SCORES, 0.5), "distance": next(scores)})
    state = gan.read_checkpoint(run / "best.pt")
    gan.write_checkpoint(run / "best.pt", {**state, "scores": {"distance": told, "frechet": told}})
    before = (run / "best.pt").read_bytes()
    assert gan.train(settings(judged_data, run, checkpoint="3", epochs=4)) == 0
    assert ((run / "best.pt").read_bytes() == before) == (anew < then)


def test_scores_of_an_earlier_judge_raise_no_alarm(judged_data, judged_run, tmp_path):
    """A log of before: its coverage was another one, and it knows of no variety. It is read, and goes on."""
    run = tmp_path / "run"
    gan.shutil.copytree(judged_run, run)
    lines = gan.read_log(run)
    for line in lines:
        if "scores" in line:
            line["scores"] = {"distance": 9.0, "frechet": 9.0, "coverage": 100.0, "ms_ssim": 0.1, "ms_ssim_real": 0.2}
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert gan.train(settings(judged_data, run, epochs=9, judge_every=1)) == 0
    assert not any(line.get("collapsed") for line in gan.read_log(run)[6:])


def test_the_judge_judges_checkpoints_as_training_did(judged_data, judged_run, capsys):
    """`judge` with the seed of training's latent vectors gives the scores of the log, a line a checkpoint or JSON."""
    assert gan.main(["judge", "--run", str(judged_run), "--checkpoint=all", "--json"]) == 0
    found = {Path(line["checkpoint"]).name: line for line in json.loads(capsys.readouterr().out)}
    assert found.keys() == {"epoch-00003.pt", "epoch-00006.pt", "best.pt", "last.pt"}
    for name, line in found.items():
        expected = gan.read_checkpoint(judged_run / name)["scores"]
        assert {key: line[key] for key in expected} == pytest.approx(expected, rel=1e-3, abs=2e-3)
    assert gan.main(["judge", "--run", str(judged_run)]) == 0
    told = capsys.readouterr().out
    assert "best" in told and "coverage" in told


def test_the_judge_refuses_other_faces_than_the_networks(judged_data, judged_run, tmp_path, capsys):
    """Figures would be of something else than the run's; a copy of the right faces will do."""
    gan.prepare(gan.PrepareSettings(demo=True, data=str(tmp_path / "other"), size=32, limit=100, seed=3))
    gan.shutil.copytree(judged_data, tmp_path / "copy")
    judge, told = ["judge", "--run", str(judged_run), "--checkpoint=3", "--json", "--data"], capsys.readouterr
    told()
    assert gan.main([*judge, str(tmp_path / "other")]) == 1
    out, error = told()
    assert out == "" and error == (f"gan.py: {tmp_path / 'other'} does not hold the faces that this network was trained "
                                   "on: name theirs with --data\n")
    assert gan.main([*judge, str(tmp_path / "copy")]) == 0
    expected, found = gan.read_checkpoint(judged_run / "epoch-00003.pt")["scores"], json.loads(told().out)[0]
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-3, abs=2e-3)


def test_the_dataset_of_a_run_is_found_from_anywhere(judged_data, judged_run, tmp_path, monkeypatch):
    """A checkpoint holds its whole path, so that no other project's is taken for it. One that moved along with its
    project is found in `data`, but only if it is the same."""
    monkeypatch.chdir(judged_data.parent)
    assert gan.train(settings(judged_data.name, tmp_path / "run", epochs=1)) == 0
    monkeypatch.chdir(tmp_path)
    state = gan.read_checkpoint(tmp_path / "run" / "last.pt")
    assert Path(state["settings"]["data"]) == judged_data

    def found() -> int:
        return len(gan.load_known_faces(gan.load_generator(tmp_path / "run" / "last.pt", CPU)[1])[0])
    gan.prepare(gan.PrepareSettings(demo=True, data="data", size=32, limit=20))
    assert found() == 200
    state["settings"]["data"] = str(tmp_path / "where-it-was")
    gan.write_checkpoint(tmp_path / "run" / "last.pt", state)
    with pytest.raises(gan.UserError, match="data does not hold the faces"):
        found()
    gan.shutil.rmtree("data")
    gan.shutil.copytree(judged_data, "data")
    assert found() == 200


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_scores_that_cannot_be_written_are_an_error(judged_run, tmp_path):
    """What `judge --json` is for is what it prints."""
    ours, theirs = os.pipe()
    with open("/dev/full", "w") as full, Forked("judge", "--run", judged_run, "--json", cwd=tmp_path,
                                                outputs=(full.fileno(), theirs)) as process:
        os.close(theirs)
        with open(ours) as errors:
            assert errors.read() == "gan.py: reading or writing failed: No space left on device\n"
        assert process.wait() == 1


def test_collapse_is_told_shown_and_marked(tmp_path, monkeypatch, capsys):
    """A line, a mark in the log and a picture, once; with --stop-on-collapse the run ends, saved, with exit code 3.
    After the first bad judgement (epoch 3) each epoch is judged until it is known, also when the run goes on."""
    monkeypatch.setattr(gan, "collapsed", lambda judged, last=3: len(judged) >= 1 + last)
    run, few, told = tmp_path / "run", tmp_path / "data", capsys.readouterr
    gan.prepare(gan.PrepareSettings(demo=True, data=str(few), size=32, limit=80))

    def judged(run: Path) -> list[tuple[int, bool]]:
        return [(line["epoch"], line["collapsed"]) for line in gan.read_log(run) if "scores" in line]
    assert gan.train(settings(few, run, epochs=8, keep_every=100, save_every=100)) == 0
    assert judged(run) == [(2, False), (4, False), (5, False), (6, True), (8, True)]
    assert [path.name for path in run.glob("collapse-*.png")] == ["collapse-00006.png"]
    assert told().out.count("the faces have collapsed") == 1
    stopped = tmp_path / "stopped"
    assert gan.train(settings(few, stopped, epochs=4, save_every=100)) == 0
    assert gan.train(settings(few, stopped, epochs=8, save_every=100, stop_on_collapse=True)) == 3
    assert judged(stopped) == [(2, False), (3, False), (4, False), (5, True)]
    assert gan.read_checkpoint(stopped / "last.pt")["progress"]["epoch"] == 5


def test_the_most_similar_faces_are_found(faces, judge):
    """Two copies among other faces come first, and the nearest training face of a training face is itself."""
    generated = faces[1].clone()
    generated[7] = generated[100] = faces[0][11]
    rows = judge.most_similar(generated, pairs=2).view(3, 2, *generated.shape[1:])
    assert all(torch.equal(row[0], faces[0][11]) for row in rows)
