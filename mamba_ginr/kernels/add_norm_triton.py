"""A residual, its sum and its norm in Triton, one kernel each way: kernels, launches and operators."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba_ginr.kernels.backends import refuse_second_derivatives, register
from mamba_ginr.kernels.triton_tiles import INT32, expect_plain_gradients, on_its_gpu, sum_rows


@triton.jit
def _rows_and_columns(step, rows, dim, ROWS: tl.constexpr, DIM: tl.constexpr):
    """Offsets of the ``step``-th group of rows of this program (ROWS, DIM), and which are there."""
    row = (step * tl.num_programs(0) + tl.program_id(0)) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, DIM)[None, :]
    return row.to(tl.int64) * dim + column, (row < rows) & (column < dim)


@triton.jit
def _normalise(total, there, dim, eps):
    """(total − mean) / standard deviation, and 1 / standard deviation, of each row."""
    centred = tl.where(there, total - tl.sum(total, 1, keep_dims=True) / dim, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1, keep_dims=True) / dim + eps)
    return centred * scale, scale


@triton.jit
def _norm_forward_kernel(
    x, branch, branch_bias, weight, bias, total, normed, rows, dim, eps,
    BRANCH: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    at, there = _rows_and_columns(0, rows, dim, ROWS, DIM)
    column = tl.arange(0, DIM)[None, :]
    stream = tl.load(x + at, mask=there, other=0.0)
    if BRANCH:
        added = tl.load(branch_bias + column, mask=column < dim, other=0.0)
        stream += tl.load(branch + at, mask=there, other=0.0).to(tl.float32) + tl.where(there, added, 0.0)
    tl.store(total + at, stream, mask=there)
    y = _normalise(stream, there, dim, eps)[0] * tl.load(weight + column, mask=column < dim, other=0.0)
    y += tl.load(bias + column, mask=column < dim, other=0.0)
    tl.store(normed + at, y.to(normed.dtype.element_ty), mask=there)


@triton.jit
def _norm_backward_kernel(
    dtotal, dnormed, total, weight, dx, sums, rows, dim, eps,
    STREAM: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Of a program's rows; ``sums`` (programs, 3, dim) are those of weight, bias and branch_bias."""
    column = tl.arange(0, DIM)[None, :]
    w = tl.load(weight + column, mask=column < dim, other=0.0)
    dweight = tl.zeros([ROWS, DIM], tl.float32)
    dbias, dbranch_bias = dweight, dweight
    for step in range(tl.cdiv(rows, tl.num_programs(0) * ROWS)):
        at, there = _rows_and_columns(step, rows, dim, ROWS, DIM)
        stream = tl.load(total + at, mask=there, other=0.0)
        dy = tl.load(dnormed + at, mask=there, other=0.0).to(tl.float32)
        if STREAM:
            own = tl.load(dtotal + at, mask=there, other=0.0).to(tl.float32)
        normalised, scale = _normalise(stream, there, dim, eps)
        dweight += dy * normalised
        dbias += dy
        dy *= w
        along = tl.sum(dy * normalised, 1, keep_dims=True) / dim
        gradient = scale * (dy - tl.sum(dy, 1, keep_dims=True) / dim - normalised * along)
        if STREAM:
            gradient += own
        tl.store(dx + at, gradient.to(dx.dtype.element_ty), mask=there)
        dbranch_bias += tl.where(there, gradient, 0.0)
    sums += tl.program_id(0) * 3 * dim + tl.arange(0, DIM)
    inside = tl.arange(0, DIM) < dim
    tl.store(sums, tl.sum(dweight, 0), mask=inside)
    tl.store(sums + dim, tl.sum(dbias, 0), mask=inside)
    tl.store(sums + 2 * dim, tl.sum(dbranch_bias, 0), mask=inside)


NORM_FORWARD = {"ROWS": 4, "num_warps": 4}
NORM_BACKWARD = {"ROWS": 4, "num_warps": 1}
PROGRAMS = 1056  # of the backward pass, each with sums of its own


@torch.library.custom_op(
    "mamba_ginr::add_norm",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor? branch, Tensor? branch_bias, Tensor weight, Tensor bias, float eps, ScalarType dtype)"
        " -> (Tensor, Tensor)"
    ),
)
@on_its_gpu
def _add_norm(x, branch, branch_bias, weight, bias, eps, dtype):
    """The sum and its norm, (rows, dim) each."""
    (rows, dim), total, normed = x.shape, torch.empty_like(x), torch.empty_like(x, dtype=dtype)
    if rows:
        _norm_forward_kernel[(triton.cdiv(rows, NORM_FORWARD["ROWS"]),)](
            x, branch, branch_bias, weight, bias, total, normed, rows, dim, eps,
            BRANCH=branch is not None, DIM=triton.next_power_of_2(dim), **NORM_FORWARD,
        )  # fmt: skip
    return total, normed


@torch.library.custom_op(
    "mamba_ginr::add_norm_backward",
    mutates_args=(),
    schema="(Tensor? dtotal, Tensor dnormed, Tensor total, Tensor weight, float eps) -> (Tensor, Tensor)",
)
@on_its_gpu
def _add_norm_backward(dtotal, dnormed, total, weight, eps):
    """The gradient of x and of branch alike, in the dtype of dtotal and dnormed, and those of the three vectors."""
    (rows, dim), dx = total.shape, torch.empty_like(dnormed)
    programs = min(PROGRAMS, triton.cdiv(rows, NORM_BACKWARD["ROWS"]))
    sums = total.new_empty(programs, 3, dim)
    if rows:
        _norm_backward_kernel[(programs,)](
            dtotal, dnormed, total, weight, dx, sums, rows, dim, eps,
            STREAM=dtotal is not None, DIM=triton.next_power_of_2(dim), **NORM_BACKWARD,
        )  # fmt: skip
    return dx, sum_rows(sums)


@_add_norm.register_fake
def _(x, branch, branch_bias, weight, bias, eps, dtype):
    return torch.empty_like(x), torch.empty_like(x, dtype=dtype)


@_add_norm_backward.register_fake
def _(dtotal, dnormed, total, weight, eps):
    return torch.empty_like(dnormed), total.new_empty(3, total.shape[1])


def _save_norm(ctx, inputs, output) -> None:
    _x, branch, _branch_bias, weight, _bias, ctx.eps, ctx.dtype = inputs
    ctx.branch = branch is not None
    ctx.save_for_backward(output[0], weight)
    ctx.set_materialize_grads(False)


def _norm_gradients(ctx, dtotal, dnormed):
    if dnormed is None:  # only the sum was used
        dnormed = torch.zeros_like(dtotal, dtype=ctx.dtype)
    # The stream's gradient goes from layer to layer in the dtype of the products, as all other gradients do; in
    # float32 in between, because autograd wants it so, and the compiler leaves the two casts out.
    dtotal = None if dtotal is None else dtotal.to(dnormed.dtype).contiguous()
    dx, sums = _add_norm_backward(dtotal, dnormed.contiguous(), *ctx.saved_tensors, ctx.eps)
    dweight, dbias, dbranch_bias = sums
    return dx.float(), *((dx, dbranch_bias) if ctx.branch else (None, None)), dweight, dbias, None, None


def _expect_rows(rows: Tensor) -> None:
    if len(rows) >= INT32:
        raise ValueError(f"add_norm: {len(rows):,} rows; the backend triton counts to {INT32:,}. Take nn.LayerNorm")


def _add_norm_triton(x, branch, norm, dtype) -> tuple[Tensor, Tensor]:
    """``add_norm`` as the operator wants it: rows (rows, dim), one after the other."""
    expect_plain_gradients("add_norm")
    product, bias = (None, None) if branch is None else (branch[0].flatten(0, -2).contiguous(), branch[1])
    rows = x.flatten(0, -2)
    _expect_rows(rows)
    rows = rows.contiguous().float()
    total, normed = _add_norm(rows, product, bias, norm.weight, norm.bias, norm.eps, dtype)
    return total.unflatten(0, x.shape[:-1]), normed.unflatten(0, x.shape[:-1])


refuse_second_derivatives(_add_norm_backward, "add_norm: the backend triton")
_add_norm.register_autograd(_norm_gradients, setup_context=_save_norm)
register("add_norm", "triton", _add_norm_triton)
