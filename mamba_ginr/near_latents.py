"""Which latents a query of the decoder reads: all of a small image's, in a larger one those of the patches around it.

The attention's bias falls as exp(−locality · r²) with r patches. What lies further away than ``reach`` patches from
the patch of a query weighs less than float32's last bit, and is not read. (That is sure where its logit leads those
nearby by no more than NEGLIGIBLE says.) So time and memory of a query do not depend on the image's size.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Near = Callable[..., Tensor]  # (b, P, c), and what stands for patches beyond the border (0) → (b, ..., K, c)
Bias = Callable[[Tensor, Tensor], Tensor]  # (..., Q, 2) and (..., K, 2) → (..., Q, K), of their differences alone

WHOLE = 16  # patches a side, up to which all are read, in one product: an image of 32×32 in patches of 2
AT_ONCE, LEAST = 65_536, 4096  # queries without a gradient: of a batch, and at least of each of its images
# e⁻⁵⁶: float32's last bit (e⁻¹⁷) where a distant logit leads by 39. In the committed weights logits lie up to 85 apart,
# but nearby ones lead: on 17 photographs and 4 images of noise what is left out weighs 5e-27 at most.
NEGLIGIBLE = 56.0


def reach_of(locality: float) -> float:
    """How many patches around its own a query reads on each side, where the bias is −locality · r²; inf: all.

    The nearest patch that is left out lies reach + 1 patches from the query's own, and so at least
    (reach + 1)² − 2 · (reach + 1) · ½ = reach · (reach + 1) squared patches further from the query than its own.
    """
    return math.ceil(math.sqrt(NEGLIGIBLE / locality + 0.25) - 0.5) if locality > 0 else math.inf


def all_of(x: Tensor, beyond: float = 0.0) -> Tensor:
    """All latents, for every query."""
    return x


def warn_between_pixels(coords: Tensor, size: int) -> None:
    """UserWarning unless coords (..., 2) are centres of the pixels of an image (3, size, size)."""
    if torch.compiler.is_compiling() or not coords.numel():
        return
    if coords.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    places = coords.detach().float() * size - 0.5  # whole numbers at the centres
    try:
        off = (places - places.round().clamp(0, size - 1)).abs().max().item()
        between = not off <= 0.05  # or no number
    except (RuntimeError, TypeError):  # a transform, or a trace: no values can be looked at
        return
    if between:
        warnings.warn(
            f"coords lie up to {off:.2f} pixels from the centres of the image's own pixels. Without a pixel width the "
            f"decoder answers, and training shows it these centres only: between them its colours mean nothing. Give "
            f"pixel_width, for a grid of 64 pixels a side 1 / 64, and the head answers.",
            stacklevel=4,  # the caller of ``MambaGINR.decode``
        )


class NearLatents(nn.Module):
    """The queries of an image in parts, and for each part a function that takes what it reads out of all latents.

    Args:
        side: patches along a side of the image.
        patch_size: in pixels.
        locality: the bias at a distance of one patch, −locality.
        grid: whether the latents lie on the patches, one on each; else all are read.
    """

    def __init__(self, side: int, patch_size: int, locality: float, grid: bool):
        super().__init__()
        reach = reach_of(locality)
        self.side, self.reach, self.local = side, reach, grid and side > WHOLE and 2 * reach + 1 < side
        if self.local:
            # Tiles of about 8 × 8 patches share what they read: those patches and ``reach`` more on each side.
            least = max(8, reach)
            self.tile = min(range(least, 2 * least), key=lambda tile: (-side % tile, tile))
            self.tiles, self.pixels = -(-side // self.tile), self.tile * patch_size
            centres = (torch.arange(self.tiles * self.pixels) + 0.5) / (side * patch_size)  # the last tiles may jut out
            self.register_buffer("rows", centres.view(self.tiles, self.pixels), persistent=False)
            # The patches that a tile sees, from the corner of the tile.
            patches = (torch.arange(-reach, self.tile + reach) + 0.5) / side
            self.register_buffer("seen", torch.cartesian_prod(patches, patches), persistent=False)

    def are_own(self, coords: Tensor, own: Tensor, asked: bool = True) -> bool:
        """Whether these are the centres of the image's own pixels, in order; perhaps False where it does not matter.

        UserWarning for coords (..., 2) between the centres, if they are ``asked`` of the decoder after training.
        """
        if coords is own:
            return True
        if asked and not self.training:
            warn_between_pixels(coords, math.isqrt(len(own)))
        return self.local and coords.shape == own.shape and torch.equal(coords, own)

    def parts(
        self, coords: Tensor, centres: Tensor, bias_of: Bias, own: bool, chunk: int | None = None, batch: int = 1
    ) -> Iterator[tuple[Tensor, Tensor, Near]]:
        """Coords (1 or B, Q, 2) in parts of about ``chunk`` queries, each with its bias and with what it reads.

        ``centres`` (1, P, 2) are those of the latents' patches, in raster order if they lie on the grid. ``own`` says
        that the coords are the centres of the image's own pixels, in raster order, which are then taken tile by tile.
        ``chunk`` None: all at once if gradients are kept, which need all anyhow; else AT_ONCE of a ``batch`` of images,
        but no less than LEAST of each, or than a row of tiles. A part is (1 or B, ..., q, 2), its bias
        (1 or B, ..., q, K), −inf beyond the border, and what it reads (B, ..., K, c); without ``own`` q may be 1.
        """
        if not chunk and not torch.is_grad_enabled():
            chunk = max(LEAST, AT_ONCE // max(1, batch))
        if self.local and own:
            rows = max(1, chunk // (self.tiles * self.pixels**2)) if chunk else self.tiles
            # Each tile sees its patches at the same offsets, so one bias serves all; beyond the border it is −inf.
            bias = bias_of(torch.cartesian_prod(self.rows[0], self.rows[0]), self.seen)
            inside = centres.new_zeros(1, self.side**2, 1)
            for first in range(0, self.tiles, rows):
                last = min(first + rows, self.tiles)
                y, x = self.rows[first:last].view(-1, 1, self.pixels, 1), self.rows.view(1, -1, 1, self.pixels)
                part = torch.stack(torch.broadcast_tensors(y, x), dim=-1)  # (rows, tiles, pixels, pixels, 2)
                near = partial(self._windows, first, last)
                yield part.flatten(2, 3).flatten(0, 1).unsqueeze(0), bias + near(inside, -math.inf).mT, near
            return
        for part in coords.split(chunk or coords.shape[1], dim=1):
            near = all_of
            if self.local:
                offsets = torch.arange(-self.reach, self.reach + 1, device=part.device)
                patch = (part.detach() * self.side).long().clamp(0, self.side - 1).unsqueeze(-2)
                patches = patch + torch.cartesian_prod(offsets, offsets)  # (1 or B, Q, K, 2)
                part, near = part.unsqueeze(-2), partial(self._around, patches)
            yield part, bias_of(part, near(centres, math.inf)), near

    def in_order(self, results: list[Tensor], own: bool) -> Tensor:
        """What was computed of the parts, (B, ..., q, c) each → (B, Q, c), in the order of the coords."""
        result = torch.cat(results, dim=1)
        if not (self.local and own):
            return result.flatten(1, -2)
        result = rearrange(result, "b (y x) (i j) c -> b (y i) (x j) c", y=self.tiles, i=self.pixels)
        size = self.side * self.pixels // self.tile
        return result[:, :size, :size].flatten(1, 2)

    def _windows(self, first: int, last: int, x: Tensor, beyond: float = 0.0) -> Tensor:
        """(b, side², c) → (b, tiles, (tile + 2 reach)², c) of the tiles' rows ``first`` … ``last`` − 1."""
        reach, jut = self.reach, self.tiles * self.tile - self.side
        top, bottom = first * self.tile - reach, last * self.tile + reach
        rows = x.unflatten(1, (self.side, self.side))[:, max(top, 0) : bottom]
        above, below = max(-top, 0), max(bottom - self.side, 0)
        grid = F.pad(rows, (0, 0, reach, reach + jut, above, below), value=beyond)
        grid = self._with_margins(self._with_margins(grid, 1), 3)  # (b, rows, window, tiles, window, c)
        return rearrange(grid, "b y i x j c -> b (y x) (i j) c")

    def _with_margins(self, x: Tensor, dim: int) -> Tensor:
        """An axis of tiles and ``reach`` more at its ends → two axes, the tiles and what each sees.

        Made of slices: their gradients are sums in one order, where an index's are added as they come.
        """
        reach, length = self.reach, x.shape[dim] - 2 * self.reach
        before, own, after = (x.narrow(dim, i * reach, length).unflatten(dim, (-1, self.tile)) for i in range(3))
        before, after = before.narrow(dim + 1, 0, reach), after.narrow(dim + 1, self.tile - reach, reach)
        return torch.cat([before, own, after], dim=dim + 1)

    def _around(self, patches: Tensor, x: Tensor, beyond: float = 0.0) -> Tensor:
        """(b, side², c), patches (1 or B, Q, K, 2) in rows and columns → (b or B, Q, K, c)."""
        inside = ((patches >= 0) & (patches < self.side)).all(-1, keepdim=True)
        row, column = patches.clamp(0, self.side - 1).unbind(-1)
        index = row * self.side + column
        if len(index) == 1:
            values = x[:, index[0]]
        else:
            values = x.expand(len(index), -1, -1)[torch.arange(len(index), device=x.device).view(-1, 1, 1), index]
        return torch.where(inside, values, beyond)
