"""The perceptron in Triton, in few passes over a GPU's memory: kernel, launches and operators.

Between two matrix products PyTorch writes what the first gives, reads it for the activation, writes that, and so on
back. Here one Triton kernel multiplies and applies the activation to what it still holds, and another does so in the
backward pass, where it also adds up the gradient of the first bias. They run in float16 and bfloat16 where the scan's
Triton backend does, and PyTorch's layers elsewhere.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba_ginr.kernels.backends import refuse_second_derivatives, register
from mamba_ginr.kernels.triton_tiles import INT32, expect_plain_gradients, gradients_wanted, on_its_gpu, sum_rows


@triton.jit
def _gelu(h):
    """h Φ(h) and its derivative; Φ, the normal distribution, to 1e-7 (Abramowitz & Stegun 1964, 7.1.26)."""
    bell = tl.exp2(h * h * -0.7213475204444817)  # e^(−h²/2)
    root = tl.rsqrt(1.0 + 0.23164189 * tl.abs(h))
    t = root * root
    p = 0.1274147959 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))
    tail = t * p * bell
    normal = tl.where(h < 0, tail, 1.0 - tail)
    return h * normal, normal + h * bell * 0.3989422804014327


@triton.jit
def _product_kernel(
    a, weight, bias, kept, activated, dhidden, dbias, rows, inner, columns, weight_k, weight_n,
    GELU: tl.constexpr, BACKWARD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """A tile of a · weight (rows, columns), and what follows it.

    Forwards: ``activated`` = activation(product + bias), and ``kept``, if there is one, what was before it.
    Backwards: ``dhidden`` = product · derivative, its sum over the tile's rows into ``dbias``, and for GELU
    ``activated`` once more from ``kept``; for ReLU ``kept`` is what was activated.
    """
    blocks = tl.cdiv(columns, COLUMNS)
    tile_row, tile_column = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    row, column = tile_row * ROWS + tl.arange(0, ROWS), tile_column * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, INNER)
    at_row = tl.minimum(row, rows - 1).to(tl.int64)  # beyond the edge the last row once more
    a_tile = a + at_row[:, None] * inner + k[None, :]
    weight_tile = weight + k[:, None] * weight_k + column[None, :] * weight_n
    there = (row < rows)[:, None] & (column < columns)[None, :]
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    if BACKWARD:
        h = tl.load(kept + place, mask=there, other=0.0)  # asked for before the product, that it need not wait
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, inner, INNER):
        inside = k < inner - first
        a_k = tl.load(a_tile + first, mask=inside[None, :], other=0.0)
        inside = inside[:, None] & (column < columns)[None, :]
        weight_k_tile = tl.load(weight_tile + first * weight_k, mask=inside, other=0.0)
        product = tl.dot(a_k, weight_k_tile, product)

    if not BACKWARD:
        h = (product + tl.load(bias + column, mask=column < columns, other=0.0)[None, :]).to(a.dtype.element_ty)
        if kept is not None:
            tl.store(kept + place, h, mask=there)
        if GELU:
            h = _gelu(h.to(tl.float32))[0].to(a.dtype.element_ty)
        else:
            h = tl.maximum(h, 0.0)
        tl.store(activated + place, h, mask=there)
    else:
        h = h.to(tl.float32)
        if GELU:
            after, slope = _gelu(h)
            # Nothing of the product is added; without it, the compiler computes GELU twice, in two layouts.
            after = tl.fma(product, 0.0, after)
            tl.store(activated + place, after.to(a.dtype.element_ty), mask=there)
            gradient = product * slope
        else:
            gradient = tl.where(h > 0, product, 0.0)
        tl.store(dhidden + place, gradient.to(a.dtype.element_ty), mask=there)
        total = tl.sum(tl.where(there, gradient, 0.0), 0)
        tl.store(dbias + tile_row * columns + column, total, mask=column < columns)


# Tiles, for GELU (True: inner 256) and for ReLU (False: inner 512): the fastest of some ten each, at the sizes of
# the training step on an H100.
FORWARD = {
    True: {"ROWS": 64, "COLUMNS": 128, "INNER": 64, "num_warps": 4, "num_stages": 2},
    False: {"ROWS": 128, "COLUMNS": 128, "INNER": 64, "num_warps": 4, "num_stages": 3},
}
BACKWARD = {
    True: {"ROWS": 32, "COLUMNS": 128, "INNER": 64, "num_warps": 4, "num_stages": 3},
    False: {"ROWS": 64, "COLUMNS": 128, "INNER": 64, "num_warps": 4, "num_stages": 3},
}


def _launch(sizes, a, weight, weight_strides, columns, *tensors, **flags) -> None:
    rows, inner = a.shape
    if rows * columns:
        tiles = triton.cdiv(rows, sizes["ROWS"]) * triton.cdiv(columns, sizes["COLUMNS"])
        _product_kernel[(tiles,)](a, weight, *tensors, rows, inner, columns, *weight_strides, **flags, **sizes)


@torch.library.custom_op(
    "mamba_ginr::mlp",
    mutates_args=(),
    schema="(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, bool gelu, bool keep) -> (Tensor, Tensor)",
)
@on_its_gpu
def _mlp(x, weight1, bias1, weight2, gelu, keep):
    """The output (rows, outputs), and, if ``keep``, what the backward pass wants: before GELU, or after ReLU."""
    activated = x.new_empty(len(x), len(weight1))
    before = torch.empty_like(activated) if gelu and keep else None
    tensors = (bias1, before, activated, None, None)
    _launch(FORWARD[gelu], x, weight1, (1, x.shape[1]), len(weight1), *tensors, GELU=gelu, BACKWARD=False)
    kept = (before if gelu else activated) if keep else x.new_empty(0)
    return activated @ weight2.t(), kept


@torch.library.custom_op(
    "mamba_ginr::mlp_backward",
    mutates_args=(),
    schema=(
        "(Tensor dy, Tensor kept, Tensor x, Tensor weight1, Tensor weight2, bool gelu)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
@on_its_gpu
def _mlp_backward(dy, kept, x, weight1, weight2, gelu):
    """Gradients of x, weight1, bias1 (float32) and weight2."""
    activated, dhidden = torch.empty_like(kept) if gelu else kept, torch.empty_like(kept)
    dbias = dy.new_empty(triton.cdiv(len(dy), BACKWARD[gelu]["ROWS"]), len(weight1), dtype=torch.float32)
    tensors = (None, kept, activated, dhidden, dbias)
    _launch(BACKWARD[gelu], dy, weight2, (len(weight1), 1), len(weight1), *tensors, GELU=gelu, BACKWARD=True)
    return dhidden @ weight1, dhidden.t() @ x, sum_rows(dbias), dy.t() @ activated


@_mlp.register_fake
def _(x, weight1, bias1, weight2, gelu, keep):
    return x.new_empty(len(x), len(weight2)), x.new_empty(*((len(x), len(weight1)) if keep else (0,)))


@_mlp_backward.register_fake
def _(dy, kept, x, weight1, weight2, gelu):
    bias1 = weight1.new_empty(len(weight1), dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(weight1), bias1, torch.empty_like(weight2)


def _save(ctx, inputs, output) -> None:
    x, weight1, _bias1, weight2, ctx.gelu, _keep = inputs
    ctx.save_for_backward(output[1], x, weight1, weight2)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy: Tensor, _dkept):
    dx, dweight1, dbias1, dweight2 = _mlp_backward(dy.contiguous(), *ctx.saved_tensors, ctx.gelu)
    return dx, dweight1, dbias1, dweight2, None, None


def _mlp_triton(x, weight1, bias1, weight2, gelu) -> Tensor:
    """The product of ``mlp``, for rows (rows, inputs), as the operator wants it: the first bias in float32."""
    expect_plain_gradients("mlp")
    if max(len(x), weight1.numel(), weight2.numel()) >= INT32:
        raise ValueError(
            f"mlp: {len(x):,} rows and weights of {weight1.numel():,} and {weight2.numel():,} numbers; the backend "
            f"triton counts each in 32 bits, to {INT32:,}. Take nn.Linear"
        )
    x, weight1, weight2 = (t.contiguous() for t in (x, weight1, weight2))
    inputs = (x, weight1, bias1.float(), weight2)
    return _mlp(*inputs, gelu, gradients_wanted(inputs))[0]


refuse_second_derivatives(_mlp_backward, "mlp: the backend triton")
_mlp.register_autograd(_gradients, setup_context=_save)
register("mlp", "triton", _mlp_triton)
