"""What each recipe is worth:  python tests/ablation.py --data data --out DIR [--recipes "plain;1:1"] [--images 60000]

Trains WGAN-GP with each recipe and seed for the same number of images, as many runs at a time as there are cores, one
core each, and judges 1,000 faces of the last weights and of weights averaged in several ways against the held-out ones.
Recipes that did not help, so that gan.py does not have them, are written here as patches of it. Asked again, it makes
only what --out lacks and prints the table; a dozen minutes for two runs on two cores with bf16."""
import argparse
import copy
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import gan  # noqa: E402

RAMPS = (0.1, 0.2, 0.4)  # half-lives of averages, as shares of the images seen


class Trainer(gan.Trainer):
    """Keeps an average of the generator's weights for each of RAMPS."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.averages = {ramp: copy.deepcopy(self.generator) for ramp in RAMPS}
        self.networks |= {f"averaged {ramp}": network for ramp, network in self.averages.items()}

    def move_average(self):
        usual, since = {gan.AVERAGE_HALF_LIFE: self.averaged}, self.progress.averaged_at
        for ramp, network in (self.averages | usual).items():  # the usual one last, so that all is as it was
            gan.AVERAGE_HALF_LIFE, self.averaged, self.progress.averaged_at = ramp, network, since
            super().move_average()

    def take_statistics(self):
        usual = self.averaged
        for network in (*self.averages.values(), usual):
            self.averaged = network
            super().take_statistics()


def decay(images: int):
    """Learning rates fall with the square root of the images seen, from so many on."""
    def patch():
        train_minibatch = Trainer.train_minibatch

        def decaying(self, real):
            for optimizer in self.optimizers.values():
                for group in optimizer.param_groups:
                    first = group.setdefault("first_rate", group["lr"])
                    group["lr"] = first * min(1, (images / max(1, self.progress.images_seen)) ** 0.5)
            train_minibatch(self, real)
        Trainer.train_minibatch = decaying
    return patch


def unmirrored():
    """Photos as they are."""
    epoch = gan.TrainingFaces.epoch

    def turned_back(self, number, first=0):
        for real in epoch(self, number, first):
            real[::2] = real[::2].flip(3)
            yield real
    gan.TrainingFaces.epoch = turned_back


def augmented(x: torch.Tensor) -> torch.Tensor:
    """Colour, translation and cutout (arXiv 2006.10738), differentiable, other ones for each face (N, 3, S, S)."""
    number, _, side, _ = x.shape

    def uniform():
        return torch.rand(number, 1, 1, 1).to(x.dtype)
    x = x + uniform() - 0.5
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * 2 * uniform() + grey
    level = x.mean((1, 2, 3), keepdim=True)
    x = (x - level) * (0.5 + uniform()) + level
    shift = side // 8
    padded = F.pad(x, (shift,) * 4)
    places = torch.randint(0, 2 * shift + 1, (number, 2)).tolist()
    x = torch.stack([face[:, top:top + side, left:left + side] for face, (top, left) in zip(padded, places)])
    hole = torch.ones(number, 1, side, side, dtype=x.dtype)
    for mask, (top, left) in zip(hole, torch.randint(-side // 4, 3 * side // 4, (number, 2)).tolist()):
        mask[:, max(top, 0):top + side // 2, max(left, 0):left + side // 2] = 0
    return (x * hole).contiguous(memory_format=torch.channels_last)


def augment():
    """The discriminator sees nothing but augmented faces."""
    forward = gan.DetailBoost.forward
    gan.DetailBoost.forward = lambda self, x: forward(self, augmented(x))


def lazy_penalty(every: int):
    """The gradient penalty at each `every`-th discriminator update, as many times as heavy."""
    def patch():
        penalty, updates = gan.WGANGP.penalty, count()
        gan.WGANGP.penalty = lambda self, *a: a[1].new_zeros(()) if next(updates) % every else every * penalty(self, *a)
    return patch


def sparse_penalty(every: int):
    """The gradient penalty at each `every`-th face of a minibatch."""
    def patch():
        penalty = gan.WGANGP.penalty
        gan.WGANGP.penalty = lambda self, discriminator, *faces: penalty(self, discriminator, *(x[::every] for x in faces))
    return patch


def normalised_z():
    """Latent vectors scaled to the length that most have, √128: those with many numbers near 0 make faces like any."""
    forward = gan.Generator.forward
    gan.Generator.forward = lambda self, z: forward(self, z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8))


def no_bias():
    """DCGAN's generator, whose first layer makes nothing of z = 0."""
    gan.Bias = lambda *shape: torch.nn.Identity()


def plain_detail():
    """The critic sees fine detail as it is."""
    gan.WGANGP.detail = torch.nn.Identity
    gan.WGANGP.prepare = gan.Objective.prepare


def lasting_detail():
    """Fine detail stays raised as high as it has risen."""
    prepare = gan.WGANGP.prepare
    gan.WGANGP.prepare = lambda self, discriminator, images_seen: prepare(self, discriminator, min(images_seen, 40_000))


def unfiltered():
    """No low-pass filter after a doubling or before a halving."""
    gan.Blur.forward = lambda self, x: x


def short_z(share: float):
    """In training, so many of the latent vectors are shortened, to a length uniform from 0 to their own."""
    def patch():
        forward = gan.Generator.forward

        def shortened(self, z):
            chosen, length = torch.rand(len(z), 1) < share, torch.rand(len(z), 1)
            return forward(self, torch.where(chosen, length, 1.0) * z if self.training else z)
        gan.Generator.forward = shortened
    return patch


def r3gan(gamma: float):
    """Relativistic pairing, zero-centred penalties on real and generated faces (arXiv 2501.05441)."""
    def patch():
        scores = {}

        def optimizer(self, network):
            return torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.0, 0.99), fused=True)

        def discriminator_loss(self, real, fake):
            scores["real"] = real.detach()
            return F.softplus(fake - real).mean()

        def penalty(self, discriminator, real, fake, mix):
            gradient = gan.input_gradient(discriminator.layers, discriminator.detail(torch.cat((real, fake))))
            return gamma * gan.at_least_float32(gradient).flatten(1).square().sum(1).mean()  # γ/2 of either half
        gan.WGANGP.optimizer, gan.WGANGP.discriminator_loss, gan.WGANGP.penalty = optimizer, discriminator_loss, penalty
        gan.WGANGP.generator_loss = lambda self, fake: F.softplus(scores["real"] - fake).mean()
    return patch


def balance(chooses):
    """Another rule in place of accuracy's: chooses(self, discriminator_accuracy, generator_accuracy) -> name."""
    def patch():
        gan.Balance.choose = chooses
    return patch


def smoothed(self, discriminator_accuracy, generator_accuracy, memory=0.9):
    """The accuracy rule on running means, a minibatch at a time."""
    before = getattr(self, "means", (discriminator_accuracy, generator_accuracy))
    measured = discriminator_accuracy, generator_accuracy
    self.means = [memory * old + (1 - memory) * new for old, new in zip(before, measured)]
    return "discriminator" if self.means[1] / 2 >= self.means[0] else "generator"


def threshold(limit: float):
    """The discriminator trains where its accuracy is below `limit`, a minibatch at a time."""
    return lambda self, discriminator_accuracy, _: "discriminator" if discriminator_accuracy < limit else "generator"


FIRST = {"balance": "half"}  # the rule before a threshold; most recipes were measured with it
# name: (settings of train, patches of gan.py)
RECIPES = {
    "default": ({}, []),
    "plain": (FIRST | {"learning_rate": 1e-4}, [no_bias]),
    "half": (FIRST, [no_bias]),
    "1:1": ({"balance": 1}, []),
    "2:1": ({"balance": 2}, []),
    "5:1": ({"balance": 5}, []),
    "threshold 0.6": ({}, [balance(threshold(0.6))]),
    "threshold 0.8": ({}, [balance(threshold(0.8))]),
    "threshold 0.9": ({}, [balance(threshold(0.9))]),
    "threshold 0.95": ({}, [balance(threshold(0.95))]),
    "half, smoothed": ({}, [no_bias, balance(smoothed)]),
    "half, bias": (FIRST, []),
    "half, bias, short z": (FIRST, [short_z(0.25)]),
    "half, normalised z": (FIRST, [no_bias, normalised_z]),
    "half, augmented": (FIRST, [no_bias, augment]),
    "half, lazy penalty": (FIRST, [no_bias, lazy_penalty(4)]),
    "plain detail": ({}, [plain_detail]),
    "unfiltered": ({}, [unfiltered]),
    "plain detail, unfiltered": ({}, [plain_detail, unfiltered]),
    "unmirrored": ({}, [unmirrored]),
    "lasting detail": ({}, [lasting_detail]),
    "penalty at every fifth": ({}, [sparse_penalty(5)]),
    "minibatches of 10": ({"batch_size": 10, "learning_rate": 2.8e-4}, []),
    "augmented": ({}, [augment]),
    "decay": ({}, [decay(100_000)]),
    "R3GAN": ({"balance": 1}, [no_bias, r3gan(1.0)]),
    "R3GAN, gamma 0.1": ({"balance": 1}, [no_bias, r3gan(0.1)]),
    "DCGAN": ({"model": "DCGAN"}, []),
    "DCGAN half": ({"model": "DCGAN"} | FIRST, []),
    "DCGAN 1:1": ({"model": "DCGAN", "balance": 1}, []),
    "WGAN": ({"model": "WGAN"}, []),
    "WGAN half": ({"model": "WGAN"} | FIRST, []),
    "WGAN 1:1": ({"model": "WGAN", "balance": 1}, []),
    "WGAN threshold 0.9": ({"model": "WGAN"}, [balance(threshold(0.9))]),
}


def run_one(data: Path, folder: Path, recipe: str, seed: int, images: int, width: int) -> None:
    """Train and judge one run, in this process; write its scores to FOLDER.json."""
    settings, patches = RECIPES[recipe]
    gan.Trainer = Trainer
    for patch in patches:
        patch()
    faces, held_out = gan.load_faces(data)[0], gan.load_faces(data, "held_out")[0]
    epochs = max(1, round(images / len(faces)))
    if gan.train(gan.TrainSettings(data=str(data), run=str(folder), seed=seed, epochs=epochs, device="cpu",
                                   sample_every=10, judge_every=20, save_every=20, keep_every=10**6, width=width,
                                   **settings)):
        raise SystemExit("stopped")
    state, judge, scores = gan.read_checkpoint(folder / "last.pt"), gan.Judge(faces, held_out, torch.device("cpu")), {}
    z = gan.sample_latents(judge.count, 99)
    for name, weights in state["networks"].items():
        if name != "discriminator":
            generator = gan.Generator(state["image_size"], state["settings"]["width"]).eval()
            generator.load_state_dict(weights)
            gan.channels_last(generator, torch.device("cpu"))
            scores[name] = judge.score(gan.sample_images(generator, z))
            if name == "averaged":
                scores["averaged, z / 4"] = judge.score(gan.sample_images(generator, z / 4))
    log = gan.read_log(folder)
    row = {"recipe": recipe, "seed": seed, "faces": len(faces), "images": state["progress"]["images_seen"],
           "discriminator_share": mean(line["discriminator_share"] for line in log),
           "judged": {line["epoch"]: line["scores"]["distance"] for line in log if "scores" in line},
           "seconds": sum(line["seconds"] for line in log), "scores": scores}
    gan.atomic_write(Path(f"{folder}.json"), json.dumps(row, indent=1).encode())
    for path in folder.glob("*.pt"):
        if path.name != "last.pt":
            path.unlink()


def table(out: Path) -> None:
    """Print what was found, a line a recipe, weights and number of faces, the seeds side by side."""
    rows = {}
    for path in sorted(out.glob("*.json")):
        row = json.loads(path.read_text())
        for weights, scores in row["scores"].items():
            rows.setdefault((row["faces"], row["images"] // 1000, row["recipe"], weights), []).append((row, scores))
    print(f"{'faces':>6s} {'k seen':>6s} {'recipe':22s} {'weights':14s} {'distance':>14s} "
          f"{'coverage':>12s} {'recall':>12s} {'precision':>12s} {'D':>5s} {'s':>5s}")
    for (faces, images, recipe, weights), found in sorted(rows.items()):
        cells = [", ".join(f"{scores[name]:.{digits}f}" for _, scores in found)
                 for name, digits in (("distance", 1), ("coverage", 2), ("recall", 2), ("precision", 2))]
        print(f"{faces:6d} {images:6d} {recipe:22s} {weights:14s} {cells[0]:>14s} {cells[1]:>12s} {cells[2]:>12s} "
              f"{cells[3]:>12s} {mean(row['discriminator_share'] for row, _ in found):5.2f} "
              f"{mean(row['seconds'] for row, _ in found):5.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a dataset with held-out faces")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and scores")
    parser.add_argument("--recipes", default=";".join(RECIPES), help="names, with semicolons between them")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--one", nargs=2, metavar=("RECIPE", "SEED"), help=argparse.SUPPRESS)  # the process of one run
    arguments = parser.parse_args()
    if arguments.one:
        return run_one(arguments.data, arguments.out, arguments.one[0], int(arguments.one[1]), arguments.images,
                       arguments.width)
    arguments.out.mkdir(parents=True, exist_ok=True)
    faces = gan.read_manifest(arguments.data)["count"]

    def start(job: tuple[str, str]) -> None:
        folder = arguments.out / re.sub(r"[^a-zA-Z0-9.]+", "-", f"{job[0]}-{faces}-{arguments.images}-{job[1]}")
        if Path(f"{folder}.json").exists():
            return
        common = ["--data", str(arguments.data), "--out", str(folder), "--images", str(arguments.images),
                  "--width", str(arguments.width)]
        with open(f"{folder}.txt", "w") as output:
            subprocess.run([sys.executable, __file__, *common, "--one", *job], check=True, stdout=output,
                           env=os.environ | {"OMP_NUM_THREADS": "1"})
    with ThreadPoolExecutor(gan.usable_cores()) as pool:
        list(pool.map(start, [(recipe, seed) for recipe in arguments.recipes.split(";")
                              for seed in arguments.seeds.split(",")]))
    table(arguments.out)


if __name__ == "__main__":
    main()
