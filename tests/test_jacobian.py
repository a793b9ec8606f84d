"""The Jacobian and what follows from it, on linear generators whose answers are known in closed form."""
import math

import pytest
import torch
from conftest import hear_z
from torch import nn

import gan

SIZE = 16
PIXELS = 3 * SIZE * SIZE


class Linear(nn.Module):
    """Faces that are a matrix (3·S·S, 128) times the latent vector."""

    def __init__(self, matrix: torch.Tensor):
        super().__init__()
        size = math.isqrt(len(matrix) // 3)
        self.layers = nn.Sequential(nn.ConvTranspose2d(128, 3, size, bias=False))
        self.layers[0].weight = nn.Parameter(matrix.T.reshape(128, 3, size, size))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.layers(z[:, :, None, None])


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


def vivid_generator() -> gan.Generator:
    """One whose faces are vivid."""
    torch.manual_seed(0)
    generator = gan.Generator(32, 8).eval()
    for layer in generator.layers:
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_var.uniform_(0.005, 0.02)
    hear_z(generator)
    return generator


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
    hear_z(generator)
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
    """Those of a matrix, largest first, towards more; of what leaves others alone where something is held."""
    left, right = torch.linalg.qr(noise(PIXELS, 128))[0], torch.linalg.qr(noise(128, 128, seed=1))[0]
    linear = right * torch.logspace(0, -2, 128) @ left.T
    for held in (0, 2):
        found = gan.strongest_directions(linear, right[:, :held] @ noise(held, held), 5)
        assert ((found @ right[:, held:held + 5]).abs() - torch.eye(5)).abs().max() < 0.01
        assert ((found @ linear).sum(1) > 0).all()


def planted(size: int = 32) -> Linear:
    """Faces in which the first number makes hair lighter and the background a little, the second the background and hair a
    little, the third what has no name; the others are faint noise."""
    areas = [(gan.away_from(gan.PARTS[name], size) <= 1).float() for name in ("hair", "background")]
    middle = (gan.away_from([(53, 50, 4, 4)], size) <= 1).float()
    matrix = 0.002 * noise(128, 3, size, size)
    for row, image in zip(matrix, (areas[0] + 0.5 * areas[1], areas[1] + 0.5 * areas[0], 3 * middle)):
        row.add_(0.1 * image)
    return Linear(matrix.flatten(1).T)


def test_a_direction_with_a_name_changes_its_own_alone(monkeypatch):
    """Lighter hair leaves the background as it is, although what makes hair lighter in most faces, the wrong direction, does
    not; the ends are where a face in fifty lies; what the named ones leave is the strongest of the rest."""
    monkeypatch.setattr(gan, "read_probes", dict)
    generator, z = planted(), noise(2000, 128, seed=7)
    found = gan.find_directions(generator)
    named = {one["name"]: one for one in found if "name" in one}
    assert {"hair", "background"} <= named.keys() and not named.keys() & {"smile", "age", "turn"} and len(found) == 12

    def shown(z):
        return gan.attributes(gan.sample_images(generator, z))[0][:, [[*gan.NAMES].index(name) for name in ("hair", "background")]]
    usual = shown(z)
    for own, name in enumerate(("hair", "background")):
        one, other = named[name], 1 - own
        vector, measure = torch.tensor(one["vector"]), torch.tensor(one["measure"])
        effects = ((shown(z + vector) - shown(z - vector)) / 2 / usual.std(0)).mean(0)
        assert effects[own] == pytest.approx(one["effect"], rel=0.05) and effects[own] > 10 * effects[other].abs()
        wrong = nn.functional.normalize(measure, dim=0)
        assert ((shown(z + wrong) - shown(z - wrong)) / 2 / usual.std(0)).mean(0)[other] > 0.2
        at_the_end = shown(z + (one["reach"] - z @ measure)[:, None] * vector)[:, own]
        assert (usual[:, own] > at_the_end.mean()).float().mean() == pytest.approx(0.02, abs=0.01)
        assert at_the_end.std() < 0.1 * usual[:, own].std()
    strongest = [one for one in found if "name" not in one]
    assert abs(strongest[0]["vector"][2]) > 0.9 and strongest[0]["strength"] == max(one["strength"] for one in strongest)


def test_names_that_say_the_same_are_not_offered():
    """Faces that are lighter or darker as a whole: what changes hair changes all else; and faces that are all the same."""
    for matrix in (torch.ones(3 * 32 * 32, 1) * torch.eye(128)[:1] * 0.1, torch.zeros(3 * 32 * 32, 128)):
        found = gan.find_directions(Linear(matrix), pairs=200)
        assert len(found) == 12 and not [one for one in found if "name" in one]


def test_what_latent_vectors_do_not_tell_has_a_low_correlation():
    """Found for faces that the matrix was not made of: noise alone has none, although 128 numbers fit some of it."""
    z = noise(500, 128)
    linear, even, random = z @ noise(128, seed=1) / 11, z.square().mean(1), noise(2, 500, seed=2)
    shown = torch.stack([torch.stack([linear, -linear]) + random, torch.stack([even, even]), random], 2)
    matrix, correlations = gan.told_by(z, shown)
    assert correlations[0] == pytest.approx(0.7, abs=0.07) and correlations[1:].abs().max() < 0.15
    assert torch.cosine_similarity(matrix[:, 0], noise(128, seed=1), dim=0) > 0.9


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
        found = gan.describe_sliders(matrix, torch.zeros(3, SIZE, SIZE), top_half())
        for slider, share in zip(found, shares):
            assert slider["outside"] == pytest.approx(share * slider["inside"], rel=0.01)
        return len(found)
    assert kept(0.1, 0.2, 0.3, 0.5, 0.55) == 5
    assert kept(0.1, 0.2, 0.3, 0.5, 0.65) == 4
    assert kept(0.6, 0.7, 0.8, 0.9, 0.95) == 3


def middle_of(part: str, size: int) -> list[tuple[int, int]]:
    """Row and column of each of a part's middles, where it lies in most faces."""
    return [(top * size // 100, left * size // 100) for top, left, *_ in gan.PARTS[part]]


@pytest.mark.parametrize("size", [32, 80])
def test_where_all_pixels_answer_alike_parts_are_where_they_mostly_are(size):
    """Each at its middle, in the order of PARTS; and the face's halves are alike."""
    found = gan.find_regions(torch.ones(3 * size * size, 128), size)
    for number, part in enumerate(gan.PARTS):
        assert all(found[place] == number for place in middle_of(part, size))
    pair = torch.arange(len(gan.PARTS))
    pair[[3, 4]] = pair[[4, 3]]  # the left eye and the right one
    assert (found.flip(1) == pair[found]).float().mean() > 0.95


def test_a_part_is_where_its_pixels_move_together():
    """A mouth that lies lower than most is found there; what moves with the chin above it is chin."""
    size, rows = 64, torch.arange(64)[:, None].expand(64, 64)
    top, left = middle_of("mouth", size)[0]
    mouth = (rows - top - 3).abs() < 4
    parts = gan.find_regions(torch.ones(3 * size * size, 128), size)
    answers = noise(len(gan.PARTS), 128)[torch.where(mouth & (parts != 9), list(gan.PARTS).index("mouth"), parts)]
    found = gan.find_regions(answers.expand(3, size, size, 128).reshape(-1, 128), size)
    number = list(gan.PARTS).index("mouth")
    assert (found[top + 5, left - 8:left + 8] == number).all() and (parts[top + 6, left - 8:left + 8] != number).any()


def test_a_word_says_what_changes():
    """Of a picture that is brightened, warmed, shifted, stretched or strengthened in a part, there; of noise, nothing."""
    def picture(shift=(0.0, 0.0), stretch=(1.0, 1.0)) -> torch.Tensor:
        row, column = torch.meshgrid(*[torch.arange(48) - 23.5] * 2, indexing="ij")
        row, column = (row - shift[0]) / stretch[0], (column - shift[1]) / stretch[1]
        return torch.stack([(row / 5 + a).sin() * (column / 4 + 2 * a).cos() for a in range(3)]) / 2
    face, mask = picture(), torch.zeros(48, 48)
    mask[8:40, 8:40] = 1
    warm = torch.tensor([0.1, 0, -0.1])[:, None, None]
    for words, other in ((("darker", "brighter"), face + 0.1), (("cooler", "warmer"), face + warm), (("fainter", "stronger"), face * 1.2),
                         (("left", "right"), picture((0, 0.5))), (("higher", "lower"), picture((0.5, 0))),
                         (("narrower", "wider"), picture(stretch=(1, 1.05))), (("shorter", "longer"), picture(stretch=(1.05, 1)))):
        elsewhere = (1 - mask) * noise(3, 48, 48)
        changes = torch.stack([other - face + elsewhere, face - other, noise(3, 48, 48)])
        assert gan.name_changes(changes, face, mask) == [[*words], [*words[::-1]], []]


def test_the_average_face_is_near_the_mean_of_faces():
    """Nearer than any of many; the mean of latent vectors is not near."""
    generator = vivid_generator()
    z = gan.average_latent(generator)
    with torch.no_grad():
        faces = generator(noise(300, 128, seed=3))
        found, *others = gan.distances_to(faces.mean(0), torch.cat([generator(z[None]), faces]), torch.ones(32, 32))
    assert found < 0.8 * min(others)


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


def test_the_second_step_knows_what_the_first_one_did(monkeypatch):
    """With a Jacobian of a third of the size the best damping leaves a quarter of the way, and would leave a quarter of
    that; the second step, whose Jacobian is right along the first, arrives."""
    monkeypatch.setattr(gan, "PRIOR", 0.0)
    matrix, z = torch.linalg.qr(noise(PIXELS, 128))[0], noise(128, seed=2)
    target = (matrix @ noise(128, seed=3)).view(3, SIZE, SIZE)
    before, after = (gan.distances_to(target, Linear(matrix)(one[None]), torch.ones(SIZE, SIZE)).item() for one in
                     (z, gan.fit_step(Linear(matrix), z, matrix / 3, target, torch.ones(SIZE, SIZE))))
    assert after < 0.02 * before


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
    generator = vivid_generator()
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
