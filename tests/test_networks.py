"""Shapes, sizes and weights of the networks."""
import math

import pytest
import reference
import torch
from conftest import cartoon_face, hear_z

import gan

SIZES = [32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256]


@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_its_networks(size):
    """At each size the generator makes faces of that size in [-1, 1] and the discriminator gives one number each."""
    faces = gan.Generator(size, 4)(torch.randn(2, 128))
    assert faces.shape == (2, 3, size, size)
    assert faces.abs().max() <= 1
    assert gan.Discriminator(size, 4)(faces).shape == (2,)


def test_shapes_at_80_are_the_documented_ones():
    """512×5×5, 256×10×10, 128×20×20, 64×40×40, 32×80×80, 3×80×80, and back."""
    shapes = {}
    for name, network, x in (("g", gan.Generator(80, 64), torch.randn(1, 128)),
                             ("d", gan.Discriminator(80, 64, gan.InstanceNorm), torch.randn(1, 3, 80, 80))):
        shapes[name] = []
        for layer in network.layers:
            if isinstance(layer, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
                layer.register_forward_hook(lambda _, __, y, name=name: shapes[name].append(tuple(y.shape[1:])))
        network.eval()(x)
    assert shapes["g"] == [(512, 5, 5), (256, 10, 10), (128, 20, 20), (64, 40, 40), (32, 80, 80), (3, 80, 80)]
    assert shapes["d"] == [(32, 80, 80), (64, 40, 40), (128, 20, 20), (256, 10, 10), (512, 5, 5), (1, 1, 1)]


def test_channels_are_capped_at_eight_widths():
    """At 256 pixels, six doublings, the widest layers have 8 × width channels; at full resolution there are width / 2."""
    assert gan.stage_channels(256, 16) == (4, [128, 128, 128, 64, 32, 16, 8])


@pytest.mark.parametrize(("model", "norm"), [("DCGAN", torch.nn.BatchNorm2d), ("WGAN", torch.nn.BatchNorm2d),
                                             ("WGAN-GP", gan.InstanceNorm)])
def test_weights_are_those_of_the_plain_networks(model, norm):
    """Same number of layers and weights as the plain reference, and the same results, also where z changes scales and
    shifts; no biases but the norms' and that of places, no norm on the first layers."""
    assert gan.OBJECTIVES[model].norm is norm
    for ours, plain in ((gan.Generator(80, 8), reference.generator(80, 8)),
                        (gan.Discriminator(80, 8, norm), reference.discriminator(model, 80, 8))):
        assert [p.shape for p in ours.parameters()] == [p.shape for p in plain.parameters()]
        hear_z(ours)
        for target, source in zip(plain.parameters(), ours.parameters(), strict=True):
            target.data.copy_(source.data)
        x = torch.randn(2, 128) if isinstance(ours, gan.Generator) else torch.randn(2, 3, 80, 80)
        assert torch.allclose(ours(x), plain(x), atol=1e-4)


def test_networks_of_before_make_the_same_faces():
    """A generator without changes by z, as older checkpoints hold it: of the norms alone."""
    before = gan.Generator(32, 8)
    after, state = gan.Generator(32, 8), {name: value for name, value in before.state_dict().items() if "by_z" not in name}
    hear_z(after)
    z, kept = torch.randn(2, 128), len(state)
    after.load_state_dict(state)
    assert torch.equal(before(z), after(z)) and len(state) == kept
    with pytest.raises(RuntimeError, match="layers.2.weight"):  # nothing else may be missing
        after.load_state_dict({name: value for name, value in state.items() if name != "layers.2.weight"})


def test_the_filter_is_the_binomial_one():
    """A checkerboard is gone but at the edges, a point becomes (1 2 1)⊗(1 2 1) / 16, and a constant stays."""
    x = torch.zeros(1, 3, 8, 8)
    x[0, 0, 4, 4], x[0, 1], x[0, 2] = 16, torch.tensor([[1.0, -1], [-1, 1]]).repeat(4, 4), 5
    point, board, constant = gan.Blur(3)(x)[0]
    assert point[3:6, 3:6].tolist() == [[1, 2, 1], [2, 4, 2], [1, 2, 1]] and point.sum() == 16
    assert board[1:-1, 1:-1].abs().max() == 0 and torch.all(constant[1:-1, 1:-1] == 5)


def test_fine_detail_is_raised():
    """Constants stay; gain 0 changes nothing; gain 1 makes a checkerboard four times as strong, and waves of 10 pixels
    by what the two filters leave of them."""
    detail, side = gan.DetailBoost().double(), 40
    wave = torch.cos(2 * torch.pi * torch.arange(side, dtype=torch.double) / 10).expand(side, side)
    board = torch.tensor([[1.0, -1], [-1, 1]], dtype=torch.double).repeat(side // 2, side // 2)
    x = torch.stack([torch.full_like(board, 0.3), board, wave])[None]
    assert torch.equal(detail(x), x)
    detail.gain.fill_(1)
    constant, fine, waves = detail(x)[0]
    a = math.cos(math.pi / 10) ** 4
    b = a * math.cos(2 * math.pi / 10) ** 4
    inside = slice(6, -6)
    assert torch.allclose(constant, x[0, 0]) and torch.allclose(fine[inside, inside], 4 * board[inside, inside])
    assert torch.allclose(waves[inside, inside], (b + 2 * (a - b) + 4 * (1 - a)) * wave[inside, inside])


def test_a_face_can_be_learned_at_zero():
    """DCGAN's first layer makes the same of z = 0 at all places, whatever its weights; with the bias of places not."""
    network, z = gan.Generator(80, 8).eval(), torch.zeros(1, gan.LATENT_SIZE)
    with torch.no_grad():
        convolution, bias, norm = network.layers[:3]
        assert norm(bias(convolution(z[:, :, None, None])), *norm.changes(z)).std((2, 3)).max() == 0
        bias.bias.normal_()
        assert norm(bias(convolution(z[:, :, None, None])), *norm.changes(z)).std((2, 3)).min() > 0.1


def test_instance_norm_equals_the_librarys():
    """Value, first and second derivative agree with nn.InstanceNorm2d."""
    torch.manual_seed(0)
    ours, theirs = gan.InstanceNorm(6).double(), torch.nn.InstanceNorm2d(6, affine=True).double()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.nn.init.normal_(mine)
        other.data.copy_(mine.data)
    x = torch.randn(3, 6, 5, 4, dtype=torch.double, requires_grad=True)
    probe = torch.randn_like(x)
    results = []
    for norm in (ours, theirs):
        y = norm(x)
        first, = torch.autograd.grad((y * probe).sum(), x, create_graph=True)
        results.append((y, first, *torch.autograd.grad(first.square().sum(), (x, norm.weight))))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_the_input_gradient_is_autograds():
    """Of scores by the faces with their detail raised, and what is derived from it by each weight: against autograd's
    second derivative."""
    torch.manual_seed(0)
    critic = gan.Discriminator(40, 4, gan.InstanceNorm).double()
    for weight in critic.parameters():
        torch.nn.init.normal_(weight, 0.1, 0.5)
    critic.detail.gain = 0.5
    faces = torch.randn(3, 3, 40, 40, dtype=torch.double)
    raised = critic.detail(faces).requires_grad_()
    expected, = torch.autograd.grad(critic.layers(raised).sum(), raised, create_graph=True)
    gradient = gan.input_gradient(critic.layers, critic.detail(faces))
    assert torch.allclose(gradient, expected, rtol=1e-9, atol=1e-12)
    weights = list(critic.parameters())
    seconds = (torch.autograd.grad(g.flatten(1).norm(dim=1).sum(), weights) for g in (gradient, expected))
    for a, b in zip(*seconds, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_initial_weights_depend_on_the_seed_alone():
    """The same seed gives the same weights whatever numbers were taken before, another one others; nobody's numbers change."""
    torch.manual_seed(7)
    first, expected = gan.seeded(1, gan.Generator, 32, 4), torch.rand(1, generator=torch.Generator().manual_seed(7))
    assert torch.rand(1) == expected
    again, other = (gan.seeded(seed, gan.Generator, 32, 4) for seed in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.layers[0].weight, other.layers[0].weight)


def test_the_first_penalties_are_moderate(auto):
    """A critic that begins with huge gradients hardly learns for a thousand updates: DCGAN's N(0, 0.02) gave 645."""
    faces = torch.from_numpy(gan.np.stack([cartoon_face(0, i, 80) for i in range(20)])).permute(0, 3, 1, 2)
    trainer = gan.Trainer(gan.TrainSettings(width=16, balance=1000), 80, torch.device("cpu"))
    trainer.train_minibatch(gan.to_face(faces))
    assert dict(zip(gan.COLUMNS, trainer.rows[-1], strict=True))["gradient_penalty"] < 60
