"""What a query reads of a large image's latents: the same as all of them, to 1e-6, in every decoder and form."""

import math
import warnings

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import mamba_ginr.near_latents as near_latents
from mamba_ginr.near_latents import NearLatents, reach_of


@pytest.fixture
def pair(tiny, monkeypatch):
    """A model that reads nearby latents, and the same one that reads all, of 40 × 40 or more pixels."""

    def build(size, patch_size=2, **changes):
        config = {"image_size": size, "patch_size": patch_size, "num_lp": 0, **changes}
        near = tiny(**config)
        monkeypatch.setattr(near_latents, "WHOLE", 10**6)
        whole = tiny(**config)
        assert (near.near.local, whole.near.local) == (True, False)
        return near, whole

    return build


def parts_of(near, coords, own, locality=10.0, **options):
    """The parts of coords (1, Q, 2), with the bias of cell 6 for patches in raster order."""
    places = (torch.arange(near.side) + 0.5) / near.side
    centres = torch.cartesian_prod(places, places).unsqueeze(0)

    def bias_of(coords, centres):
        return -locality * ((coords.unsqueeze(-2) - centres.unsqueeze(-3)) * near.side).square().sum(-1)

    return list(near.parts(coords, centres, bias_of, own, **options))


@pytest.mark.filterwarnings("ignore:coords lie up to")
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("decoder", "size", "patch_size", "locality"),
    [
        ("lainr", 40, 2, 10.0),  # 20 patches, in tiles of 10
        ("lainr", 66, 2, 10.0),  # 33, in tiles of 11
        ("gaussian", 68, 4, 60.0),  # 17, in tiles of 9 that jut out; 3 × 3 patches
        ("scent", 36, 2, 1.0),  # 18; 15 × 15 patches
        ("hybrid", 36, 2, 10.0),
    ],
)
def test_the_near_latents_give_what_all_give(nb, pair, monkeypatch, decoder, size, patch_size, locality, fused):
    near, whole = pair(size, patch_size, decoder=decoder, locality=locality)
    monkeypatch.setattr(nb.MambaGINR, "fused", fused)
    images, places = torch.rand(2, 3, size, size), torch.rand(2, 30, 2)
    found = []
    for model in (near, whole):
        latents = (3 * model.encode(images).detach()).requires_grad_()
        rgb = model.decode(latents, model.own_coords)
        weights = torch.rand(rgb.shape, generator=torch.Generator().manual_seed(0))
        gradients = torch.autograd.grad((rgb * weights).sum(), [latents, *model.decoder.parameters()])
        parts = model.decode(latents, model.own_coords, 700)  # a few tiles at a time
        given = model.decode(latents, model.own_coords[::19], 50)  # some of the same places, as any others
        found.append([rgb, parts, given, model.decode(latents, places), model.decode(latents, places[0]), *gradients])
    for i, (mine, true) in enumerate(zip(*found, strict=True)):
        # Gradients are sums over thousands of queries; one form counts their places from a tile, one from the image.
        tolerance = (1e-6 if i < 5 else 3e-5) * true.abs().max().clamp(min=1)
        assert (mine - true).abs().max() <= tolerance


def test_ones_own_grid_is_read_tile_by_tile_as_the_models_is(nb, pair, monkeypatch):
    near, _ = pair(40)
    monkeypatch.setattr(near.near, "_around", lambda *_: pytest.fail("gathered for each query"))
    latents = near.encode(torch.rand(1, 3, 40, 40))
    assert torch.equal(near.decode(latents, nb.pixel_grid(40)), near.decode(latents, near.own_coords))


def test_latents_are_mapped_once_for_all_parts(nb):
    model, calls = nb.MambaGINR(40, 2, 16, 1, d_state=2, expand=1, decoder_dim=16, head_dim=8, head_hidden=8), []
    model.decoder.attention.to_v.register_forward_hook(lambda *_: calls.append(1))
    latents = torch.rand(2, 400, 16)
    with torch.no_grad():
        whole, parts = (model.decode(latents, model.own_coords, chunk) for chunk in (None, 100))
    assert len(calls) == 2  # one for each of the two
    assert torch.allclose(whole, parts, atol=1e-6)


def test_the_reach_follows_the_bias():
    assert [reach_of(locality) for locality in (60.0, 10.0, 1.0)] == [1, 2, 7]
    assert reach_of(0.0) == math.inf
    for locality in (0.3, 2.0, 28.0, 500.0):
        reach = reach_of(locality)
        # At the border of its patch a query is ½ patch from its own centre and reach + ½ from the next one left out.
        left_out = locality * ((reach + 0.5) ** 2 - 0.5**2)
        assert left_out >= near_latents.NEGLIGIBLE > locality * ((reach - 0.5) ** 2 - 0.5**2)


def test_what_has_no_grid_or_no_bias_or_is_small_reads_all():
    assert NearLatents(32, 2, 10.0, grid=True).local
    for side, locality, grid in [(16, 10.0, True), (32, 10.0, False), (32, 0.0, True), (17, 0.9, True)]:
        near = NearLatents(side, 2, locality, grid)
        latents = torch.rand(1, side**2, 3)
        ((coords, bias, read),) = parts_of(near, torch.rand(1, 5, 2), own=False, locality=locality)
        assert not near.local
        assert (coords.shape, bias.shape) == ((1, 5, 2), (1, 5, side**2))
        assert read(latents) is latents


def test_a_tile_reads_its_patches_and_those_around_it():
    """Latents that hold their own row and column, −1 beyond the border."""
    near = NearLatents(20, 2, 10.0, grid=True)  # tiles of 10 × 10 patches, 2 more on each side
    rows = torch.arange(20.0)
    latents = torch.cartesian_prod(rows, rows).unsqueeze(0)
    ((coords, bias, read),) = parts_of(near, torch.zeros(1, 1600, 2), own=True)
    windows = read(latents, -1.0)
    assert (coords.shape, windows.shape) == ((1, 4, 400, 2), (1, 4, 14 * 14, 2))
    first, last = windows[0, 0].view(14, 14, 2), windows[0, 3].view(14, 14, 2)
    assert first[:, 5, 0].tolist() == [-1, -1, *range(12)]
    assert last[5, :, 1].tolist() == [*range(8, 20), -1, -1]
    centres = (coords * 20).floor()[0, 1]  # the patches of the second tile's queries
    assert (centres.min(0).values.tolist(), centres.max(0).values.tolist()) == ([0, 10], [9, 19])
    # The bias is that of each query to each patch of its window, −inf beyond the border.
    offsets = 20 * coords.unsqueeze(-2) - (windows + 0.5).unsqueeze(-3)
    expected = torch.where((windows < 0).any(-1).unsqueeze(-2), -math.inf, -10 * offsets.square().sum(-1))
    assert bias.shape == (1, 4, 400, 14 * 14)
    assert torch.allclose(bias, expected, atol=1e-3)  # of up to 2,500


@pytest.mark.parametrize("chunk", [None, 1, 700])
def test_parts_come_back_in_order(chunk):
    near, coords = NearLatents(20, 2, 10.0, grid=True), torch.cartesian_prod(*2 * [(torch.arange(40) + 0.5) / 40])
    parts = [part for part, *_ in parts_of(near, coords.unsqueeze(0), True, chunk=chunk)]
    assert torch.allclose(near.in_order(parts, own=True)[0], coords)
    if chunk is not None:
        parts = [part for part, *_ in parts_of(near, coords.unsqueeze(0), False, chunk=chunk)]
        assert torch.equal(near.in_order(parts, own=False)[0], coords)


def test_without_gradients_the_parts_bound_the_memory(monkeypatch):
    monkeypatch.setattr(near_latents, "AT_ONCE", 16_384)
    monkeypatch.setattr(near_latents, "LEAST", 1024)
    near, coords = NearLatents(64, 2, 10.0, grid=True), torch.zeros(1, 128**2, 2)

    def queries(coords, own, batch):
        return [part.shape[1:-1].numel() for part, *_ in parts_of(near, coords, own, batch=batch)]

    with torch.no_grad():
        one, many = queries(coords, True, 4), queries(coords, True, 64)
        small, asked = queries(torch.zeros(1, 1024, 2), False, 1000), queries(coords, False, 2)
    assert (sum(one), max(one)) == (128**2, 4096)
    assert (sum(many), max(many)) == (128**2, 2048)  # no less than a row of tiles
    assert small == [1024]  # an image of 32 × 32 is decoded at once, whatever the batch
    assert set(asked) == {8192}
    assert queries(coords, True, 64) == [128**2]


def test_memory_of_a_query_does_not_grow_with_the_image():
    """As many logits to a query at 64 patches a side as at 32."""
    keys = []
    for side in (32, 64):
        near = NearLatents(side, 2, 10.0, grid=True)
        ((coords, bias, read),) = parts_of(near, torch.zeros(1, 4 * side**2, 2), own=True)
        assert bias.shape[-1] == 144
        keys.append((read(torch.zeros(1, side**2, 1)).shape[2], coords.shape[1] * coords.shape[2] / (4 * side**2)))
    assert keys == [(144, 1.0), (144, 1.0)]


@pytest.mark.parametrize("size", [8, 40])
def test_coords_between_the_pixels_without_a_width_are_told_after_training(nb, tiny, size):
    model = tiny(image_size=size, num_lp=0).eval()
    images, own = torch.rand(1, 3, size, size), nb.pixel_grid(size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for coords in (own, own[3:7], own[None], own.half(), own[:0]):
            model(images, coords)
        model(images, nb.pixel_grid(2 * size), 1 / (2 * size))
        model.train()(images, torch.rand(5, 2))
    latents = model.eval().encode(images)
    with pytest.warns(UserWarning, match=r"coords lie up to 0\.25 pixels from .* Give pixel_width, for a grid") as told:
        model.decode(latents, nb.pixel_grid(2 * size))
    assert [warning.filename for warning in told] == [__file__]  # where it was asked
    with pytest.warns(UserWarning, match=r"coords lie up to 1\.00 pixels"):  # outside the image
        model.decode(latents, own + 1 / size)
    with torch.no_grad():  # transforms and traces, which have no values to look at
        each = torch.vmap(lambda place: model.decode(latents, place[None])[0, 0])(own[:3])
    assert torch.allclose(each, model.decode(latents, own[:3])[0], atol=1e-5)
    make_fx(lambda places: near_latents.warn_between_pixels(places, size), tracing_mode="fake")(own[:3])
