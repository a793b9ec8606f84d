"""The Jacobian and what follows from it, on linear generators whose answers are known in closed form."""
import math

import pytest
import torch
from torch import nn

import gan

SIZE = 16
PIXELS = 3 * SIZE * SIZE


class Linear(nn.Module):
    """Faces that are a matrix (3·S·S, 128) times the latent vector."""

    def __init__(self, matrix: torch.Tensor):
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return (z @ self.matrix.T).view(len(z), 3, SIZE, SIZE)


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """Closed forms are compared in the digits that float32 has, whatever the processor would choose."""
    monkeypatch.setattr(gan, "pick_precision", lambda *_: "fp32")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def top_half() -> torch.Tensor:
    mask = torch.zeros(SIZE, SIZE)
    mask[:SIZE // 2] = 1
    return mask


def test_jacobian_of_a_linear_generator_is_its_matrix():
    """Wherever it is taken."""
    matrix = noise(PIXELS, 128)
    for seed in (1, 2):
        assert torch.allclose(gan.jacobian(Linear(matrix), noise(128, seed=seed)), matrix, atol=1e-4)


def test_jacobian_of_a_network_is_its_central_difference():
    """Against differences in float64; those of another place are told apart, and the network stays as it was."""
    torch.manual_seed(0)
    generator, z = gan.Generator(32, 4), noise(128)
    for layer in generator.layers:
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_var.uniform_(0.005, 0.02)
    found, state = gan.jacobian(generator, z), {name: value.clone() for name, value in generator.state_dict().items()}
    generator.eval().double()
    step = 1e-5 * torch.eye(128, dtype=torch.float64)
    with torch.no_grad():
        expected, elsewhere = [((generator(place + step) - generator(place - step)) / 2e-5).flatten(1).T.float()
                               for place in (z.double(), -z.double())]
    assert (found - expected).norm() < 1e-3 * expected.norm() < 0.1 * (found - elsewhere).norm()
    assert all(torch.equal(value, state[name]) for name, value in generator.float().state_dict().items())


def test_bf16_bends_no_direction(monkeypatch):
    """With the precision that is used where it is native, each column points where the exact one does."""
    torch.manual_seed(0)
    generator, z = gan.Generator(32, 4), noise(128)
    exact = gan.jacobian(generator, z)
    monkeypatch.setattr(gan, "pick_precision", lambda *_: "bf16")
    assert torch.cosine_similarity(gan.jacobian(generator, z), exact, dim=0).min() > 0.97


def test_strongest_directions_are_singular_vectors():
    """Those of the matrix, largest first, towards brighter faces, with the RMS change of a step of 1."""
    left, right = torch.linalg.qr(noise(PIXELS, 128))[0], torch.linalg.qr(noise(128, 128, seed=1))[0]
    sizes = torch.logspace(0, -2, 128)
    generator = Linear(left * sizes @ right.T)
    found, strengths = gan.strongest_directions(generator, count=5)
    assert ((found @ right[:, :5]).abs() - torch.eye(5)).abs().max() < 0.05
    assert torch.allclose(strengths, sizes[:5] / math.sqrt(PIXELS) * 127.5, rtol=0.02)
    assert (generator(found).sum((1, 2, 3)) > 0).all()


def test_a_regions_slider_leaves_the_rest_alone():
    """Of numbers that move the region, the rest, and (most of all) both: the first. The strongest inside is the wrong one."""
    matrix = torch.zeros(PIXELS, 128)
    inside = top_half().flatten().repeat(3).bool()
    matrix[inside, 0], matrix[~inside, 1], matrix[:, 2] = 0.1, 0.3, 0.5
    vectors, within, beyond = gan.region_sliders(matrix, top_half(), count=3)
    assert vectors.norm(dim=1).tolist() == pytest.approx([1, 1, 1], abs=1e-4)
    best = vectors[0] / vectors[0, 0]
    moved = matrix @ vectors[0]
    assert moved[~inside].abs().max() < 0.02 * moved[inside].abs().mean() and best[0] == 1
    assert within[0].item() == pytest.approx(moved[inside].square().mean().sqrt().item() * 127.5, rel=1e-3)
    assert beyond[0].item() == pytest.approx(moved[~inside].square().mean().sqrt().item() * 127.5, abs=0.05)
    assert torch.linalg.eigh(matrix[inside].T @ matrix[inside])[1][2, -1].abs() > 0.9  # what JᵀMJ alone would choose


def test_a_region_gets_the_sliders_that_are_its_own():
    """Those whose square is at least three times that of what they do elsewhere, or else the best three."""
    def kept(*shares: float) -> int:
        matrix = torch.zeros(2, PIXELS // 2, 128)  # each number moves pixels of its own, in both halves
        for number, share in enumerate(shares):
            matrix[:, number::128, number] = torch.tensor([0.5, 0.5 * share])[:, None]
        matrix = matrix.view(2, 3, SIZE // 2, SIZE, 128).transpose(0, 1).reshape(PIXELS, 128)
        found = gan.describe_sliders(matrix, top_half())
        for slider, share in zip(found, shares):
            assert slider["outside"] == pytest.approx(share * slider["inside"], rel=0.01)
        return len(found)
    assert kept(0.1, 0.2, 0.3, 0.5, 0.55) == 5
    assert kept(0.1, 0.2, 0.3, 0.5, 0.65) == 4
    assert kept(0.6, 0.7, 0.8, 0.9, 0.95) == 3


def test_regions_are_what_moves_together():
    """Halves that answer to different numbers share no region."""
    matrix = torch.zeros(3, SIZE, SIZE, 128)
    matrix[:, :SIZE // 2, :, :20], matrix[:, SIZE // 2:, :, 20:40] = noise(20), noise(20, seed=1)
    found = gan.find_regions(matrix.view(PIXELS, 128), SIZE)
    assert found.shape == (SIZE, SIZE) and found.min() >= 0 and found.max() < 9
    assert not set(found[:SIZE // 2 - 1].flatten().tolist()) & set(found[SIZE // 2 + 1:].flatten().tolist())


def test_where_all_pixels_answer_alike_place_divides_them():
    """Into several regions, one above another, each the same left and right."""
    found = gan.find_regions(torch.ones(PIXELS, 128), SIZE)
    assert len(found[:, SIZE // 2].unique()) > 1 and len(found.unique()) > 3
    assert torch.equal(found[:, 1:], found[:, 1:].flip(1))


def test_regions_follow_both_answers_and_place():
    """Answers that are the same along slanting bands: by place alone a region would be a third of the face high, by
    answers alone as high as the face."""
    row, column = torch.meshgrid(*[torch.arange(32) / 32] * 2, indexing="ij")
    matrix, angle = torch.zeros(3, 32, 32, 128), math.pi * (column + 2 * row)
    matrix[..., 0], matrix[..., 1] = angle.sin(), angle.cos()
    found = gan.find_regions(matrix.view(-1, 128), 32)
    heights = [row[found == number].max() - row[found == number].min() for number in found.unique()]
    assert 0.4 < max(heights) < 0.7


@pytest.mark.parametrize("size", [32, 80])
def test_regions_have_the_names_of_what_lies_there(size):
    """The parts of which they have most; pairs are told as pairs; what has most of none, which it is near; no two alike."""
    def covering(top: float, bottom: float, left: float, right: float) -> torch.Tensor:
        mask = torch.zeros(size, size)
        mask[int(top * size):int(bottom * size), int(left * size):int(right * size)] = 1
        return mask
    for box, name in (((0.33, 0.58, 0.25, 0.75), "eyes, nose"), ((0.33, 0.5, 0.5, 0.75), "right eye"),
                      ((0.65, 1, 0.2, 0.8), "mouth, chin"), ((0, 0.32, 0.2, 0.8), "hair, forehead"),
                      ((0.7, 1, 0, 0.2), "bottom left corner"), ((0.67, 0.71, 0.4, 0.6), "near the mouth"),
                      ((0, 1, 0, 1), "hair, forehead, eyes, nose, cheeks, mouth, chin, sides, top corners, bottom corners")):
        assert gan.name_regions([covering(*box)]) == [name]
    thirds = [covering(0.66, 0.78, left, left + 0.12) for left in (0.32, 0.44, 0.56)]
    names = gan.name_regions(thirds)
    assert len(set(names)) == 3 and all(name.startswith("near the ") for name in names)


def test_one_step_solves_a_linear_fit(monkeypatch):
    """Without a prior, the weighted least-squares solution; with other weights it is another one."""
    monkeypatch.setattr(gan, "PRIOR", 0.0)
    matrix, target = noise(PIXELS, 128) / 20, noise(3, SIZE, SIZE, seed=1)
    weights = top_half() + 0.1
    root = weights.flatten().repeat(3).sqrt()[:, None]
    expected = torch.linalg.lstsq(matrix * root, target.flatten()[:, None] * root).solution[:, 0]
    found = gan.fit_step(Linear(matrix), noise(128, seed=2), matrix, target, weights)
    assert torch.allclose(found, expected, atol=1e-3)
    assert not torch.allclose(gan.fit_step(Linear(matrix), found, matrix, target, 1.1 - weights), expected, atol=0.1)


def test_a_fit_keeps_to_the_length_that_training_saw():
    """Where no pixel has a say, a vector goes to a length of sqrt(128) and keeps its direction."""
    z = noise(128) * 0.3
    found = gan.fit_step(Linear(torch.zeros(PIXELS, 128)), z, torch.zeros(PIXELS, 128), torch.zeros(3, SIZE, SIZE), top_half())
    assert found.norm().item() == pytest.approx(math.sqrt(128), rel=0.01)
    assert torch.cosine_similarity(found, z, 0) > 0.999


def test_a_fit_never_gets_worse():
    """From a vector that is best already, and with a Jacobian that leads astray, no step is made."""
    matrix, z = noise(PIXELS, 128) / 20, noise(128, seed=1)
    z *= math.sqrt(128) / z.norm()
    target = Linear(matrix)(z[None])[0].detach()
    assert torch.allclose(gan.fit_step(Linear(matrix), z, matrix, target, top_half()), z, atol=1e-3)
    away = z + 0.1
    wrong = gan.fit_step(Linear(matrix), away, -matrix, target, torch.ones(SIZE, SIZE))
    before, after = gan.distances_to(target, Linear(matrix)(torch.stack([away, wrong])), torch.ones(SIZE, SIZE))
    assert after <= before


def test_distance_is_rms_in_grey_levels():
    """A face that differs by 2/255 of the range everywhere is 2 levels away, where it counts."""
    target = torch.zeros(3, SIZE, SIZE)
    faces = torch.stack([target, target + 2 / 127.5])
    faces[1, :, SIZE // 2:] += 1  # where weights are 0
    assert gan.distances_to(target, faces, top_half()).tolist() == pytest.approx([0, 2], abs=1e-4)


def test_a_face_of_the_network_is_found_again():
    """A photo that a network made itself is approached step by step, much nearer than the best of 256 at random."""
    torch.manual_seed(0)
    generator = gan.Generator(32, 8).eval()
    for layer in generator.layers:
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_var.uniform_(0.005, 0.02)
    weights = gan.face_weights(32)
    with torch.no_grad():
        target = generator(noise(1, 128, seed=7))[0]
        start = gan.distances_to(target, generator(gan.fit_start(generator, target, weights)[None]), weights).item()
    distances = [distance for _, distance in gan.fit_photo(generator, target, weights)]
    assert distances[-1] < start / 2 and len(distances) <= 12


def test_face_weights_are_largest_in_the_middle():
    """Symmetric, falling from the middle outwards."""
    weights = gan.face_weights(32)
    assert torch.allclose(weights, weights.T) and torch.allclose(weights, weights.flip(0))
    assert weights.max() == weights[15, 15] and (weights[15, :15].diff() > 0).all() and weights[0, 0] < 0.1
