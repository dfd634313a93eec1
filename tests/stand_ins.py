"""What stands in for data and for a model: folders of noise, and an interpolation."""

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image


def write_images(folder, counts, size=(32, 32), mode="RGB"):
    rng = np.random.default_rng(0)
    for place, count in counts.items():
        (folder / place).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(folder / place / f"{i}.png")


class Interpolation(torch.nn.Module):
    """Stands in for a model: its latents are the pixels, which it interpolates linearly."""

    image_size = 8

    def __init__(self, spline=None):
        super().__init__()
        self.lp, self.head, self.widths = SimpleNamespace(tokens=torch.zeros(1)), SimpleNamespace(spline=spline), set()
        self.own_coords = torch.cartesian_prod(*2 * [(torch.arange(8) + 0.5) / 8])

    def encode(self, images):
        return images

    def decode(self, latents, coords, chunk=None, pixel_width=None):
        self.widths.add(pixel_width)
        grid = 2 * coords.flip(-1).expand(len(latents), 1, -1, -1) - 1
        colours = torch.nn.functional.grid_sample(latents, grid, "bilinear", "border", align_corners=False)
        return colours[:, :, 0].transpose(1, 2)

    def own_pixels(self, latents, chunk=None):
        return self.decode(latents, self.own_coords, chunk).transpose(1, 2).unflatten(2, (8, 8))

    def decode_finer(self, latents, own, coords, pixel_width, chunk=None):
        assert torch.allclose(own, latents, atol=1e-6)
        return self.decode(latents, coords, chunk, pixel_width)
