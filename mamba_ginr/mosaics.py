"""Mosaics: which kinds a batch has, and the places in one, k × k images side by side that are averaged down."""

from typing import NamedTuple

import torch
from torch import Tensor

from mamba_ginr.pictures import Pictures


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


class Kind(NamedTuple):
    """Pictures averaged down by ``reduction``, of which pixels 1 / ``scale`` of the input's width are asked for.

    Their centres lie 1 / (scale · per_width) of an input pixel apart.
    """

    reduction: int
    scale: int
    per_width: int


class KindInBatch(NamedTuple):
    """A kind of mosaics, and those of it in a batch."""

    kind: Kind
    tiles: int  # pieces a side that a picture is laid of
    count: int  # mosaics in a batch
    which: Tensor  # (n,), the crops whose pictures are large enough for a piece
    where: Tensor  # (m,), which of the finer pixels are away from seams
    centres: Tensor  # (F², 2), of all finer pixels

    @property
    def scale(self) -> int:
        return self.kind.scale


def mosaic_kinds(pictures: Pictures, kinds: list[tuple[int, int, int]], mosaics: int) -> list[KindInBatch]:
    """Deal the mosaics of a batch to the kinds in turn, leaving out kinds without a pixel away from seams."""
    allowed, found, device = [], [], pictures.device
    for kind in map(Kind._make, kinds):
        tiles, which = pictures.pieces(kind.reduction)
        where = away_from_seams(tiles, kind.scale, kind.per_width, pictures.size).to(device)
        if len(where):
            along = finer_places(kind.scale, kind.per_width, pictures.size)
            allowed.append((kind, tiles, which, where, torch.cartesian_prod(along, along).to(device)))
    for i, (kind, tiles, *places) in enumerate(allowed):
        if count := len(range(i, mosaics, len(allowed))):
            found.append(KindInBatch(kind, tiles, count, *places))
    return found


def check_batch(
    pictures: Pictures, batch_size: int, hard: int, mosaics: int, queries: int, seed: int, large_enough: bool
):
    """ValueError names the settings of cell 10 of which no batch of these pictures can be made.

    ``large_enough``: whether a mosaic of them has places away from its seams.
    """
    if not 1 <= batch_size <= len(pictures):
        raise ValueError(f"BATCH_SIZE = {batch_size} must lie in 1 … {len(pictures)} (training images)")
    if not 0 <= seed < 2**32:
        raise ValueError(f"SEED = {seed} must lie in 0 … 2³² − 1")
    if mosaics and queries < 1:
        raise ValueError(f"SR_QUERIES asks a mosaic for {queries} finer pixels: it must be over 0, or SR_FRACTION be 0")
    if not 0 <= hard + mosaics < batch_size or min(hard, mosaics) < 0 or (mosaics and not large_enough):
        raise ValueError(
            f"HARD_FRACTION and SR_FRACTION of BATCH_SIZE = {batch_size} make {hard} hard images and {mosaics} "
            f"mosaics: they must leave an image as it is, and images of {pictures.size} pixels a side be large "
            f"enough for mosaics (SR_FRACTION = 0 does without)"
        )
