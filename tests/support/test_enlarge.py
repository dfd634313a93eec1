"""Enlarging an image of any size: no seams, and what it takes."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from stand_ins import Interpolation
from torchvision.transforms import functional as TF

from mamba_ginr import enlarge
from mamba_ginr.images import open_image


@pytest.mark.parametrize(("size", "scale"), [((8, 8), 2), ((5, 3), 4), ((31, 20), 3), ((40, 17), 2.5), ((16, 24), 1)])
def test_super_resolve_leaves_no_seam(nb, size, scale):
    pixels = torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image, model = TF.to_pil_image(pixels), Interpolation()
    result = enlarge.super_resolve(model, image, scale, chunk=100)
    height, width = (round(scale * n) for n in size)
    assert result.size == (width, height)
    assert model.widths == {1 / (scale * 8)}
    # One interpolation of the whole image, at the centres of the result's pixels.
    rows, columns = ((torch.arange(n) + 0.5) / (scale * m) for n, m in zip((height, width), size))
    whole = model.decode(pixels[None] / 255, torch.cartesian_prod(rows, columns))[0].T.view(3, height, width)
    assert (255 * whole - torch.from_numpy(np.array(result)).permute(2, 0, 1)).abs().max() <= 0.501


def test_super_resolve_says_which_models_it_takes(nb):
    model = Interpolation()
    model.image_size = 12
    with pytest.raises(ValueError, match="image_size = 12 is no multiple of 8"):
        enlarge.super_resolve(model, Image.new("RGB", (12, 12)), 2)


@pytest.mark.parametrize(
    "scale", [0.5, 0, -1, float("nan"), 600, float("inf"), -float("inf"), np.float32("inf"), np.float64("nan"), 10**400]
)
def test_super_resolve_says_which_scales_it_takes(nb, scale):
    with pytest.raises(ValueError, match=r"of 8×8 pixels: at least 1, and at most 4096 a side"):
        enlarge.super_resolve(Interpolation(), Image.new("RGB", (8, 8)), scale)


@pytest.mark.parametrize(
    ("scale", "kind"),
    [
        (torch.tensor(2.0), "Tensor, .*: give scale.item"),
        (torch.tensor([2.0, 3.0]), "Tensor"),
        (np.array([2.0]), "ndarray"),
        ("2", "str"),
        (True, "bool"),
        (np.True_, "bool"),
        (None, "NoneType"),
        (2j, "complex"),
        ((2, 2), "tuple"),
    ],
)
def test_super_resolve_takes_numbers_only(nb, scale, kind):
    with pytest.raises(ValueError, match=f"scale = .* is a {kind}"):
        enlarge.super_resolve(Interpolation(), Image.new("RGB", (8, 8)), scale)


@pytest.mark.parametrize("scale", [2, 2.0, np.int64(2), np.float32(2), Fraction(2)])
def test_super_resolve_takes_all_kinds_of_numbers(nb, scale):
    assert enlarge.super_resolve(Interpolation(), Image.new("RGB", (8, 5)), scale).size == (16, 10)


def test_super_resolve_opens_images_as_all_the_rest_does(nb, tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying: to turn by 90° clockwise
    pixels = np.random.default_rng(0).integers(0, 256, (5, 9, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    model, expected = Interpolation(), open_image(tmp_path / "x.png")
    results = [expected, tmp_path / "x.png", str(tmp_path / "x.png"), Image.open(tmp_path / "x.png")]
    results = [enlarge.super_resolve(model, image, 2) for image in results]
    assert results[0].size == (10, 18)
    assert all(result == results[0] for result in results)
    assert capsys.readouterr().out.count("x.png: transparent pixels, put on white.") == 4
    deep = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
    assert enlarge.super_resolve(model, deep, 2).getpixel((3, 3)) == (156, 156, 156)
    with pytest.raises(ValueError, match="its pixels are floats, signed or of 32 bits"):
        enlarge.super_resolve(model, Image.new("F", (4, 4)), 2)
    with pytest.raises(ValueError, match="it has 0×4 pixels"):
        enlarge.super_resolve(model, Image.new("RGB", (0, 4)), 2)


@pytest.mark.parametrize(("size", "scale"), [((11, 19), 2.5), ((1, 40), 3), ((17, 1), 4), ((24, 9), 1.3)])
def test_super_resolve_gives_what_whole_rows_of_windows_gave(tiny, size, scale):
    model = tiny()
    for weights in (model.head.to_rgb.weight, model.head.to_rgb.bias):  # an untrained head adds nothing
        torch.nn.init.normal_(weights, std=0.1)
    pixels = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    result = torch.from_numpy(np.array(enlarge.super_resolve(model, TF.to_pil_image(pixels), scale)))
    by_rows = whole_rows_of_windows(model, TF.to_tensor(TF.to_pil_image(pixels)), scale)
    assert (255 * by_rows.clamp(0, 1) - result.permute(2, 0, 1)).abs().max() < 0.51


@torch.no_grad()
def whole_rows_of_windows(model, pixels, scale):
    """As super_resolve was first written: each window of a row is encoded, whether or not the result needs it."""
    size, shape = model.image_size, [round(scale * n) for n in pixels.shape[1:]]
    before = 3 * size // 8
    ends = [-(-n // (size // 2)) * (size // 2) + 5 * size // 8 for n in pixels.shape[1:]]
    padding = (before, ends[1] - pixels.shape[2], before, ends[0] - pixels.shape[1])
    padded = torch.nn.functional.pad(pixels[None], padding, mode="replicate")[0]
    tiles = padded.unfold(1, size, size // 2).unfold(2, size, size // 2)
    result, total = torch.zeros(3, *shape), torch.zeros(shape)
    for i in range(tiles.shape[1]):
        for j, z in enumerate(model.encode(tiles[:, i].transpose(0, 1)).split(1)):
            y, x = (((torch.arange(n) + 0.5) / scale + before - k * (size // 2)) / size for n, k in zip(shape, (i, j)))
            inside = [(1 / 8 <= p) & (p < 7 / 8) for p in (y, x)]
            if all(mask.any() for mask in inside):
                weights = [(((0.375 - (p - 0.5).abs()) * 4).clamp(0, 1) * torch.pi / 2).sin() ** 2 for p in (y, x)]
                coords = torch.cartesian_prod(y[inside[0]], x[inside[1]])
                rgb = model.decode(z, coords, pixel_width=1 / (scale * size))[0].T
                at = torch.meshgrid(*(mask.nonzero()[:, 0] for mask in inside), indexing="ij")
                weight = weights[0][at[0]] * weights[1][at[1]]
                result[:, at[0], at[1]] += rgb.view(3, *weight.shape) * weight
                total[at] += weight
    assert torch.allclose(total, torch.ones(shape), atol=1e-5)
    return result


@pytest.mark.parametrize(
    ("size", "windows"), [((1, 1000), 251), ((1000, 1), 251), ((2, 2), 1), ((4, 4), 4), ((8, 8), 9), ((40, 17), 55)]
)
def test_super_resolve_encodes_no_window_in_vain(nb, size, windows):
    """Window k has 8 pixels, its middle at pixel 1 + 4k, and counts for the pixels from 4k − 2 to 4k + 4."""

    class Counting(Interpolation):
        encoded = decoded = 0

        def encode(self, images):
            self.encoded += len(images)
            return images

        def decode(self, latents, coords, chunk=None, pixel_width=None):
            self.decoded += len(latents)
            return super().decode(latents, coords, chunk, pixel_width)

    model = Counting()
    enlarge.super_resolve(model, Image.new("RGB", size[::-1]), 4)
    assert model.encoded == model.decoded == windows
