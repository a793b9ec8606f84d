"""The probes in the box, .box/probes.pt, which tell what a face shows, and what the directions with names do.

    python tests/probes.py learn FACES PHOTOS     probes of smiles, ages and turns, and how well they tell other faces
    python tests/probes.py table FACES PHOTOS CHECKPOINT ...      what each named direction changes, as other probes see it
    python tests/probes.py picture OUT            faces of the box between the ends of three names, as in the README

FACES holds smile/yes, smile/no (github.com/hromi/SMILEsmileD) and age/NUMBER-AGE.jpg (UTKFace); PHOTOS is a folder of Labeled
Faces in the Wild, whose turns are told by where the face detector sees nose and eyes. Nothing of them is kept. Probes are learnt
from one half of the labels; `table` has its own from the other half."""
import random
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import gan  # noqa: E402

WHOLE = [0.0, 0.0, 1.0, 1.0]
FRAMES = {"smile": [0.225, 0.15, 0.925, 0.85], "age": [0.15, 0.075, 1.0, 0.925], "turn": WHOLE}  # what of our faces labels show


def seen(images: list[Image.Image]) -> torch.Tensor:
    """What a probe sees of pictures that show its frame alone, (N, 3120)."""
    arrays = [torch.from_numpy(np.array(image.resize((64, 64), Image.Resampling.LANCZOS))) for image in images]
    faces, space = gan.to_face(torch.stack(arrays).permute(0, 3, 1, 2)), gan.FeatureSpace()
    return torch.cat([gan.seen_in(WHOLE, part, space) for part in faces.split(50)])


def labelled(faces: Path, photos: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the faces labelled with an attribute, in an order by chance: what a probe sees, and the labels, (N,)."""
    if name == "smile":
        files = sorted(faces.glob("smile/*/*.jpg"))
        pairs = [(Image.open(file).convert("RGB"), float(file.parent.name == "yes")) for file in files]
    elif name == "age":
        pairs = [(Image.open(file).convert("RGB"), float(file.stem.partition("-")[2])) for file in sorted(faces.glob("age/*.jpg"))]
    else:
        pairs = [turned(file) for file in random.Random(0).sample(sorted(photos.rglob("*.jpg")), 3000)]
        pairs = [(face, turn) for face, turn in pairs if abs(turn) < 1.2]
    random.Random(0).shuffle(pairs)
    return seen([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])


def turned(file: Path) -> tuple[Image.Image, float]:
    """A photo's central half, and how far its nose lies to the right of the middle between the eyes, in distances of eyes."""
    photo = Image.open(file).convert("RGB")
    face = photo.crop(gan.crop_box(*photo.size, 0.5))
    boxes, landmarks = gan.face_detector()(np.asarray(face.resize((320, 320))), threshold=0.4)
    if not len(boxes):
        return face, np.inf
    left, right, nose = landmarks[np.prod(boxes[:, 2:4] - boxes[:, :2], axis=1).argmax()].reshape(-1, 2)[:3]
    along = right - left
    return face, float((nose - (left + right) / 2) @ along / max(along @ along, 1))


def ridge(seen: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The linear map from what is seen to the labels, (3120,), all numbers of the same spread and damped by as much as that; mean
    and standard deviation of what is seen."""
    mean, spread = seen.mean(0), seen.std(0) + 1e-6
    scaled = (seen - mean) / spread
    square = scaled @ scaled.T / len(scaled) + torch.eye(len(scaled))
    return scaled.T @ torch.linalg.solve(square, labels - labels.mean()) / len(scaled) / spread, mean, spread


def threshold(answers: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Where a yes begins so that both kinds are told equally well, and which share of both is told."""
    def right(least):
        return (((answers > least) == labels)[labels].float().mean() + ((answers > least) == labels)[~labels].float().mean()) / 2
    best = max(answers.quantile(torch.linspace(0, 1, 200)).tolist(), key=right)
    return best, right(best).item()


def learn(faces: Path, photos: Path, half: int) -> tuple[dict[str, tuple[list[float], torch.Tensor]], float]:
    """(Each probe as gan.read_probes has it, of every second label; the answer from which on a face smiles); prints how well the
    other labels are told."""
    probes, smiles = {}, 0.0
    for name, frame in FRAMES.items():
        numbers, labels = labelled(faces, photos, name)
        weight, mean, spread = ridge(numbers[half::2], labels[half::2])
        weight = (weight / (numbers @ weight).std()).half()
        answers, others = (numbers @ weight.float())[1 - half::2], labels[1 - half::2]
        told = f"correlation {torch.corrcoef(torch.stack([answers, others]))[0, 1]:.3f}"
        if name == "smile":
            smiles, right = threshold(answers, others > 0)
            told = f"{right:.1%} told from no smile"
        print(f"{name}: {len(labels)} faces, of those not learnt from {told}")
        probes[name] = frame, torch.stack([weight, mean.half(), spread.half()])
    return probes, smiles


def ends(direction: dict, z: torch.Tensor) -> list[torch.Tensor]:
    """Latent vectors (N, 128) moved to either end of a named direction."""
    vector, at = torch.tensor(direction["vector"]), z @ torch.tensor(direction["measure"])
    return [z + (end * direction["reach"] - at)[:, None] * vector for end in (-1, 1)]


def table(checkpoint: Path, others: dict, smiles: float, faces: int = 300) -> None:
    """Prints, for each named direction, half the way between faces at its ends in standard deviations of each attribute, by the
    others' probes, and the own effect over the largest other; and how many of the faces at either end smile."""
    generator, _ = gan.load_generator(checkpoint, torch.device("cpu"))
    directions = [one for one in gan.find_directions(generator) if "name" in one]
    box, gan.read_probes = gan.read_probes, lambda: others  # the directions are the box's, what is seen of them is not
    z, names = gan.sample_latents(faces, seed=9), [*gan.NAMES]
    spread = gan.attributes(gan.sample_images(generator, z))[0].std(0)
    print(f"{checkpoint}\n{'':12}" + "".join(f"{name[:9]:>10}" for name in names))
    for direction in directions:
        low, high = (gan.attributes(gan.sample_images(generator, end))[0] for end in ends(direction, z))
        effects, own = ((high - low).mean(0) / 2 / spread).tolist(), names.index(direction["name"])
        largest = max(abs(effect) for i, effect in enumerate(effects) if i != own)
        print(f"{direction['name']:12}" + "".join(f"{effect:10.2f}" for effect in effects) + f"   {effects[own] / largest:.1f}")
        if own == 0:
            print(f"smiles: {(low[:, 0] > smiles).float().mean():.1%} and {(high[:, 0] > smiles).float().mean():.1%}")
    gan.read_probes = box


def picture(out: Path, seeds: tuple[int, ...] = (5, 23, 32, 34)) -> None:
    """A row for each face: at one end, as it is, at the other, of a smile, an age and a turn."""
    generator, _ = gan.load_generator(gan.BOX / "best.pt", torch.device("cpu"))
    z = torch.cat([gan.sample_latents(1, seed) for seed in seeds])
    columns = []
    for direction in gan.find_directions(generator)[:3]:
        low, high = ends(direction, z)
        columns += [low, z, high]
    faces = torch.stack([gan.sample_images(generator, column) for column in columns], 1)
    gan.ImageOps.scale(gan.grid_image(faces.flatten(0, 1), columns=len(columns)), 1.5).save(out, quality=90)


if __name__ == "__main__":
    kind, *paths = sys.argv[1:2] + [Path(argument) for argument in sys.argv[2:]]
    if kind == "learn":
        torch.save(learn(*paths, half=0)[0], gan.BOX / "probes.pt")
    elif kind == "picture":
        picture(*paths)
    else:
        control = learn(*paths[:2], half=1)
        for path in paths[2:]:
            table(path, *control)
