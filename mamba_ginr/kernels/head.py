"""What the notebook's super-resolution head needs to run fast: a lookup, and a Linear of few inputs."""

import torch
from torch import Tensor, nn


class LinearOfFew(nn.Linear):
    """``nn.Linear`` of a few inputs, each a tensor of its own: in float32, with the parameters of ``nn.Linear``.

    Written as a sum of products, which the compiler joins with what surrounds it.
    """

    def forward(self, *inputs: Tensor) -> Tensor:
        """(..., 1) each → (..., out_features)"""
        result = self.bias
        for value, weight in zip(inputs, self.weight.T):
            result = result + value * weight
        return result


def look_up(values: Tensor, index: Tensor) -> Tensor:
    """Rows of (B, P, C) by their numbers (1 or B, Q, n) → (B, Q, n, C); with a backward pass that is quick on a GPU.

    ValueError where the numbers are those of another count of images.
    """
    if len(index) not in (1, len(values)):
        raise ValueError(f"coords of {len(index)} images were given for {len(values)}: as many are needed, or one")
    if len(index) == 1:
        return values.index_select(1, index.flatten()).unflatten(1, index.shape[1:])
    index = index + values.shape[1] * torch.arange(len(index), device=index.device).view(-1, 1, 1)
    return values.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)


def four_nearest(pixels: Tensor, coords: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The four pixels whose centres surround a place, and the way from each to the place.

    Args:
        pixels: (B, size², C), in raster order.
        coords: (1 or B, Q, 2), (row, column) in [0, 1]; gradients go through them.

    Returns:
        (B, Q, 4, C), beyond the border the pixels on it; and (1 or B, Q, 4, 2), in pixels, −1 … 1.
    """
    place = (size * coords - 0.5).unsqueeze(-2)
    corner = torch.arange(4, device=coords.device)
    neighbours = place.detach().floor() + torch.stack([corner // 2, corner % 2], dim=-1)
    row, column = neighbours.long().clamp(0, size - 1).unbind(-1)
    index = row * size + column  # (1 or B, Q, 4)
    return look_up(pixels, index), place - neighbours
