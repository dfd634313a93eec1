"""Enlarging an image of any size: no seams, and what it takes."""

import numpy as np
import pytest
import torch
from PIL import Image
from stand_ins import Interpolation
from torchvision.transforms import functional as TF

from mamba_ginr import enlarge


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


@pytest.mark.parametrize("scale", [0.5, 0, -1, float("nan"), 600])
def test_super_resolve_says_which_scales_it_takes(nb, scale):
    with pytest.raises(ValueError, match=r"of 8×8 pixels: at least 1, and at most 4096 a side"):
        enlarge.super_resolve(Interpolation(), Image.new("RGB", (8, 8)), scale)
