"""All of Mamba between in_proj and out_proj, on the Triton kernels of the convolution and the scan.

One operator, so that the backward pass can compute the step sizes again instead of keeping them, and write the
gradients of both halves of xz where in_proj's backward wants them.
"""

import torch
from torch import Tensor

from mamba_ginr.kernels.backends import refuse_second_derivatives, register
from mamba_ginr.kernels.causal_conv_triton import conv_backward, conv_forward, expect_parts, taps_and_bias
from mamba_ginr.kernels.selective_scan.triton_ops import (
    kept_states,
    save_inputs,
    scan_backward,
    scan_forward,
    widest_row,
)
from mamba_ginr.kernels.triton_tiles import (
    by_images,
    contiguous_rows,
    expect_countable,
    expect_plain_gradients,
    gradients_wanted,
    on_its_gpu,
)


def _cut(small, dt_proj, A):
    """Step sizes, B and C from the small projection [step sizes | B | C]."""
    rank = dt_proj.shape[1]
    B, C = small[..., rank:].unflatten(-1, (2, -1, A.shape[1])).unbind(2)
    return small[..., :rank] @ dt_proj.t(), B, C


WEIGHTS = (
    "Tensor conv_weight, Tensor conv_bias, Tensor x_proj, Tensor dt_proj, Tensor A, Tensor D, Tensor dt_bias, bool both"
)


@torch.library.custom_op(
    "mamba_ginr::inner",
    mutates_args=(),
    schema=f"(Tensor xz, {WEIGHTS}, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
)
@on_its_gpu
def _triton_inner(xz, conv_weight, conv_bias, x_proj, dt_proj, A, D, dt_bias, both, keep):
    x, z = xz.chunk(2, dim=-1)
    u = conv_forward(x, conv_weight, conv_bias, both)
    small = u @ x_proj.t()
    delta, B, C = _cut(small, dt_proj, A)
    return *scan_forward((u, delta, A, B, C, D, z, dt_bias), True, keep), u, small


@torch.library.custom_op(
    "mamba_ginr::inner_backward",
    mutates_args=(),
    schema=(
        f"(Tensor dy, Tensor states, Tensor u, Tensor small, Tensor xz, {WEIGHTS})"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
@on_its_gpu
def _triton_inner_backward(dy, states, u, small, xz, conv_weight, conv_bias, x_proj, dt_proj, A, D, dt_bias, both):
    """Gradients of xz, taps and bias of the convolution in one, x_proj, dt_proj, A, and D and dt_bias in one."""
    (x, z), (delta, B, C) = xz.chunk(2, dim=-1), _cut(small, dt_proj, A)
    dxz, dsmall, rank = torch.empty_like(xz), torch.empty_like(small), dt_proj.shape[1]
    dx, dz = dxz.chunk(2, dim=-1)
    scan = (u, delta, A, B, C, D, z, dt_bias)
    du, ddelta, dA, dvectors = scan_backward(dy, states, scan, True, dz, dsmall[..., rank:])
    rows, wide = dsmall.flatten(0, 1), du.flatten(0, 1)
    torch.mm(ddelta.flatten(0, 1), dt_proj, out=rows[:, :rank])
    dx_proj = rows.t() @ u.flatten(0, 1)
    ddt_proj = ddelta.flatten(0, 1).t() @ small.flatten(0, 1)[:, :rank]
    wide.addmm_(rows, x_proj)
    dconv = conv_backward(du, x, conv_weight, conv_bias, both, dx)
    return dxz, dconv, dx_proj, ddt_proj, dA, dvectors


@_triton_inner.register_fake
def _(xz, conv_weight, conv_bias, x_proj, dt_proj, A, D, dt_bias, both, keep):
    y = xz.new_empty(*xz.shape[:2], xz.shape[2] // 2)
    return y, kept_states(y, A, keep), torch.empty_like(y), xz.new_empty(*xz.shape[:2], len(x_proj))


@_triton_inner_backward.register_fake
def _(dy, states, u, small, xz, conv_weight, conv_bias, x_proj, dt_proj, A, D, dt_bias, both):
    dxz, dx_proj, ddt_proj, dA = (torch.empty_like(t) for t in (xz, x_proj, dt_proj, A))
    dconv = conv_weight.new_empty(conv_weight.numel() + conv_bias.numel())
    return dxz, dconv, dx_proj, ddt_proj, dA, A.new_empty(2, len(A))


def _inner_gradients(ctx, dy: Tensor, *_kept):
    _states, _u, _small, _xz, conv_weight, *_ = ctx.saved_tensors
    dxz, dconv, *others, (dD, dbias) = _triton_inner_backward(contiguous_rows(dy), *ctx.saved_tensors, ctx.flag)
    return dxz, *taps_and_bias(dconv, conv_weight), *others, dD, dbias, None, None


def _inner_triton(xz, conv_weight, conv_bias, x_proj, dt_proj, A, D, dt_bias, bidirectional) -> Tensor:
    """``mamba_inner`` as the operator wants it: what is no matrix product's in float32."""
    expect_plain_gradients("mamba_inner")
    expect_parts("mamba_inner", xz.shape[1])
    expect_countable("mamba_inner", xz.shape[1], max(xz.shape[2], len(x_proj), widest_row(A)))
    floats = (t.float().contiguous() for t in (conv_weight, conv_bias, A, D, dt_bias))
    conv_weight, conv_bias, A, D, dt_bias = floats
    weights = (conv_weight, conv_bias, x_proj, dt_proj, A, D, dt_bias)
    keep = gradients_wanted((xz, *weights))
    return by_images(lambda xz: _triton_inner(xz, *weights, bidirectional, keep)[0], xz.contiguous())


refuse_second_derivatives(_triton_inner_backward, "mamba_inner: the backend triton")
_triton_inner.register_autograd(_inner_gradients, setup_context=save_inputs)
register("mamba_inner", "triton", _inner_triton)
