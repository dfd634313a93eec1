"""The super-resolution head: when it answers, what it reads, and the spline with the pixels' means."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.interpolate import CubicSpline
from torch.utils.flop_counter import FlopCounterMode


def trained(model):
    """The same model with a head that is no longer zero, as after training."""
    torch.nn.init.normal_(model.head.to_rgb.weight)
    torch.nn.init.normal_(model.head.to_rgb.bias)
    return model.eval()


@pytest.mark.filterwarnings("ignore:coords lie up to")
def test_the_cell_says_who_answers(nb, tiny):
    torch.manual_seed(0)
    images, coords = torch.rand(2, 3, 8, 8), torch.rand(5, 2)
    with torch.no_grad():
        plain, model = tiny().eval(), trained(tiny())
        assert torch.equal(model(images, coords), plain(images, coords))  # the decoder, without the head
        finer = [model(images, coords, width) for width in (1 / 12, 1 / 16, 1 / 32, 1 / 64)]
        assert all((a - b).abs().max() > 1e-3 for a, b in pairwise(finer))
        each = model(images, coords, torch.tensor([1 / 16, 1 / 8]))
        assert torch.allclose(each[0], finer[1][0], atol=1e-6)
        # At the width of the image's own pixels nothing is added, and at their centres they come back.
        own = model(images, nb.pixel_grid(8))
        assert torch.allclose(model(images, nb.pixel_grid(8), 1 / 8), own, atol=1e-5)
        assert torch.allclose(each[1], plain(images, coords, 1 / 8)[1], atol=1e-6)


def test_means_of_the_spline_are_the_pixels(nb):
    torch.manual_seed(0)
    spline, pixels = nb.HistoSpline(8), torch.rand(2, 3, 8, 8)
    for scale in (1, 2, 3, 5, 8):
        width = torch.tensor([1 / (8 * scale)])
        finer = spline(pixels, nb.pixel_grid(8 * scale)[None], width).transpose(1, 2).unflatten(2, (8 * scale, -1))
        assert torch.allclose(F.avg_pool2d(finer, scale), pixels, atol=1e-5)
    # Wider than a pixel it takes the mean over several, at the border over what there is of them.
    wide = spline(pixels, torch.tensor([[[0.25, 0.5], [0.0, 0.5]]]), torch.tensor([0.25]))
    assert torch.allclose(wide[:, 0], pixels[:, :, 1:3, 3:5].mean((2, 3)), atol=1e-5)
    assert torch.allclose(wide[:, 1], pixels[:, :, :1, 3:5].mean((2, 3)), atol=1e-5)


@pytest.mark.parametrize("width", [0.1, 1 / 8, 1 / 64, 1e-3, 0.3, 0.77])
def test_the_spline_is_scipys(nb, width):
    """At the border, too, where a pixel that is asked for lies beyond it in part; and in both axes alike."""
    x, line = np.linspace(0, 1, 33), np.random.default_rng(0).random(8)
    whole = CubicSpline(np.arange(9) / 8, np.cumsum([0, *line / 8]), bc_type="natural")
    begin, end = (x - width / 2).clip(0, 1), (x + width / 2).clip(0, 1)
    expected = torch.from_numpy((whole(end) - whole(begin)) / (end - begin))
    rows = torch.from_numpy(line).view(8, 1).expand(1, 3, 8, 8)
    coords = torch.stack([torch.from_numpy(x), torch.full((33,), 0.4)], dim=1)[None]
    spline, widths = nb.HistoSpline(8).double(), torch.tensor([width]).double()
    assert torch.allclose(spline(rows, coords, widths)[0, :, 0], expected, atol=1e-6)
    assert torch.allclose(spline(rows.mT, coords.flip(-1), widths)[0, :, 2], expected, atol=1e-6)
    known = spline(rows, coords, widths, widest=1 if width <= 1 / 8 else 7, chunk=5)
    assert torch.allclose(known, spline(rows, coords, widths), atol=1e-12)


@pytest.mark.parametrize(("scale", "size"), [(1, 4), (2, 4), (4, 4), (0.5, 6), (0.5, 34)])
def test_gradients_of_the_spline_are_right_on_the_borders_of_pixels(nb, scale, size):
    """Both ends of most pixels that one asks for lie there, and two intervals might count such an end, or none."""
    torch.manual_seed(0)
    spline, pixels = nb.HistoSpline(size).double(), torch.rand(2, 3, size, size).double().requires_grad_(size < 9)
    grid = nb.pixel_grid(round(scale * size)).double()
    widths = torch.tensor([1 / (scale * size)]).double().requires_grad_()
    away = 0.5 - widths.item() / 2 - 1e-3  # from the middle: at the image's own border a mean has a bend
    inner = grid[((grid - 0.5).abs() < away).all(1)][:6].unsqueeze(0).requires_grad_()
    widest = round(max(1, 1 / scale))
    assert torch.autograd.gradcheck(lambda *inputs: spline(*inputs, widest=widest + 1), (pixels, inner, widths))
    if scale >= 1:
        assert torch.autograd.gradcheck(lambda c: spline(pixels, c, widths, widest=1), (inner,))


@pytest.mark.parametrize("kind", [float, list, tuple, np.array, torch.tensor])
def test_a_width_is_a_number_or_one_for_each_image(tiny, kind):
    model, images, coords = trained(tiny()), torch.rand(2, 3, 8, 8), torch.rand(5, 2)
    widths = 1 / 16 if kind is float else kind([1 / 16, 1 / 32])
    with torch.no_grad():
        both = model(images, coords, widths)
        for i, width in enumerate((1 / 16, 1 / 16 if kind is float else 1 / 32)):
            assert torch.allclose(both[i], model(images[i : i + 1], coords, width)[0], atol=1e-6)
        assert model(images[:0], coords, widths if kind is float else widths[:0]).shape == (0, 5, 3)


def test_coords_of_another_count_of_images_are_refused(nb, tiny):
    with pytest.raises(ValueError, match="coords of 2 images were given for 3: as many are needed, or one"):
        tiny()(torch.zeros(3, 3, 8, 8), torch.zeros(2, 5, 2), 1 / 16)
    with pytest.raises(ValueError, match="coords of 2 images were given for 1"):
        nb.HistoSpline(8)(torch.zeros(1, 3, 8, 8), torch.zeros(2, 5, 2), torch.tensor([1 / 16]))


def test_a_coordinate_that_is_not_a_number_gives_no_other_a_wrong_colour(nb):
    pixels, coords = torch.rand(1, 3, 8, 8), torch.full((1, 3, 2), 0.4)
    coords[0, 1, 0] = coords[0, 2, 1] = float("nan")
    rgb = nb.HistoSpline(8)(pixels, coords, torch.tensor([1 / 16]))[0]
    assert rgb.isnan().all(1).tolist() == [False, True, True]


@pytest.mark.parametrize("width", [-0.1, float("nan"), float("inf"), torch.tensor([0.1, float("nan")])], ids=str)
def test_a_width_without_a_meaning_is_refused(tiny, width):
    with pytest.raises(ValueError, match="pixel_width must be finite and not negative"):
        tiny()(torch.zeros(2, 3, 8, 8), torch.zeros(1, 2), width)


def test_a_query_of_the_spline_costs_the_same_in_an_image_of_any_size(nb):
    def work(size, queries):
        pixels, coords = torch.zeros(1, 3, size, size), torch.zeros(1, queries, 2)
        with FlopCounterMode(display=False) as counter, torch.profiler.profile(profile_memory=True) as profile:
            nb.HistoSpline(size)(pixels, coords, torch.tensor([1 / size]))
        return counter.get_total_flops(), sum(max(0, e.self_cpu_memory_usage) for e in profile.key_averages())

    few, many = ([work(size, queries) for size in (8, 64)] for queries in (100, 1100))
    assert [flops for flops, _ in few] == [flops for flops, _ in many]  # products find the image's coefficients alone
    small, large = (after - before for (_, before), (_, after) in zip(few, many))
    assert small == large  # bytes that 1,000 queries add


def test_the_head_answers_without_a_step(nb):
    """Nothing jumps where a query passes from one map pixel to the next, or beyond the last."""
    torch.manual_seed(0)
    head = nb.SuperResolutionHead(8, 4, None, dim=5, num_blocks=1, hidden=7).double()
    torch.nn.init.normal_(head.to_rgb.weight)
    features, places = torch.randn(1, 64, 7, dtype=torch.float64), torch.arange(0, 33, dtype=torch.float64) / 32
    low, high = (
        torch.cartesian_prod((places + side).clamp(0, 1), (places + side).clamp(0, 1)) for side in (-1e-9, 1e-9)
    )
    before, after = (head.read(features, coords[None], torch.ones(1).double()) for coords in (low, high))
    assert before.std() > 0.1
    assert (after - before).abs().max() < 1e-6


def test_the_head_reads_the_four_nearest_pixels_of_its_map(nb):
    torch.manual_seed(0)
    head = nb.SuperResolutionHead(6, 4, None, dim=5, num_blocks=1, hidden=7)
    torch.nn.init.normal_(head.to_rgb.weight)
    features, coords = torch.randn(2, 36, 7, requires_grad=True), torch.tensor([[0.30, 0.55], [0.0, 1.0]])
    (gradient,) = torch.autograd.grad(head.read(features, coords[None], torch.ones(1))[0, 0].sum(), features)
    assert gradient[0].abs().sum(1).nonzero().squeeze(1).tolist() == [8, 9, 14, 15]  # rows 1 and 2, columns 2 and 3
    (gradient,) = torch.autograd.grad(head.read(features, coords[None], torch.ones(1))[1, 1].sum(), features)
    assert gradient[1].abs().sum(1).nonzero().squeeze(1).tolist() == [5]  # the corner, beyond which there is none
    own = torch.stack([coords, coords.flip(0)])  # of each image, or shared
    each = head.read(features, own, torch.ones(1))
    assert torch.allclose(each[0], head.read(features, coords[None], torch.ones(1))[0], atol=1e-6)
    assert torch.allclose(each[1], head.read(features, coords.flip(0)[None], torch.ones(1))[1], atol=1e-6)


def test_the_latents_pixels_lie_where_their_patch_does(nb):
    head = nb.SuperResolutionHead(6, 4, 3, dim=1, num_blocks=0, hidden=1)
    for part in (head.of_pixels, head.of_latents, head.of_map):
        torch.nn.init.zeros_(part.weight)
        torch.nn.init.zeros_(part.bias)
    torch.nn.init.ones_(head.of_map.weight)
    head.of_latents.weight.data = torch.eye(4)  # latent channel k is pixel k of its patch, in raster order
    latents = torch.arange(36.0).view(1, 9, 4)
    features = head.map(latents, torch.zeros(1, 3, 6, 6)).view(3, 2, 3, 2)
    for patch in range(9):
        row, column = divmod(patch, 3)
        assert features[row, :, column].flatten().tolist() == latents[0, patch].tolist()


@pytest.mark.parametrize("change", [{"num_lp": 8}, {"head_latents": False}])
def test_without_an_lp_token_to_a_patch_or_where_it_is_told_the_head_reads_the_pixels_alone(nb, tiny, change):
    model, images, coords = trained(tiny(**change)), torch.rand(1, 3, 8, 8), torch.rand(4, 2)
    assert model.head.of_latents is None
    with torch.no_grad():
        assert (model(images, coords, 1 / 32) - model(images, coords, 1 / 16)).abs().max() > 1e-3
    finer = [model.decode_finer(latents, images, coords[None], 1 / 32) for latents in (None, model.encode(images))]
    assert torch.equal(*finer)
