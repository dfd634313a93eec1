"""Tokens in another order, with a backward pass that reads where PyTorch's own would add up."""

import torch
from torch import Tensor


def reorder(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """x (B, L, dim) → x[:, order], for a permutation ``order`` (L,) and its ``inverse``.

    Equivalent to ``x[:, order]``; its gradient is read by the inverse order, where that of an index is a sum.
    """
    return _Reorder.apply(x, order, inverse)


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(1, order)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient.index_select(1, *ctx.saved_tensors), None, None
