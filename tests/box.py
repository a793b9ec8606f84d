"""The network in the box, .box/best.pt, from a run:  python tests/box.py RUN/best.pt

What eval, generate, export, invert and train --start-from need of a checkpoint, its averaged generator and its discriminator, in
float16; without optimizers, and with what it is said to be. It was made of the archive lfw-deepfunneled.tgz of Labeled Faces in
the Wild (vis-www.cs.umass.edu/lfw) by

    python gan.py prepare --dataset lfw-deepfunneled.tgz
    python gan.py train --run runs/lfw
    python tests/box.py runs/lfw/best.pt"""
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import gan  # noqa: E402


def halved(networks: dict[str, dict]) -> dict[str, dict]:
    """The networks in float16, all in one block of memory: it is written as one part, not as sixty."""
    there = {(name, key): tensor for name, network in networks.items() for key, tensor in network.items()
             if tensor.is_floating_point()}  # how many minibatches BatchNorm has seen nobody asks
    block = torch.cat([tensor.flatten() for tensor in there.values()]).half()
    parts = block.split([tensor.numel() for tensor in there.values()])
    found: dict[str, dict] = {name: {} for name in networks}
    for ((name, key), tensor), part in zip(there.items(), parts):
        found[name][key] = part.view(tensor.shape)
    return found


def boxed(state: dict) -> dict:
    """What goes into the box of a checkpoint's state."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {**{key: state[key] for key in ("version", "image_size", "faces", "scores", "started_from", "progress")},
            "settings": {**state["settings"], "data": gan.TrainSettings.data, "run": gan.BOX.name},
            "networks": halved({name: state["networks"][name] for name in ("averaged", "discriminator")}),
            "about": {"photos": "Labeled Faces in the Wild, deep-funneled, vis-www.cs.umass.edu/lfw", "commit": commit,
                      "torch": torch.__version__.partition("+")[0]}}


if __name__ == "__main__":
    source = Path(sys.argv[1])
    gan.BOX.mkdir(exist_ok=True)
    gan.write_checkpoint(gan.BOX / "best.pt", boxed(gan.read_checkpoint(source)))
    print(f"{source} in {gan.BOX / 'best.pt'}, {(gan.BOX / 'best.pt').stat().st_size / 1e6:.2f} MB")
