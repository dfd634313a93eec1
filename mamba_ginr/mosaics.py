"""Places in a mosaic, k × k images side by side that are averaged down by k."""

import torch
from torch import Tensor


def finer_places(scale: int, per_width: int, size: int) -> Tensor:
    """Centres, along an axis in [0, 1], of pixels 1 / ``scale`` of an input pixel wide: (F,).

    They lie 1 / ``per_width`` of their width apart: F = (scale · size − 1) · per_width + 1.
    """
    return (torch.arange((scale * size - 1) * per_width + 1) / per_width + 0.5) / (scale * size)


def away_from_seams(tiles: int, scale: int, per_width: int = 1, size: int = 32, margin: float = 2.0) -> Tensor:
    """Which of these pixels, in raster order, lie over ``margin`` input pixels from the seams of tiles² images."""
    centres = size * finer_places(scale, per_width, size)  # in input pixels
    seams = torch.arange(1, tiles) * size / tiles
    far = ((centres.unsqueeze(1) - seams).abs() > margin).all(1)
    return torch.outer(far, far).flatten().nonzero().squeeze(1)


def check_batch(images: Tensor, batch_size: int, hard: int, mosaics: int, queries: int, seed: int, large_enough: bool):
    """ValueError names the settings of cell 10 of which no batch of these images (n, 3, S, S) can be made.

    ``large_enough``: whether a mosaic of the images has places away from its seams.
    """
    if not 1 <= batch_size <= len(images):
        raise ValueError(f"BATCH_SIZE = {batch_size} must lie in 1 … {len(images)} (training images)")
    if not 0 <= seed < 2**32:
        raise ValueError(f"SEED = {seed} must lie in 0 … 2³² − 1")
    if mosaics and queries < 1:
        raise ValueError(f"SR_QUERIES = {queries}: mosaics are asked for at least one finer pixel")
    if not 0 <= hard + mosaics < batch_size or min(hard, mosaics) < 0 or (mosaics and not large_enough):
        raise ValueError(
            f"HARD_FRACTION and SR_FRACTION of BATCH_SIZE = {batch_size} make {hard} hard images and {mosaics} "
            f"mosaics: they must leave an image as it is, and images of {images.shape[-1]} pixels a side be large "
            f"enough for mosaics (SR_FRACTION = 0 does without)"
        )
