"""Images that a network which saw photographs alone fails at: noise, text, blocks, colours that no camera gives.

    from mamba_ginr.hard_images import hard_images, pattern_images

    images = hard_images(photos, 8, generator)  # to train on, anew in each step
    patterns = pattern_images(32)  # 64 fixed ones, to test with

The training images are made of photographs and of patterns drawn at random; none of the fixed ones is among them.
"""

from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

BLOCKS = (1, 1, 2, 4, 8, 16)  # pixels: sides of the blocks that patterns are made of
TILES = (3, 5, 6, 7, 9, 12)  # pixels: sides of what is repeated; periods of 2, 4 and 8 are kept for testing


@cache
def _on(device: torch.device, numbers: tuple[int, ...]) -> Tensor:
    """The numbers as a tensor, copied once: each copy makes the processor wait for the GPU."""
    return torch.tensor(numbers, device=device)


class _Draws:
    """Random numbers for n images on the generator's device."""

    def __init__(self, n: int, generator: torch.Generator):
        self.n, self.random = n, {"generator": generator, "device": generator.device}

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(self.n, *(shape or (1, 1, 1)), **self.random)

    def integers(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, (self.n, *shape), **self.random)

    def blocks(self, channels: int, size: int) -> Tensor:
        """Uniform in [0, 1), one value for each block; side and offset of the blocks differ between the images."""
        values = torch.rand(self.n, channels, size, size, **self.random)
        sides = _on(values.device, BLOCKS)
        side, offset = sides[self.integers(len(BLOCKS), 1, 2)], self.integers(size, 1, 2)
        place = torch.arange(size, device=values.device).view(1, -1, 1)
        return _taken(values, (place + offset) // side - offset // side)


def _taken(images: Tensor, index: Tensor) -> Tensor:
    """images[:, :, rows, columns] with rows and columns of each image's own: index (n, size, 2)."""
    _, channels, size, _ = images.shape
    images = images.gather(2, index[:, None, :, :1].expand(-1, channels, -1, size))
    return images.gather(3, index[:, None, :, 1].unsqueeze(2).expand(-1, channels, size, -1))


def _noisy(photos, draw):
    share = draw.between(0, 1.3).clamp(max=1)
    return photos[0].lerp(torch.rand(photos[0].shape, **draw.random), share)


def _contrast(photos, draw):
    mean = photos[0].mean((1, 2, 3), keepdim=True)
    return mean + (photos[0] - mean) * draw.between(1, 5)


def _channels(photos, draw):
    return torch.cat([photo[:, i : i + 1] for i, photo in enumerate(photos)], dim=1)


def _saturation(photos, draw):
    grey = photos[0].mean(1, keepdim=True)
    return grey + (photos[0] - grey) * draw.between(1, 7)


def _binary(photos, draw):
    """Noise of two values in each channel, or in all channels alike, in blocks."""
    share = draw.between(0.1, 0.9)
    coloured, grey = (draw.blocks(c, photos[0].shape[-1]) for c in (3, 1))
    noise = torch.where(draw.between(0, 1) < 0.5, coloured, grey)
    return torch.where(noise < share, draw.between(-0.4, 0.4), draw.between(0.6, 1.4))  # half of them black or white


def _blocks(photos, draw):
    """Blocks of any colours, or of saturated ones."""
    values = draw.blocks(3, photos[0].shape[-1])
    return torch.where(draw.between(0, 1) < 0.5, values, (values > 0.5).float())


def _two_colours(photos, draw):
    """Outlines as of text: a photograph's brightness against its own shift or level, in two flat colours."""
    grey = photos[0].mean(1, keepdim=True)
    level = grey.flatten(1).median(1).values.view(-1, 1, 1, 1)
    strokes = (grey - grey.roll((1, 2), (2, 3))).abs() > draw.between(0.02, 0.15)
    mask = torch.where(draw.between(0, 1) < 0.5, strokes, grey > level)
    return torch.where(mask, draw.between(-0.3, 1.3, 3, 1, 1), draw.between(-0.3, 1.3, 3, 1, 1))


def _patchwork(photos, draw):
    """Blocks of two photographs, of noise, or of a flat colour, side by side."""
    size = photos[0].shape[-1]
    mask = draw.blocks(1, size)
    flat = draw.between(-0.2, 1.2, 3, 1, 1)
    second = torch.where(draw.between(0, 1) < 0.5, photos[1], flat.expand_as(photos[1]))
    return torch.where(mask < draw.between(0.1, 0.9), photos[0], second)


def _tiled(photos, draw):
    """A piece of a photograph, or of noise of two values or of any, over and over."""
    size = photos[0].shape[-1]
    sides = _on(photos[0].device, TILES)
    index = torch.arange(size, device=sides.device).view(1, -1, 1) % sides[draw.integers(len(TILES), 1, 2)]
    noise = torch.rand(photos[0].shape, **draw.random)
    noise = torch.where(draw.between(0, 1) < 0.5, noise, (noise > 0.5).float())
    piece = torch.where(draw.between(0, 1) < 0.3, photos[0], noise)
    return _taken(piece, index)


def _ramps(photos, draw):
    """From one colour to another along any direction; some so flat that they are one colour."""
    size = photos[0].shape[-1]
    line = torch.linspace(-0.5, 0.5, size, device=photos[0].device)
    angle = draw.between(0, 2 * torch.pi)
    share = 0.5 + angle.cos() * line.view(-1, 1) + angle.sin() * line
    steep = draw.between(-0.5, 1).clamp(min=0)
    return draw.between(0, 1, 3, 1, 1) + steep * share * draw.between(-1, 1, 3, 1, 1)


KINDS = (
    _noisy, _binary, _tiled, _blocks, _two_colours, _ramps,  # where the default batch has 16, these have two each
    _contrast, _channels, _saturation, _patchwork,
)  # fmt: skip


@torch.no_grad()
def hard_images(photos: Tensor, count: int, generator: torch.Generator, batch: int = 0) -> Tensor:
    """``count`` hard images, of the kinds in turn, from three times as many photographs.

    Args:
        photos: uint8 (3 · count, 3, S, S), on the generator's device.
        generator: what is drawn depends on its state only.
        batch: its number. Where ``count`` is too small for all kinds, a batch goes on with those after the last one's.

    Returns:
        uint8 (count, 3, S, S). ValueError for another number of photographs.
    """
    if len(photos) != 3 * count:
        raise ValueError(f"{count} hard images are made of {3 * count} photographs, got {len(photos)}")
    sources, images = (photos.float() / 255).unflatten(0, (3, count)), torch.empty_like(photos[:count])
    first = batch * count if count < len(KINDS) else 0
    for i in range(min(count, len(KINDS))):
        kind, own = KINDS[(first + i) % len(KINDS)], sources[:, i :: len(KINDS)]
        drawn = kind(tuple(own), _Draws(own.shape[1], generator))
        images[i :: len(KINDS)] = (255 * drawn).clamp(0, 255).round().byte()
    low, high = images.flatten(1).aminmax(dim=1)
    black_or_white = (high == 0) | (low == 255)  # which blocks and flat colours become by chance: they are for testing
    return torch.where(black_or_white.view(-1, 1, 1, 1), photos[:count], images)


def pattern_images(size: int = 32) -> Tensor:
    """64 fixed images that no training saw: uint8 (64, 3, size, size).

    In this order: 6 checkerboards of 1, 2 and 4 pixels, black and white and coloured; 4 of stripes one pixel wide; 8 of
    binary noise in grey and 8 in colour; 12 of text; 8 of saturated 4×4 blocks; 8 ramps; 8 flat colours; black; white.
    """
    rng = np.random.default_rng(20_000)
    rows, columns = np.mgrid[:size, :size]

    def two(mask, first, second):
        return np.where(mask[..., None], np.uint8(first), np.uint8(second))

    def colour():
        return rng.integers(0, 256, 3)

    images = []
    for side in (1, 2, 4):
        mask = (rows // side + columns // side) % 2 == 0
        images += [two(mask, (255, 255, 255), (0, 0, 0)), two(mask, colour(), colour())]
    for mask in (rows % 2 == 0, columns % 2 == 0):
        images += [two(mask, (255, 255, 255), (0, 0, 0)), two(mask, colour(), colour())]
    for channels in (1, 3):
        noise = 255 * rng.integers(0, 2, (8, size, size, channels))
        images += list(np.broadcast_to(noise, (8, size, size, 3)).astype(np.uint8))
    words = "Mamba", "GINR", "32 x 32", "pixel", "INR 60", "The fox", "E = mc", "lorem", "10 dB", "RGB!", "a b c", "#%?"
    font = getattr(ImageFont, "load_default_imagefont", ImageFont.load_default)()  # pixels, alike everywhere
    for i, word in enumerate(words):
        paper, ink = ((255,) * 3, (0,) * 3) if i < 6 else (tuple(colour()), tuple(colour()))
        image = Image.new("RGB", (size, size), tuple(map(int, paper)))
        pen = ImageDraw.Draw(image)
        for line in range(3):
            place, colours = (1 - 3 * line, 1 + 10 * line), tuple(map(int, ink))
            pen.text(place, f"{word} {word}", fill=colours, font=font)
        images.append(np.asarray(image))
    blocks = 255 * rng.integers(0, 2, (8, -(-size // 4), -(-size // 4), 3), dtype=np.uint8)
    images += list(blocks.repeat(4, 1).repeat(4, 2)[:, :size, :size])
    for i in range(8):
        first, second = (0, 255) if i < 4 else (colour(), colour())
        share = (rows, columns, rows + columns, rows - columns + size - 1)[i % 4] / (size - 1) / (2 if i % 4 > 1 else 1)
        images.append((first + share[..., None] * np.subtract(second, first) + np.zeros(3)).round().astype(np.uint8))
    images += [np.broadcast_to(np.uint8(colour()), (size, size, 3)) for _ in range(8)]
    images += [np.full((size, size, 3), value, np.uint8) for value in (0, 255)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
