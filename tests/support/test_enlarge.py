"""Enlarging an image of any size: no seams, and what it takes."""

import math
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


@pytest.mark.parametrize(
    ("size", "scale"),
    [((11, 19), 2.5), ((1, 40), 3), ((17, 1), 4), ((24, 9), 1.3), ((8, 8), 4), ((9, 9), 1.5), ((11, 10), 1)],
)
def test_super_resolve_gives_what_all_windows_give_pixel_by_pixel(tiny, size, scale):
    model = tiny()
    for weights in (model.head.to_rgb.weight, model.head.to_rgb.bias):  # an untrained head adds nothing
        torch.nn.init.normal_(weights, std=0.1)
    pixels = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    result = torch.from_numpy(np.array(enlarge.super_resolve(model, TF.to_pil_image(pixels), scale)))
    expected = all_windows(model, TF.to_tensor(TF.to_pil_image(pixels)), scale)
    assert (255 * expected.clamp(0, 1) - result.permute(2, 0, 1)).abs().max() < 0.51


@torch.no_grad()
def all_windows(model, pixels, scale):
    """Every window of 8 pixels decoded at every place in it, and weighed by what super_resolve says of seams."""
    shape = [round(scale * n) for n in pixels.shape[1:]]
    gaps = [max(0, 8 - n) for n in pixels.shape[1:]]
    padding = (gaps[1] // 2, gaps[1] - gaps[1] // 2, gaps[0] // 2, gaps[0] - gaps[0] // 2)
    padded = torch.nn.functional.pad(pixels[None], padding, mode="replicate")[0]
    starts = [sorted({*range(0, n - 8, 4), n - 8}) for n in padded.shape[1:]]

    def weight(place, i, starts):
        """A seam lies in the middle of what two windows share, and is two pixels wide."""
        fade = lambda seam: math.sin(math.pi / 2 * min(1, max(0, (place - seam + 1) / 2))) ** 2  # noqa: E731
        come = 1 if i == 0 else fade((starts[i - 1] + 8 + starts[i]) / 2)
        stay = 1 if i == len(starts) - 1 else 1 - fade((starts[i] + 8 + starts[i + 1]) / 2)
        return come * stay

    places = [[(k + 0.5) / scale + gap // 2 for k in range(n)] for n, gap in zip(shape, gaps)]
    weights = [[[weight(p, i, s) for p in of_axis] for i in range(len(s))] for of_axis, s in zip(places, starts)]
    weights = [torch.tensor(w, dtype=torch.float32) for w in weights]  # (windows, places) of rows and of columns
    for w, s, of_axis, n in zip(weights, starts, places, padded.shape[1:]):
        assert torch.allclose(w.sum(0), torch.ones(w.shape[1]))
        for i, start in enumerate(s):  # nothing from within a pixel of a window's border, but at the image's own
            for k, p in enumerate(of_axis):
                near = (p < start + 1 and start > 0) or (p > start + 7 and start < n - 8)
                assert not near or w[i, k] == 0
    result = torch.zeros(3, *shape)
    for i, top in enumerate(starts[0]):
        for j, left in enumerate(starts[1]):
            z = model.encode(padded[None, :, top : top + 8, left : left + 8])
            y, x = ((torch.tensor(p) - start) / 8 for p, start in zip(places, (top, left)))
            rgb = model.decode(z, torch.cartesian_prod(y, x).clamp(0, 1), pixel_width=1 / (scale * 8))[0].T
            result += rgb.view(3, *shape) * weights[0][i][:, None] * weights[1][j]
    return result


def test_an_image_of_the_models_size_is_one_window(tiny):
    """And so the model's own picture, to the grey level."""
    model, pixels = tiny(), torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(model.head.to_rgb.weight, std=0.1)
    image = TF.to_pil_image(pixels)
    result = TF.to_tensor(enlarge.super_resolve(model, image, 3))
    coords = (torch.arange(24) + 0.5) / 24
    with torch.no_grad():
        whole = model(TF.to_tensor(image)[None], torch.cartesian_prod(coords, coords), 1 / 24)[0].T.view(3, 24, 24)
    assert (whole.clamp(0, 1) - result).abs().max() <= 0.501 / 255


@pytest.mark.parametrize(
    ("size", "windows"),
    [((1, 1000), 249), ((1000, 1), 249), ((2, 2), 1), ((8, 8), 1), ((9, 8), 2), ((12, 8), 2), ((40, 17), 36)],
)
def test_super_resolve_encodes_no_window_in_vain(nb, size, windows):
    """Windows of 8 pixels start at every fourth, and the last one where it ends with the image."""

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
