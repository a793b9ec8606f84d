"""The accuracy-balanced loop written plainly: float32, contiguous memory, the library's own norms and unfused
optimizers, a forward pass to measure and another to train, backward through everything. It is the oracle that gan.py's
fast path is compared with, and the baseline of the benchmarks. Nothing here is imported from gan.py."""
from itertools import pairwise

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy


def stages(size: int, width: int) -> tuple[int, list[int]]:
    """80, 64 -> 5, [512, 256, 128, 64, 32]."""
    count = {size // 2 ** n: n for n in range(8) if 4 <= size / 2 ** n < 8}
    (base, doublings), = count.items()
    return base, [*[min(8 * width, width * 2 ** n) for n in range(doublings)][::-1], width // 2]


class Plus(nn.Module):
    def __init__(self, *shape: int):
        super().__init__()
        self.summand = nn.Parameter(torch.zeros(shape))

    def forward(self, x):
        return x + self.summand


class Modulated(nn.Module):
    """Batch normalisation, then y + y·(scale of z) + (shift of z)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.by_z = nn.ParameterList([torch.zeros(128, 2 * channels)])  # after the norm's weights

    def forward(self, x, z):
        y, changes = self.norm(x), (z @ self.by_z[0])[:, :, None, None]
        scale, shift = changes[:, :len(self.norm.weight)], changes[:, len(self.norm.weight):]
        return y + y * scale + shift


class Generator(nn.Sequential):
    def forward(self, z):
        x = z
        for layer in self:
            x = layer(x, z) if isinstance(layer, Modulated) else layer(x)
        return x


def low_pass() -> nn.Sequential:
    """(1 2 1)⊗(1 2 1) / 16: the mean of two neighbours, twice."""
    return nn.Sequential(nn.AvgPool2d(2, 1, padding=1), nn.AvgPool2d(2, 1))


def generator(size: int = 80, width: int = 64) -> Generator:
    base, channels = stages(size, width)
    layers = [nn.Unflatten(1, (128, 1, 1)), nn.ConvTranspose2d(128, channels[0], base, bias=False),
              Plus(channels[0], base, base), Modulated(channels[0]), nn.ReLU()]
    for before, after in pairwise(channels):
        layers += [nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False)]
        if after in channels[-2:]:
            layers += [low_pass()]
        layers += [Modulated(after), nn.ReLU()]
    return Generator(*layers, nn.Conv2d(channels[-1], 3, 3, 1, 1, bias=False), nn.Tanh())


def discriminator(model: str, size: int = 80, width: int = 64) -> nn.Sequential:
    base, channels = stages(size, width)
    first, second, *others = channels[::-1]
    layers = [nn.Conv2d(3, first, 3, 1, 1, bias=False), nn.LeakyReLU(0.2), low_pass(),
              nn.Conv2d(first, second, 4, 2, 1, bias=False), nn.LeakyReLU(0.2), low_pass()]
    before = second
    for after in others:
        norm = nn.InstanceNorm2d(after, affine=True) if model == "WGAN-GP" else nn.BatchNorm2d(after)
        layers += [nn.Conv2d(before, after, 4, 2, 1, bias=False), norm, nn.LeakyReLU(0.2)]
        before = after
    return nn.Sequential(*layers, nn.Conv2d(before, 1, base, bias=False), nn.Flatten(0))


class Reference:
    """Both networks of one GAN and their optimizers, trained a minibatch at a time."""

    def __init__(self, model: str, size: int = 80, width: int = 64):
        self.model, self.g, self.d = model, generator(size, width), discriminator(model, size, width)
        make = {"DCGAN": lambda p: torch.optim.Adam(p, 2e-4, (0.5, 0.999)),
                "WGAN": lambda p: torch.optim.RMSprop(p, 5e-5),
                "WGAN-GP": lambda p: torch.optim.Adam(p, 4e-4, (0.0, 0.999))}[model]
        self.optimizer_g, self.optimizer_d = make(self.g.parameters()), make(self.d.parameters())
        self.discriminator_left = 0

    def copy_weights(self, g: nn.Module, d: nn.Module) -> None:
        """Take over the weights of networks with the same layers in the same order."""
        for mine, theirs in ((self.g, g), (self.d, d)):
            for target, source in zip(mine.parameters(), theirs.parameters(), strict=True):
                target.data.copy_(source.data)

    def accuracies(self, real, fake) -> tuple[float, float]:
        if self.model == "DCGAN":
            return ((real > 0).float().mean() + (fake <= 0).float().mean()).item() / 2, (fake > 0).float().mean().item()
        pairs = [float(r > f) for r in real for f in fake]
        return sum(pairs) / len(pairs), (fake >= real.mean()).float().mean().item()

    def penalty(self, real, fake, mix):
        mix = mix.view(-1, 1, 1, 1)
        between = (mix * real + (1 - mix) * fake).requires_grad_()
        gradient, = torch.autograd.grad(self.d(between).sum(), between, create_graph=True)
        return 10 * ((gradient.reshape(len(real), -1).norm(2, dim=1) - 1) ** 2).mean()

    def update_discriminator(self, real, z, mix) -> torch.Tensor:
        fake = self.g(z)
        self.optimizer_d.zero_grad()
        s_real, s_fake = self.d(real), self.d(fake)
        if self.model == "DCGAN":
            loss = cross_entropy(s_real, torch.ones_like(s_real)) + cross_entropy(s_fake, torch.zeros_like(s_fake))
        else:
            loss = s_fake.mean() - s_real.mean()
        if self.model == "WGAN-GP":
            loss = loss + self.penalty(real, fake, mix)
        loss.backward()
        self.optimizer_d.step()
        if self.model == "WGAN":
            for weight in self.d.parameters():
                weight.data.clamp_(-0.1, 0.1)
        return loss.detach()

    def update_generator(self, z) -> torch.Tensor:
        self.optimizer_g.zero_grad()
        s_fake = self.d(self.g(z))
        loss = cross_entropy(s_fake, torch.ones_like(s_fake)) if self.model == "DCGAN" else -s_fake.mean()
        loss.backward()
        self.optimizer_g.step()
        return loss.detach()

    def train_minibatch(self, real, z, make_mix, enough: float | None = None) -> str:
        """One minibatch, balanced by accuracy: by the first rule, or by the one that has the discriminator train while
        its accuracy is below `enough`. `make_mix()` gives mixing weights, if any are needed."""
        discriminator_accuracy, generator_accuracy = self.accuracies(self.d(real), self.d(self.g(z)))
        if enough is not None:
            self.discriminator_left = int(discriminator_accuracy < enough)
        elif self.discriminator_left == 0 and generator_accuracy / 2 >= discriminator_accuracy:
            self.discriminator_left = 5
        if self.discriminator_left == 0:
            self.update_generator(z)
            return "generator"
        self.discriminator_left -= 1
        self.update_discriminator(real, z, make_mix())
        return "discriminator"
