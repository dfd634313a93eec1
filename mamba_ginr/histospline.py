"""Interpolation that keeps means: a cubic spline through the cumulative sums of pixels."""

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor, nn


class HistoSpline(nn.Module):
    """Means over pixels of any width, from the pixels of an image: the spline that interpolates their cumulative sums.

    Pixels (B, 3, S, S), coords (1 or B, Q, 2), widths (1 or B,) in [0, 1] → (B, Q, 3). The mean over one of the image's
    own pixels is that pixel, over k × k finer ones too. Beyond the border the image does not count,
    and places there are those on it; widths below 1e-4 are 1e-4.
    """

    def __init__(self, size: int):
        super().__init__()
        sums = np.vstack([np.zeros(size), np.tril(np.ones((size, size)))])  # of each pixel, up to each border
        pieces = CubicSpline(np.arange(size + 1), sums, bc_type="natural").c  # (4, size, size): power, interval, pixel
        self.register_buffer("pieces", torch.from_numpy(pieces).float(), persistent=False)

    def weights(self, centres: Tensor, widths: Tensor) -> Tensor:
        """How much each pixel of a row or column counts in a mean: centres (b, Q, 2), widths (b,) → (b, Q, 2, S)."""
        size, half = self.pieces.shape[1], widths.view(-1, 1, 1).clamp(min=1e-4) / 2
        centres = centres.clamp(0, 1)
        ends = size * torch.stack([centres - half, centres + half]).clamp(0, 1)
        piece, sums = ends.detach().long().clamp(max=size - 1), 0.0
        t = (ends - piece).unsqueeze(-1)
        for coefficients in self.pieces:
            sums = sums * t + coefficients[piece]
        return (sums[1] - sums[0]) / (ends[1] - ends[0]).unsqueeze(-1)

    def forward(self, pixels: Tensor, coords: Tensor, widths: Tensor) -> Tensor:
        of_rows, of_columns = self.weights(coords, widths).unbind(2)
        lines = torch.einsum("bqr,bkrc->bqkc", of_rows.expand(len(pixels), -1, -1), pixels)
        return (lines * of_columns.unsqueeze(2)).sum(-1)
