"""The short convolution in Triton: kernels, launches and operators.

One program owns COLUMNS channels of one image and one direction and walks through TOKENS steps, with the last
TAPS - 1 inputs in registers; AHEAD rows are asked for before the rows before them are written. Each value is read
once; the backward pass walks TAPS - 1 steps into the next program's part, because a token's gradient comes from
the tokens after it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba_ginr.kernels.backends import refuse_second_derivatives, register
from mamba_ginr.kernels.triton_tiles import (
    GRID,
    by_images,
    contiguous_rows,
    expect_countable,
    expect_plain_gradients,
    on_its_gpu,
    place_of,
    room_for,
    share_of_grid,
    sigmoid,
    sum_rows,
)


@triton.jit
def _conv_part(half, COLUMNS: tl.constexpr, TOKENS: tl.constexpr):
    """Direction, image, number of this part among all, channels and whether they are there, first step."""
    direction, _block, inner = share_of_grid(half, COLUMNS)
    batch = tl.program_id(2).to(tl.int64)
    part = batch * tl.num_programs(1) + tl.program_id(1)
    return direction, batch, part, direction * half + inner, inner < half, tl.program_id(1) * TOKENS


@triton.jit
def _read_rows(x, first, length, direction, x_time, d, in_half, COUNT: tl.constexpr):
    """Channels at COUNT steps of a direction from ``first`` on, as stored; 0 beyond the ends."""
    rows = ()
    for i in tl.static_range(COUNT):
        step = first + i
        inside = in_half & (step >= 0) & (step < length)
        rows = rows + (tl.load(x + place_of(step, length, direction) * x_time + d, mask=inside, other=0.0),)
    return rows


@triton.jit
def _taps(weight, d, in_half, TAPS: tl.constexpr):
    """The filter, newest token first."""
    taps = ()
    for back in tl.static_range(TAPS):
        taps = taps + (tl.load(weight + d * TAPS + (TAPS - 1 - back), mask=in_half, other=0.0),)
    return taps


@triton.jit
def _window(x, first, length, direction, x_time, d, in_half, TAPS: tl.constexpr):
    """The TAPS - 1 inputs before step ``first``, newest first."""
    rows, window = _read_rows(x, first - (TAPS - 1), length, direction, x_time, d, in_half, TAPS - 1), ()
    for i in tl.static_range(TAPS - 1):
        window = (rows[i].to(tl.float32),) + window
    return window


@triton.jit
def _filter(taps, window, bias_d, TAPS: tl.constexpr):
    """The sum before the SiLU."""
    total = bias_d
    for back in tl.static_range(TAPS):
        total += taps[back] * window[back]
    return total


@triton.jit
def _conv_forward_kernel(
    x, weight, bias, out, length, half, channels, x_batch, x_time,
    TAPS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    direction, batch, _part, d, in_half, first = _conv_part(half, COLUMNS, TOKENS)
    x, out = x + batch * x_batch, out + batch * length * channels
    taps, bias_d = _taps(weight, d, in_half, TAPS), tl.load(bias + d, mask=in_half, other=0.0)
    window = _window(x, first, length, direction, x_time, d, in_half, TAPS)
    end = tl.minimum(first + TOKENS, length)
    rows = _read_rows(x, first, length, direction, x_time, d, in_half, AHEAD)
    for start in range(first, end, AHEAD):
        ahead = _read_rows(x, start + AHEAD, length, direction, x_time, d, in_half, AHEAD)
        for i in tl.static_range(AHEAD):
            window = (rows[i].to(tl.float32),) + window
            total = _filter(taps, window, bias_d, TAPS)
            window = window[: TAPS - 1]
            y, mask = total * sigmoid(total), in_half & (start + i < length)
            place = place_of(start + i, length, direction)
            tl.store(out + place * channels + d, y.to(out.dtype.element_ty), mask=mask)
        rows = ahead


@triton.jit
def _conv_backward_kernel(
    dout, x, weight, bias, dx, parts, length, half, channels,
    dout_batch, dout_time, x_batch, x_time, dx_batch, dx_time,
    TAPS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    direction, batch, part, d, in_half, first = _conv_part(half, COLUMNS, TOKENS)
    x, dout, dx = x + batch * x_batch, dout + batch * dout_batch, dx + batch * dx_batch
    taps, bias_d = _taps(weight, d, in_half, TAPS), tl.load(bias + d, mask=in_half, other=0.0)
    zero = tl.zeros([COLUMNS], tl.float32)
    window, dbias_d = _window(x, first, length, direction, x_time, d, in_half, TAPS), zero
    dtotals, dtaps = (), (zero,)
    for _back in tl.static_range(1, TAPS):
        dtotals, dtaps = dtotals + (zero,), dtaps + (zero,)
    end = tl.minimum(first + TOKENS, length)
    rows = _read_rows(x, first, length, direction, x_time, d, in_half, AHEAD)
    douts = _read_rows(dout, first, length, direction, dout_time, d, in_half, AHEAD)
    for start in range(first, end + TAPS - 1, AHEAD):
        ahead = _read_rows(x, start + AHEAD, length, direction, x_time, d, in_half, AHEAD)
        douts_ahead = _read_rows(dout, start + AHEAD, length, direction, dout_time, d, in_half, AHEAD)
        for i in tl.static_range(AHEAD):
            step = start + i
            window = (rows[i].to(tl.float32),) + window
            total = _filter(taps, window, bias_d, TAPS)
            gate = sigmoid(total)
            dtotal = douts[i].to(tl.float32) * gate * (1 + total * (1 - gate))
            # Of the sum before the SiLU at this step and the TAPS - 1 before, newest first.
            dtotals = (dtotal,) + dtotals
            own = tl.where(step < end, dtotal, 0.0)
            dbias_d += own
            sums, dx_t = (), zero
            for back in tl.static_range(TAPS):
                sums = sums + (dtaps[back] + own * window[back],)
                dx_t += taps[TAPS - 1 - back] * dtotals[back]
            window, dtotals, dtaps = window[: TAPS - 1], dtotals[: TAPS - 1], sums
            to = step - (TAPS - 1)
            mask = in_half & (to >= first) & (to < end)
            tl.store(dx + place_of(to, length, direction) * dx_time + d, dx_t.to(dx.dtype.element_ty), mask=mask)
        rows, douts = ahead, douts_ahead
    # Sums of this part: those of the taps (channels, TAPS), then those of the bias (channels,).
    parts += part * channels * (TAPS + 1)
    for back in tl.static_range(TAPS):
        tl.store(parts + d * TAPS + (TAPS - 1 - back), dtaps[back], mask=in_half)
    tl.store(parts + channels * TAPS + d, dbias_d, mask=in_half)


CONV_FORWARD = {"COLUMNS": 64, "TOKENS": 128, "AHEAD": 4}
CONV_BACKWARD = {"COLUMNS": 64, "TOKENS": 128, "AHEAD": 2}


def _launch_conv(kernel, sizes, x, weight, bidirectional, tensors, *strided):
    (batch, length, channels), half = x.shape, x.shape[2] // (2 if bidirectional else 1)
    if x.numel():
        blocks, parts = triton.cdiv(half, sizes["COLUMNS"]), triton.cdiv(length, sizes["TOKENS"])
        strides = [stride for t in strided for stride in t.stride()[:2]]
        taps = weight.shape[1]
        kernel[blocks * (channels // half), parts, batch](
            *tensors, length, half, channels, *strides, TAPS=taps, num_warps=1, **sizes
        )


def conv_forward(x, weight, bias, both) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch_conv(_conv_forward_kernel, CONV_FORWARD, x, weight, both, (x, weight, bias, out), x)
    return out


def conv_backward(dout, x, weight, bias, both, dx) -> Tensor:
    """Gradients of weight and bias one after the other, see ``taps_and_bias``; that of x goes to ``dx``."""
    programs = x.shape[0] * triton.cdiv(x.shape[1], CONV_BACKWARD["TOKENS"])
    parts = weight.new_empty(programs, weight.numel() + bias.numel())
    tensors = (dout, x, weight, bias, dx, parts)
    _launch_conv(_conv_backward_kernel, CONV_BACKWARD, x, weight, both, tensors, dout, x, dx)
    return sum_rows(parts)


def taps_and_bias(sums: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    taps, bias = sums.split([weight.numel(), len(weight)])
    return taps.view_as(weight), bias


@torch.library.custom_op(
    "mamba_ginr::causal_conv", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor bias, bool both) -> Tensor"
)
@on_its_gpu
def _triton_conv(x, weight, bias, both):
    return conv_forward(x, weight, bias, both)


@torch.library.custom_op(
    "mamba_ginr::causal_conv_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor x, Tensor weight, Tensor bias, bool both) -> (Tensor, Tensor)",
)
@on_its_gpu
def _triton_conv_backward(dout, x, weight, bias, both):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, conv_backward(dout, x, weight, bias, both, dx)


@_triton_conv.register_fake
def _(x, weight, bias, both):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_triton_conv_backward.register_fake
def _(dout, x, weight, bias, both):
    return room_for(x, x), weight.new_empty(weight.numel() + bias.numel())


def _save_conv_inputs(ctx, inputs, output) -> None:
    *tensors, ctx.both = inputs
    ctx.save_for_backward(*tensors)


def _conv_gradients(ctx, dout: Tensor):
    x, weight, bias = ctx.saved_tensors
    dx, sums = _triton_conv_backward(contiguous_rows(dout), x, weight, bias, ctx.both)
    return dx, *taps_and_bias(sums, weight), None


def _conv_triton(x, weight, bias, bidirectional) -> Tensor:
    """``causal_conv`` as the operator wants it: rows as they are, the parameters in float32."""
    expect_plain_gradients("causal_conv")
    expect_parts("causal_conv", x.shape[1])
    expect_countable("causal_conv", x.shape[1], x.shape[2])
    weight, bias = weight.float().contiguous(), bias.float().contiguous()
    return by_images(lambda x: _triton_conv(x, weight, bias, bidirectional), contiguous_rows(x))


def expect_parts(name: str, length: int) -> None:
    """ValueError for a sequence of more parts than the grid's second axis holds."""
    if length > GRID * min(CONV_FORWARD["TOKENS"], CONV_BACKWARD["TOKENS"]):
        raise ValueError(
            f"{name}: a sequence of {length:,} steps; the backend triton takes some 8 million. Cut it in shorter ones, "
            f'or use_backend("torch", device)'
        )


refuse_second_derivatives(_triton_conv_backward, "causal_conv: the backend triton")
_triton_conv.register_autograd(_conv_gradients, setup_context=_save_conv_inputs)
register("causal_conv", "triton", _conv_triton)
