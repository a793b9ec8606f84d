"""Losses, accuracies and constraints against values worked out by hand or by other means."""
import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

import gan

REAL, FAKE = torch.tensor([2.0, -1.0, 0.5, 3.0]), torch.tensor([-2.0, 1.0, 0.0, -0.5])


def objective(model, **settings):
    return gan.OBJECTIVES[model](gan.TrainSettings(model=model, **settings))


def wrong_penalty(discriminator, real, fake, mix):
    """The version found in tutorials: normal mixing weights, and the norm over channels only. Kept to be caught."""
    mix = torch.randn(len(real), 1, 1, 1)
    between = (mix * real + (1 - mix) * fake).requires_grad_()
    gradient, = torch.autograd.grad(discriminator(between).sum(), between, create_graph=True)
    return 10 * ((gradient.norm(2, dim=1) - 1) ** 2).mean()


class Critic(torch.nn.Module):
    """Scores of faces (N, 3, S, S) by a function of them, whose gradient autograd finds."""

    def __init__(self, score, monkeypatch):
        super().__init__()
        self.detail, self.layers = torch.nn.Identity(), score
        monkeypatch.setattr(gan, "input_gradient", lambda layers, x: torch.autograd.grad(
            layers(x.requires_grad_()).sum(), x)[0])

    def forward(self, x):
        return self.layers(self.detail(x))


def linear(slope):
    """A score whose gradient is the same everywhere."""
    return lambda x: (x * slope).flatten(1).sum(1)


def quadratic(x):
    """|x|²/2, whose gradient is x itself, so that it shows where the penalty looks."""
    return x.square().flatten(1).sum(1) / 2


@pytest.mark.parametrize("penalty", [objective("WGAN-GP").penalty, wrong_penalty])
def test_penalty_of_a_linear_critic(monkeypatch, penalty):
    """10 · (‖slope‖ − 1)²: exactly 0 for a slope of norm 1. The wrong variant is told apart."""
    slope = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    slope /= slope.norm()
    real, fake, mix = torch.randn(5, 3, 8, 8), torch.randn(5, 3, 8, 8), torch.rand(5)
    critics = [Critic(linear(factor * slope), monkeypatch) for factor in (1.0, 3.0, 0.5)]
    values = [penalty(critic, real, fake, mix).item() for critic in critics]
    right = values == pytest.approx([0, 40, 2.5], abs=1e-4)
    assert right == (penalty is not wrong_penalty)


@pytest.mark.parametrize("penalty", [objective("WGAN-GP").penalty, wrong_penalty])
def test_penalty_looks_between_the_real_and_the_fake(monkeypatch, penalty):
    """At real·mix + fake·(1 − mix), one mix a sample: a critic whose gradient is its input shows the place."""
    real, fake = torch.full((4, 3, 2, 2), 2.0), torch.full((4, 3, 2, 2), -1.0)
    mix = torch.tensor([0.0, 0.25, 0.5, 1.0])
    places = 2 * mix - (1 - mix)
    expected = 10 * (places.abs() * math.sqrt(12) - 1).square().mean()
    right = torch.isclose(penalty(Critic(quadratic, monkeypatch), real, fake, mix), expected, rtol=1e-5)
    assert right == (penalty is not wrong_penalty)


def test_mixing_weights_in_training_are_uniform_one_a_sample(monkeypatch):
    """What the loop hands to the penalty lies in [0, 1], a number a sample, with a uniform's mean and variance."""
    mixes = []
    trainer = gan.Trainer(gan.TrainSettings(width=4, balance=1000, precision="fp32"), 32, torch.device("cpu"))
    monkeypatch.setattr(trainer.objective, "penalty", lambda d, real, fake, mix: mixes.append(mix) or real.new_zeros(()))
    for _ in range(20):
        trainer.train_minibatch(torch.zeros(50, 3, 32, 32))
    mix = torch.cat(mixes)
    assert mix.shape == (1000,) and mix.min() >= 0 and mix.max() <= 1
    assert abs(mix.mean() - 1 / 2) < 0.04 and abs(mix.var() - 1 / 12) < 0.01


def test_penalty_gradient_matches_finite_differences():
    """Its derivative by the discriminator's weights, the second derivative of the scores, is right."""
    torch.manual_seed(0)
    critic = gan.Discriminator(32, 4, gan.InstanceNorm).double()
    for weight in critic.parameters():
        torch.nn.init.normal_(weight, 0.5, 0.5)
    real, fake, mix = torch.randn(2, 3, 32, 32).double(), torch.randn(2, 3, 32, 32).double(), torch.rand(2).double()
    weight = critic.layers[3].weight
    value = objective("WGAN-GP").penalty(critic, real, fake, mix)
    gradient, = torch.autograd.grad(value, weight)
    direction, step = torch.randn_like(weight), 1e-6
    ends = []
    for sign in (1, -1):
        weight.data += sign * step * direction
        ends.append(objective("WGAN-GP").penalty(critic, real, fake, mix).item())
        weight.data -= sign * step * direction
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx((gradient * direction).sum().item(), rel=1e-4)


def test_fine_detail_is_raised_for_wgan_gp_alone():
    """From 10,000 to 40,000 images seen, and less again until 100,000; training tells the discriminator."""
    trainers = {model: gan.Trainer(gan.TrainSettings(model=model, width=4), 32, torch.device("cpu")) for model in gan.OBJECTIVES}
    x, gains = torch.rand(2, 3, 32, 32), []
    for images_seen in (1, 10_000, 25_000, 40_000, 70_000, 10**7):
        for trainer in trainers.values():
            trainer.progress.images_seen = images_seen
            trainer.train_minibatch(torch.zeros(2, 3, 32, 32))
        assert all(torch.equal(trainers[model].discriminator.detail(x), x) for model in ("DCGAN", "WGAN"))
        gains.append(trainers["WGAN-GP"].discriminator.detail.gain.item())
    assert gains == pytest.approx([0, 0, 0.5, 1, 0.65, 0.3])


def test_dcgan_losses_are_cross_entropy():
    """Equal to the library's cross-entropy on logits, with the non-saturating generator loss."""
    dcgan, ones = objective("DCGAN"), torch.ones(4)
    assert dcgan.discriminator_loss(REAL, FAKE).item() == pytest.approx(
        (cross_entropy(REAL, ones) + cross_entropy(FAKE, 0 * ones)).item())
    assert dcgan.generator_loss(FAKE).item() == pytest.approx(cross_entropy(FAKE, ones).item())


@pytest.mark.parametrize("model", ["WGAN", "WGAN-GP"])
def test_wasserstein_losses(model):
    """mean(fake) − mean(real) = −0.375 − 1.125; the generator's −mean(fake)."""
    assert objective(model).discriminator_loss(REAL, FAKE).item() == pytest.approx(-1.5)
    assert objective(model).generator_loss(FAKE).item() == pytest.approx(0.375)


def test_dcgan_accuracies():
    """3 of 4 reals called real, 3 of 4 fakes called fake (a logit of 0 calls nothing real)."""
    assert [value.item() for value in objective("DCGAN").accuracies(REAL, FAKE)] == [0.75, 0.25]


@pytest.mark.parametrize("offset", [0.0, 1000.0, -1000.0])
def test_critic_accuracies_do_not_depend_on_an_offset(offset):
    """12 of the 16 pairs are in order whatever constant is added; no fake reaches the mean real score 1.125."""
    accuracies = objective("WGAN").accuracies(REAL + offset, FAKE + offset)
    assert [value.item() for value in accuracies] == [12 / 16, 0.0]


def test_wgan_clips_every_weight():
    """To ±--clip, the norms' too; the other two leave the weights alone."""
    for model, most in (("WGAN", 0.05), ("WGAN-GP", 1.0), ("DCGAN", 1.0)):
        network = gan.Discriminator(32, 4)
        for weight in network.parameters():
            torch.nn.init.constant_(weight, -1.0)
        objective(model, clip=0.05).constrain(network)
        assert all(weight.abs().max().item() == pytest.approx(most) for weight in network.parameters())


@pytest.mark.parametrize("model", gan.OBJECTIVES)
def test_the_learning_rate_is_what_is_asked_for(model):
    """The papers' own, and betas, are the reference's: test_train.py compares what they make."""
    assert objective(model, learning_rate=3e-3).optimizer(gan.Discriminator(32, 4)).param_groups[0]["lr"] == 3e-3
