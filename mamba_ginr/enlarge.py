"""Larger pictures: Pillow's interpolations, and images of any size, window by window.

As a command, ``python -m mamba_ginr.enlarge IMAGE``: see ``enlarge_command``.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    import sys

    from mamba_ginr.enlarge_command import main

    sys.exit(main())

import math
from itertools import pairwise, product
from numbers import Real

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import functional as TF
from tqdm.auto import tqdm

from mamba_ginr.images import Source, open_image


def resize(images: Tensor, size: int, method: str) -> Tensor:
    """Pillow's nearest, bicubic or lanczos: (n, 3, S, S) → (n, 3, size, size), in [0, 1]."""
    method = Image.Resampling[method.upper()]
    pictures = rearrange((255 * images).round().byte(), "n c h w -> n h w c").cpu().numpy()
    large = np.stack([np.asarray(Image.fromarray(x).resize((size, size), method)) for x in pictures])
    return rearrange(torch.from_numpy(large).to(images.device), "n h w c -> n c h w") / 255


def check_scale(image: Image.Image, scale: float) -> None:
    """ValueError for a scale below 1 or of too large a result: all of it is held, as 12 bytes a pixel."""
    if not (1 <= scale and scale * max(image.size) < 4096.5):  # false for NaN, too
        raise ValueError(f"scale {scale} of {image.width}×{image.height} pixels: at least 1, and at most 4096 a side")


@torch.no_grad()
def super_resolve(model: nn.Module, image: Source, scale: float, chunk: int = 65_536) -> Image.Image:
    """Enlarge an image of any size ``scale`` times, to at most 4096×4096 pixels, window by window.

    ``image`` is an image of Pillow, a path or a binary file; it is read as ``images.open_image`` reads it. Windows of
    the model's size S stand S/2 apart, and the last ends where the image ends. Neighbours fade into each other as sin²
    over S/4, in the middle of what both see: they add up to one, no seam is left, and no window counts in its outer
    eighth, where it does not see what lies beyond its border, but at the image's own. A side shorter than S is filled
    up with its outermost pixels. ValueError for a scale that is no finite number of at least 1, too large a result, an
    image that cannot be read, or a model whose S is no multiple of 8.
    """
    if isinstance(scale, bool) or not isinstance(scale, Real):
        hint = ": give scale.item()" if isinstance(scale, Tensor) else ""
        raise ValueError(f"scale = {scale!r} is a {type(scale).__name__}, and a number of at least 1 is needed{hint}")
    image, size = open_image(image), model.image_size
    if size % 8:
        raise ValueError(f"windows overlap by eighths: image_size = {size} is no multiple of 8")
    check_scale(image, scale)
    device, scale, pixels = model.lp.tokens.device, float(scale), TF.to_tensor(image)
    shape = [round(scale * n) for n in pixels.shape[1:]]
    (top, bottom), (left, right) = (((gap := max(0, size - n)) // 2, gap - gap // 2) for n in pixels.shape[1:])
    padded = F.pad(pixels[None], (left, right, top, bottom), mode="replicate")[0]

    def windows(length: int, before: int, total: int) -> list[tuple[int, slice, Tensor, Tensor]]:
        """Along an axis: each window's first pixel, its share of the result, the places in it in [0, 1], weights."""
        centres = (torch.arange(length) + 0.5) / scale + before
        starts, found = [*range(0, total - size, size // 2), total - size], []
        seams = [(a + b + size) / 2 for a, b in pairwise(starts)]
        passed = [((centres - seam) / (size // 4) + 0.5).clamp(0, 1) for seam in seams]  # from 0 to 1 across a seam
        passed = [torch.ones(length), *((x * math.pi / 2).sin().square() for x in passed), torch.zeros(length)]
        for first, come, go in zip(starts, passed, passed[1:]):
            weights = come - go  # of what has come to this window, what has not yet gone to the next
            where = weights.nonzero()
            if len(where):
                part = slice(where.min().item(), where.max().item() + 1)
                found.append((first, part, (centres[part] - first) / size, weights[part].to(device)))
        return found

    needed = list(product(*map(windows, shape, (top, left), padded.shape[1:])))
    result = torch.zeros(3, *shape, device=device)
    # 64 of 32×32 fill a GPU; 4 stay in a processor's cache, where 64 take 2.5 times as long each.
    batch = max(1, (64 if device.type == "cuda" else 4) * 32**2 // max(size, 32) ** 2)
    for start in tqdm(range(0, len(needed), batch), desc="windows", leave=False):
        part = needed[start : start + batch]
        tiles = [padded[:, top : top + size, left : left + size] for (top, *_), (left, *_) in part]
        latents = model.encode(torch.stack(tiles).to(device))
        for z, ((_, rows, y, weight_y), (_, columns, x, weight_x)) in zip(latents.split(1), part):
            rgb = model.decode(z, torch.cartesian_prod(y, x).to(device), chunk, 1 / (scale * size))
            rgb = rearrange(rgb, "1 (y x) c -> c y x", y=len(y))
            result[:, rows, columns] += rgb * weight_y[:, None] * weight_x
    return TF.to_pil_image(result.clamp_(0, 1).mul_(255).round_().byte().cpu())
