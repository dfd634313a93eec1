"""Interpolation that keeps means: a cubic spline through the cumulative sums of pixels."""

import math

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor, nn

from mamba_ginr.kernels.head import look_up


def widths_and_widest(pixel_width: float | Tensor, pixels: Tensor, widest: int = 0) -> tuple[Tensor, int]:
    """Widths (1 or B,) beside ``pixels`` (B, 3, S, S), and the most of these pixels that one of them spans.

    ``pixel_width`` is a number or one for each image. Where ``widest`` is known it is not looked up, which waits for a
    GPU. ValueError for a width that is negative or not finite.
    """
    size = pixels.shape[-1]
    if not widest:
        if isinstance(pixel_width, Tensor):
            least, largest = (value.item() for value in pixel_width.aminmax())
        else:
            least = largest = pixel_width
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

    What is averaged is the sums' derivative, a quadratic spline. Its coefficients, (S + 2)², are found once for an
    image; a query reads those around it, 4 × 4 where it asks for no more than one of the image's pixels.
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
        first = begin.detach().long().clamp(max=self.size - 1)
        taps = [0.0] * (widest + 3)
        for interval in range(widest + 1):
            low, high = ((x - first - interval).clamp(0, 1) for x in (begin, end))
            share = (high - low) / (end - begin)
            # Simpson's rule is exact for a quadratic.
            for t, weight in ((low, 1 / 6), ((low + high) / 2, 2 / 3), (high, 1 / 6)):
                for k, spline in enumerate(((1 - t).square() / 2, 0.5 + t * (1 - t), t.square() / 2)):
                    taps[interval + k] = taps[interval + k] + weight * share * spline
        return first, torch.stack(taps, dim=-1)

    def forward(self, pixels: Tensor, coords: Tensor, widths: Tensor, widest: int = 0) -> Tensor:
        """``widest`` as of ``widths_and_widest``."""
        widths, widest = widths_and_widest(widths, pixels, widest)
        first, taps = self.weights(coords, widths, widest)
        places = first.unsqueeze(-1) + torch.arange(widest + 3, device=first.device)
        rows, columns = places.clamp(max=self.size + 1).unbind(2)  # (b, Q, taps); beyond the last none counts
        index = (rows.unsqueeze(-1) * (self.size + 2) + columns.unsqueeze(-2)).flatten(2)
        coefficients = (self.of_pixels @ pixels @ self.of_pixels.T).flatten(2).mT.contiguous()  # (B, (S + 2)², 3)
        of_rows, of_columns = taps.unbind(2)
        weights = (of_rows.unsqueeze(-1) * of_columns.unsqueeze(-2)).flatten(2)  # (b, Q, taps²), as index
        return (look_up(coefficients, index) * weights.unsqueeze(-1)).sum(2)
