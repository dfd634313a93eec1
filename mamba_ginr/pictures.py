"""Pictures of any size, of which crops of one size are taken where they lie: on the GPU, thousands at once.

Where a GPU has no room for all of them, they stay in the computer's memory, and the crops alone go to the GPU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def shapes_of(pictures: Sequence[Tensor] | Tensor) -> list[tuple[int, int]]:
    """Height and width of each; of a tensor (n, 3, H, W) without a look at each of its many."""
    if torch.is_tensor(pictures):
        return len(pictures) * [tuple(pictures.shape[2:])]
    return [tuple(picture.shape[1:]) for picture in pictures]


class Pictures:
    """uint8 pictures (3, H, W) of any sizes from ``size`` a side on, one behind the other in one tensor.

    Args:
        pictures: a list, or a tensor (n, 3, H, W). ValueError if one is smaller, or there is none.
        size: a side of the crops.
        many: count as many crops of a picture as lie in it side by side; else one.
        most: crops in all, 0: all.

    ``len()`` is the number of crops: those of an epoch of training, or of a test. Where all pictures are of
    ``size`` × ``size`` pixels, the crops are the pictures.
    """

    def __init__(self, pictures: Sequence[Tensor] | Tensor, size: int, many: bool = True, most: int = 0):
        shapes = shapes_of(pictures)
        if too_small := [f"{w}×{h}" for h, w in shapes if min(h, w) < size]:
            raise ValueError(f"pictures of {too_small[0]} pixels are smaller than crops of {size}×{size}")
        if not shapes:
            raise ValueError("no pictures")
        self.size, self.exact, self.apart = size, set(shapes) == {(size, size)}, False
        self.pixels = (
            pictures.reshape(-1) if torch.is_tensor(pictures) else torch.cat([p.reshape(-1) for p in pictures])
        )
        self.shapes = torch.tensor(shapes)  # (n, 2)
        self.largest = max(map(min, shapes))
        self.starts = torch.cat([torch.zeros(1, dtype=torch.long), 3 * self.shapes.prod(1).cumsum(0)[:-1]])
        crops = (self.shapes // size).prod(1) if many else torch.ones(len(shapes), dtype=torch.long)
        picture_of = torch.arange(len(shapes)).repeat_interleave(crops)
        if most and most < len(picture_of):
            drawn = torch.randperm(len(picture_of), generator=torch.Generator().manual_seed(0))
            picture_of = picture_of[drawn[:most]]
        self.picture_of = picture_of

    def to(self, device: torch.device | str, apart: bool = False) -> "Pictures":
        """Crops are then on ``device``; the pictures, too, unless they are to stay ``apart``, where they are."""
        self.apart = apart
        for name in ("shapes", "starts", "picture_of", "pixels"):
            if not (apart and name == "pixels"):
                setattr(self, name, getattr(self, name).to(device))
        return self

    @property
    def device(self) -> torch.device:
        """Where crops are wanted."""
        return self.shapes.device

    def __len__(self) -> int:
        return len(self.picture_of)

    def crops(self, which: Tensor, size: int = 0, generator: torch.Generator | None = None) -> Tensor:
        """Crops number ``which`` (B,), at random places or with no generator in the middle → (B, 3, size, size).

        ``size`` is by default that of the class; their pictures must be large enough for another.
        """
        size = size or self.size
        if size > self.largest:
            raise ValueError(f"crops of {size}×{size} of pictures that have {self.largest} pixels at most")
        if self.exact:
            return self.pixels.view(-1, 3, size, size)[which.to(self.pixels.device)].to(self.device)
        picture = self.picture_of[which]
        shape, start = self.shapes[picture], self.starts[picture]
        room = shape - size  # (B, 2)
        if generator is None:
            corner = room // 2
        else:
            corner = (torch.rand(room.shape, generator=generator, device=self.device) * (room + 1)).long().minimum(room)
        if self.apart or generator is None:  # a test's may be many
            return self._cut(start.tolist(), shape.tolist(), corner.tolist(), size).to(self.device)
        along = torch.arange(size, device=self.device)
        rows, columns = (corner[:, axis, None] + along for axis in (0, 1))  # (B, size) each
        height, width = shape.view(-1, 2, 1, 1, 1).unbind(1)
        channel = torch.arange(3, device=self.device).view(3, 1, 1)
        index = (channel * height + rows[:, None, :, None]) * width + columns[:, None, None, :]
        return self.pixels[start.view(-1, 1, 1, 1) + index]

    def _cut(self, starts: list[int], shapes: list[list[int]], corners: list[list[int]], size: int) -> Tensor:
        """The same crops one by one, where the pictures lie: their places in them need more memory than the crops."""
        crops = self.pixels.new_empty(len(starts), 3, size, size)
        for crop, start, (height, width), (row, column) in zip(crops, starts, shapes, corners):
            picture = self.pixels[start : start + 3 * height * width].view(3, height, width)
            crop.copy_(picture[:, row : row + size, column : column + size])
        return crops

    def pieces(self, reduction: int) -> tuple[int, Tensor]:
        """The fewest pieces a side that make up ``reduction`` · size pixels, and the crops that are large enough.

        One piece has no seam. It is taken where at least half of the crops' pictures are large enough for it.
        """
        smaller = self.shapes[self.picture_of].amin(1)
        for tiles in (n for n in range(1, reduction + 1) if reduction % n == 0):
            enough = smaller >= reduction // tiles * self.size
            if 2 * enough.sum() >= len(self):
                return tiles, enough.nonzero().squeeze(1)
        raise AssertionError("every picture is as large as a crop")
