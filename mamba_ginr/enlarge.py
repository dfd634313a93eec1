"""Larger pictures: Pillow's interpolations, and images of any size, window by window."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import functional as TF
from tqdm.auto import tqdm


def resize(images: Tensor, size: int, method: str) -> Tensor:
    """Pillow's nearest, bicubic or lanczos: (n, 3, S, S) → (n, 3, size, size), in [0, 1]."""
    method = Image.Resampling[method.upper()]
    pictures = rearrange((255 * images).round().byte(), "n c h w -> n h w c").cpu().numpy()
    large = np.stack([np.asarray(Image.fromarray(x).resize((size, size), method)) for x in pictures])
    return rearrange(torch.from_numpy(large).to(images.device), "n h w c -> n c h w") / 255


@torch.no_grad()
def super_resolve(model: nn.Module, image: Image.Image, scale: float, chunk: int = 65_536) -> Image.Image:
    """Enlarge an image of any size ``scale`` times, to at most 4096×4096, one row of windows at a time.

    Windows of the model's size S stand S/2 apart. Each counts fully in its middle quarter and not at all in its outer
    eighths, where it does not see what lies beyond its border; between them it fades as sin², so that windows always
    add up to one and no seam is left. Alpha is dropped. ValueError for a scale below 1, too large a result, or a model
    whose S is no multiple of 8.
    """
    pixels, size = TF.to_tensor(image.convert("RGB")), model.image_size
    if size % 8:
        raise ValueError(f"windows overlap by eighths: image_size = {size} is no multiple of 8")
    device = model.lp.tokens.device
    shape = [round(scale * n) for n in pixels.shape[1:]] if scale >= 1 else [0]
    if not 1 <= min(shape) <= max(shape) <= 4096:
        raise ValueError(f"scale {scale} of {image.width}×{image.height} pixels: at least 1, and at most 4096 a side")
    before = 3 * size // 8
    ends = [-(-n // (size // 2)) * (size // 2) + 5 * size // 8 for n in pixels.shape[1:]]
    padding = (before, ends[1] - pixels.shape[2], before, ends[0] - pixels.shape[1])
    padded = F.pad(pixels[None], padding, mode="replicate")[0]

    def windows(length: int, count: int) -> list[tuple[slice, Tensor, Tensor]]:
        """Of each window along an axis: the output's pixels in it, their places in [0, 1], and their weights."""
        centres, found = (torch.arange(length) + 0.5) / scale + before, []
        for i in range(count):
            places = (centres - i * (size // 2)) / size
            first, last = (torch.searchsorted(places, edge).item() for edge in (1 / 8, 7 / 8))
            ramp = ((0.5 - (places[first:last] - 0.5).abs() - 1 / 8) * 4).clamp(0, 1)
            found.append((slice(first, last), places[first:last], (ramp * math.pi / 2).sin().square().to(device)))
        return found

    tiles = padded.unfold(1, size, size // 2).unfold(2, size, size // 2)  # (3, rows, columns, S, S)
    down, across = (windows(n, count) for n, count in zip(shape, tiles.shape[1:3]))
    result = torch.zeros(3, *shape)
    for i, (rows, y, weight_y) in enumerate(tqdm(down, desc="rows of windows", leave=False)):
        strip = torch.zeros(3, len(y), shape[1], device=device)
        latents = [model.encode(part.to(device)) for part in tiles[:, i].transpose(0, 1).split(64)]
        for z, (columns, x, weight_x) in zip(torch.cat(latents).split(1), across):
            if len(x) and len(y):
                rgb = model.decode(z, torch.cartesian_prod(y, x).to(device), chunk, 1 / (scale * size))
                strip[:, :, columns] += rearrange(rgb, "1 (y x) c -> c y x", y=len(y)) * weight_y[:, None] * weight_x
        result[:, rows] += strip.cpu()
    return TF.to_pil_image(result.clamp_(0, 1).mul_(255).round_().byte())
