"""Layers that PyTorch runs in many passes over a GPU's memory, in few: a perceptron, and a residual sum with its norm.

    from fused import add_norm, mlp

    x, y = add_norm(x, branch, norm)  # the residual stream x + branch, and its LayerNorm
    branch = mlp(y, first, second, "gelu")  # a product and its bias, for the next add_norm to add

Between two matrix products PyTorch writes what the first gives, reads it for the activation, writes that, and so on
back. Here one Triton kernel multiplies and applies the activation to what it still holds, and another does so in the
backward pass, where it also adds up the gradient of the first bias. A residual, its sum and its norm are one kernel
each way. They run in float16 and bfloat16 where the scan's Triton backend does, and PyTorch's layers elsewhere.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selective_scan import backend_for, gradients_wanted, triton

if triton is not None:
    import triton.language as tl

    from selective_scan import sum_rows

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """What a Linear would compute in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _fused(x: Tensor, dtype: torch.dtype) -> bool:
    return dtype in (torch.float16, torch.bfloat16) and backend_for(None, x.device) == "triton"


def mlp(x: Tensor, first: nn.Linear, second: nn.Linear, activation: str) -> tuple[Tensor, Tensor]:
    """second(activation(first(x))) as a product and a bias, whose sum is left to what follows, in float32.

    Args:
        x: (..., inputs), any float dtype; under autocast cast to its dtype, as a Linear does.
        first, second: inputs → hidden and hidden → outputs, with biases.
        activation: "relu" or "gelu" (exact, with the error function).

    Returns:
        (..., outputs), and the bias of ``second`` (outputs,).

    Raises ValueError for another activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"mlp: unknown activation {activation!r}; choose one of: {', '.join(ACTIVATIONS)}")
    dtype = _autocast_dtype(x)
    x, weight1, weight2 = (t.to(dtype) for t in (x, first.weight, second.weight))
    with torch.autocast(x.device.type, enabled=False):
        if _fused(x, dtype):
            rows, weight1, weight2 = (t.contiguous() for t in (x.flatten(0, -2), weight1, weight2))
            inputs = (rows, weight1, first.bias.float(), weight2)
            product = _mlp(*inputs, activation == "gelu", gradients_wanted(inputs))[0]
            return product.unflatten(0, x.shape[:-1]), second.bias
        hidden = ACTIVATIONS[activation](F.linear(x, weight1, first.bias.to(dtype)))
        return F.linear(hidden, weight2), second.bias


def add_norm(x: Tensor, branch: tuple[Tensor, Tensor] | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """The residual stream x + product + bias, where ``branch`` holds these two, and its norm for the next layer.

    Args:
        x: (..., dim), float32
        branch: (..., dim) and (dim,), or None where there is nothing to add.
        norm: over the last dimension.

    Returns:
        (..., dim) in float32, and (..., dim) in the dtype of autocast, or float32. Where the kernels run, the stream's
        gradient is rounded to the dtype of autocast, too.
    """
    dtype = _autocast_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        if not _fused(x, dtype):
            x = x if branch is None else x + sum(branch)
            return x, norm(x).to(dtype)
        product, bias = (None, None) if branch is None else (branch[0].flatten(0, -2).contiguous(), branch[1])
        rows = x.flatten(0, -2).contiguous()
        total, normed = _add_norm(rows, product, bias, norm.weight, norm.bias, norm.eps, dtype)
        return total.unflatten(0, x.shape[:-1]), normed.unflatten(0, x.shape[:-1])


if triton is not None:

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

    _mlp.register_autograd(_gradients, setup_context=_save)

    # ── Residual and norm ───────────────────────────────────────────────────────────────────────────────────────────

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
        _x, branch, _branch_bias, weight, _bias, ctx.eps, _dtype = inputs
        ctx.branch = branch is not None
        ctx.save_for_backward(output[0], weight)
        ctx.set_materialize_grads(False)

    def _norm_gradients(ctx, dtotal, dnormed):
        # The stream's gradient goes from layer to layer in the dtype of the products, as all other gradients do; in
        # float32 in between, because autograd wants it so, and the compiler leaves the two casts out.
        dtotal = None if dtotal is None else dtotal.to(dnormed.dtype).contiguous()
        dx, sums = _add_norm_backward(dtotal, dnormed.contiguous(), *ctx.saved_tensors, ctx.eps)
        dweight, dbias, dbranch_bias = sums
        return dx.float(), *((dx, dbranch_bias) if ctx.branch else (None, None)), dweight, dbias, None, None

    _add_norm.register_autograd(_norm_gradients, setup_context=_save_norm)
