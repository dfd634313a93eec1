"""Interpolation that keeps means: a cubic spline through the cumulative sums of pixels."""

import math

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor, nn

from mamba_ginr.kernels.head import look_up


def widths_and_widest(pixel_width, pixels: Tensor, widest: int = 0) -> tuple[Tensor, int]:
    """Widths (1 or B,) beside ``pixels`` (B, 3, S, S), and the most of these pixels that one of them spans.

    ``pixel_width`` is a number or one for each image. Where ``widest`` is known it is not looked up, which waits for a
    GPU; one that is too small gives wrong means. ValueError for a width that is negative or not finite.
    """
    size, is_number = pixels.shape[-1], isinstance(pixel_width, int | float)
    if not is_number:
        pixel_width = torch.as_tensor(pixel_width)
    if not widest:
        least = largest = pixel_width if is_number else 0
        if not is_number and pixel_width.numel():
            least, largest = (value.item() for value in pixel_width.aminmax())
        if not 0 <= least <= largest < math.inf:
            raise ValueError(f"pixel_width must be finite and not negative, in the units of the coords: {pixel_width}")
        widest = math.ceil(largest * size)
    dtype = torch.promote_types(pixels.dtype, torch.float32)
    widths = torch.as_tensor(pixel_width, dtype=dtype, device=pixels.device).view(-1)
    return widths, min(max(1, widest), size)


class HistoSpline(nn.Module):
    """Means over pixels of any width, from the pixels of an image: the spline that interpolates their cumulative sums.

    Pixels (B, 3, S, S), coords (1 or B, Q, 2), widths (1 or B,) in [0, 1] → (B, Q, 3). The mean over one of the image's
    own pixels is that pixel, over k × k finer ones too. Beyond the border the image does not count,
    and places there are those on it; widths below 1e-4 are 1e-4.

    What is averaged is the sums' derivative, a quadratic spline. Its (S + 2)² coefficients are found once a call, by
    products that are as exact as PyTorch is told to multiply. A query reads those around it: 4 × 4 for a finer pixel.
    """

    def __init__(self, size: int):
        super().__init__()
        sums = np.vstack([np.zeros(size), np.tril(np.ones((size, size)))])  # of each pixel, up to each border
        cubic, square, linear, _ = CubicSpline(np.arange(size + 1), sums, bc_type="natural").c  # (interval, pixel)
        # On interval i the derivative is linear + 2 square t + 3 cubic t², by B-splines the coefficients i … i + 2.
        before, after = linear - square, linear + square
        last = 2 * (linear + 2 * square + 3 * cubic) - after
        of_pixels = np.vstack([before, after[-1:], last[-1:]])  # (size + 2, size)
        self.size = size
        self.register_buffer("of_pixels", torch.from_numpy(of_pixels).float(), persistent=False)

    def weights(self, centres: Tensor, widths: Tensor, widest: int) -> tuple[Tensor, Tensor]:
        """Along each axis the first coefficient that counts in a mean, and how much it and those after it count.

        Centres (b, Q, 2), widths (b,) → (b, Q, 2) and (b, Q, 2, widest + 3).
        """
        half = widths.view(-1, 1, 1).clamp(min=1e-4) / 2
        centres = centres.clamp(0, 1)
        begin, end = (self.size * (centres + side).clamp(0, 1) for side in (-half, half))
        first = begin.detach().long().clamp(0, self.size - 1)
        taps = [0.0] * (widest + 3)
        for interval in range(widest + 1):
            low = begin - first if interval == 0 else torch.zeros_like(begin)
            high = end - first - interval
            # An end on the border of two intervals has its gradient in the first of them.
            high = torch.where((high > 0) & (high <= 1), high, high.detach().clamp(0, 1))
            share = (high - low) / (end - begin)
            # Simpson's rule is exact for a quadratic.
            for t, weight in ((low, 1 / 6), ((low + high) / 2, 2 / 3), (high, 1 / 6)):
                for k, spline in enumerate(((1 - t).square() / 2, 0.5 + t * (1 - t), t.square() / 2)):
                    taps[interval + k] = taps[interval + k] + weight * share * spline
        return first, torch.stack(taps, dim=-1)

    def forward(
        self, pixels: Tensor, coords: Tensor, widths: Tensor | float, widest: int = 0, chunk: int | None = None
    ) -> Tensor:
        """``chunk`` queries at a time; ``widths``, ``widest`` and errors as of ``widths_and_widest``."""
        widths, widest = widths_and_widest(widths, pixels, widest)
        coefficients = self.of_pixels @ pixels @ self.of_pixels.T
        coefficients = coefficients.permute(0, 2, 3, 1).contiguous()  # (B, S + 2, S + 2, 3)
        # Where a query asks for much of the image, products with all of it are less work than looking up.
        local = widest == 1 or (widest + 3) ** 2 <= self.size + 2
        read = self._look_up if local else self._multiply
        parts = coords.split(chunk or max(1, coords.shape[1]), dim=1)
        return torch.cat([read(coefficients, *self.weights(part, widths, widest)) for part in parts], dim=1)

    def _places(self, first: Tensor, taps: Tensor) -> Tensor:
        """Of each tap its coefficient: (b, Q, 2, taps); beyond the last none counts."""
        return (first.unsqueeze(-1) + torch.arange(taps.shape[-1], device=first.device)).clamp(max=self.size + 1)

    def _look_up(self, coefficients: Tensor, first: Tensor, taps: Tensor) -> Tensor:
        (rows, columns), (of_rows, of_columns) = self._places(first, taps).unbind(2), taps.unbind(2)
        index = (rows.unsqueeze(-1) * (self.size + 2) + columns.unsqueeze(-2)).flatten(2)
        weights = (of_rows.unsqueeze(-1) * of_columns.unsqueeze(-2)).flatten(2)  # (b, Q, taps²), as index
        return (look_up(coefficients.flatten(1, 2), index) * weights.unsqueeze(-1)).sum(2)

    def _multiply(self, coefficients: Tensor, first: Tensor, taps: Tensor) -> Tensor:
        whole = taps.new_zeros(*taps.shape[:-1], self.size + 2).scatter_add(-1, self._places(first, taps), taps)
        of_rows, of_columns = whole.expand(len(coefficients), -1, -1, -1).unbind(2)
        lines = torch.einsum("bqr,brck->bqck", of_rows, coefficients)
        return (lines * of_columns.unsqueeze(-1)).sum(2)
