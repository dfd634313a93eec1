"""A residual sum and its LayerNorm, for layers that hand on what they have yet to add; see ``mlp``."""

import torch
from torch import Tensor, nn

from mamba_ginr.kernels.backends import autocast_dtype, implementation, is_fused
from mamba_ginr.kernels.inputs import expect_floats, expect_shapes


def add_norm(x: Tensor, branch: tuple[Tensor, Tensor] | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """The residual stream x + product + bias, where ``branch`` holds these two, and its norm for the next layer.

    Equivalent to::

        total = x if branch is None else x + branch[0] + branch[1]
        return total, norm(total)

    Args:
        x: (..., dim), float32
        branch: (..., dim) and (dim,), or None where there is nothing to add.
        norm: over the last dimension.

    Returns:
        (..., dim) in float32, and (..., dim) in the dtype of autocast, or float32. Where the kernels run, the stream's
        gradient is rounded to the dtype of autocast, too.

    Raises ValueError for shapes that do not fit, integers, complex numbers or several devices.
    """
    product, bias = branch or (None, None)
    expect_floats("add_norm", x=x, product=product, bias=bias, weight=norm.weight)
    expected = {"x": (x, (*x.shape[:-1], *norm.normalized_shape)), "product": (product, tuple(x.shape))}
    expect_shapes("add_norm", expected | {"bias": (bias, tuple(norm.normalized_shape))})
    dtype = autocast_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        # The kernel multiplies by a weight and adds a bias; a norm without is PyTorch's.
        if is_fused(x, dtype) and norm.weight is not None and norm.bias is not None:
            return implementation("add_norm", "triton")(x, branch, norm, dtype)
        x = x if branch is None else x + (product + bias)
        return x, norm(x).to(dtype)
