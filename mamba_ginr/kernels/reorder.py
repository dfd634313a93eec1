"""Tokens in another order, with a backward pass that reads where PyTorch's own would add up."""

import torch
from torch import Tensor


def reorder(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """x (B, L, dim) → x[:, order], for a permutation ``order`` (L,) and its ``inverse``.

    Equivalent to ``x[:, order]``; its gradient is read by the inverse order, where that of an index is a sum.
    """
    # The compiler knows no function with a forward mode.
    return (_Reorder if torch.compiler.is_compiling() else _ReorderForAll).apply(x, order, inverse)


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(1, order)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient.index_select(1, *ctx.saved_tensors), None, None


class _ReorderForAll(_Reorder):
    """The same, for torch.func and forward mode, too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        return x.index_select(1, order)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _x, order, inverse = inputs
        ctx.save_for_backward(inverse)
        ctx.save_for_forward(order)

    @staticmethod
    def jvp(ctx, tangent: Tensor, _order, _inverse) -> Tensor:
        return tangent.index_select(1, *ctx.saved_tensors)
