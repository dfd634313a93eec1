"""The selective scan in Triton, the backend "triton": launches of its kernels, as operators with gradients."""

import torch
import triton
from torch import Tensor

from mamba_ginr.kernels.backends import first_line, lacks_memory, refuse_second_derivatives, register, threads_of
from mamba_ginr.kernels.selective_scan.triton_kernels import (
    backward_kernel,
    forward_kernel,
    pack_kernel,
    unpack_kernel,
)
from mamba_ginr.kernels.selective_scan.triton_parts import carries_kernel, join_kernel
from mamba_ginr.kernels.triton_tiles import (
    by_images,
    contiguous_rows,
    expect_countable,
    expect_plain_gradients,
    gradients_wanted,
    on_its_gpu,
    room_for,
    sum_rows,
)

# Channels of a program, one to a thread, and steps of a chunk: of B and C together as many as there are threads.
SIZES = {"COLUMNS": 32, "CHUNK": 16}
# Where no more programs than FEW would run, sequences of more than WHOLE chunks are cut into parts of at least
# PART_CHUNKS, for up to PROGRAMS of them: a GPU with a few of its schedulers busy takes many times as long. To find
# what a part begins with takes part of a pass more, and a little for each part.
FEW, WHOLE, PROGRAMS, PART_CHUNKS = 512, 32, 16_384, 16
# States read ahead; registers of a thread, so that all warps of the training step find room at once.
FORWARD = {"AHEAD": 2, "maxnreg": 128}


def _scan_triton(u, delta, A, B, C, D, z, delta_bias, delta_softplus, bidirectional) -> Tensor:
    """Both directions in one launch, forward and backward; see the kernels."""
    if u.dtype == torch.float64:
        raise RuntimeError("scan backend triton: float64 is for the torch backend; the kernel's state is float32")
    expect_plain_gradients("selective_scan")
    expect_countable("selective_scan", u.shape[1], widest_row(A))
    if not bidirectional:
        B, C = B.unsqueeze(2), C.unsqueeze(2)
    u, delta, z, B, C = (None if t is None else contiguous_rows(t) for t in (u, delta, z, B, C))
    A, D, delta_bias = (None if t is None else t.float().contiguous() for t in (A, D, delta_bias))
    keep = gradients_wanted((u, delta, A, B, C, D, z, delta_bias))

    def run(u, delta, B, C, z):
        return _triton_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, keep)[0]

    return by_images(run, u, delta, B, C, z)


def widest_row(A: Tensor) -> int:
    """Numbers that the scan steps over for a step in time: of a sequence, of kept states, of B and C packed."""
    channels, d_state = A.shape
    return max(channels, triton.cdiv(d_state * channels, SIZES["CHUNK"]), 4 * d_state)


def _blocks(A: Tensor, B: Tensor) -> int:
    """Programs that share the channels of a direction."""
    return triton.cdiv(A.shape[0] // B.shape[2], SIZES["COLUMNS"])


def _chunks(u: Tensor) -> int:
    return triton.cdiv(u.shape[1], SIZES["CHUNK"])


def _parts(u: Tensor, A: Tensor, B: Tensor) -> tuple[int, int]:
    """Into how many parts the sequences are cut, and of how many chunks each is but the last."""
    chunks, programs = _chunks(u), max(1, len(u) * _blocks(A, B) * B.shape[2])
    cut = programs <= FEW and chunks > WHOLE
    parts = max(1, min(PROGRAMS // programs, chunks // PART_CHUNKS)) if cut else 1
    per_part = max(1, triton.cdiv(chunks, parts))
    return triton.cdiv(chunks, per_part), per_part


def _packed(A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """A as (d_state, channels), so that neighbouring channels lie side by side; and B and C by chunks."""
    (batch, length, directions, d_state), chunk = B.shape, SIZES["CHUNK"]
    chunks = triton.cdiv(length, chunk)
    pairs = A.new_empty(batch, directions, chunks, d_state, 2 * chunk)
    pack_kernel[chunks, directions, batch](
        B, C, pairs, length, chunks, d_state, *(s for t in (B, C) for s in t.stride()[:3]),
        BLOCK_N=triton.next_power_of_2(d_state), CHUNK=chunk, num_warps=1,
    )  # fmt: skip
    return A.t().contiguous(), pairs


def _launch(kernel, before, inputs, packed, after, strides, softplus, parts, of_parts, **flags):
    """Run a kernel with one warp for every image, direction, block of channels and part of the sequence."""
    u, delta, A, B, _, D, z, delta_bias = inputs
    (batch, length, channels), directions, d_state = u.shape, B.shape[2], A.shape[1]
    half, walked = channels // directions, (u, delta, u if z is None else z)
    chunk, block_n = SIZES["CHUNK"], triton.next_power_of_2(d_state)
    strides = [*strides, length, half, d_state, *(stride for t in walked for stride in t.stride()[:2]), *of_parts]
    kernel[_blocks(A, B) * directions, batch, parts](
        *before, u, delta, *packed, D, z, delta_bias, *after, *strides,
        HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=softplus,
        MASKED=half % SIZES["COLUMNS"] + length % chunk != 0, DIRECTIONS=directions, BLOCK_N=block_n,
        num_warps=1, **SIZES, **flags,
    )  # fmt: skip


def kept_states(u: Tensor, A: Tensor, keep: bool) -> Tensor:
    """Room for the states after every chunk, if they are kept: (batch, chunks, d_state, channels)."""
    return A.new_empty(u.shape[0], _chunks(u) if keep else 0, A.shape[1], u.shape[2])


def scan_forward(inputs, softplus: bool, keep: bool) -> tuple[Tensor, Tensor]:
    """The output, and the states that ``scan_backward`` wants if ``keep``."""
    u, _, A, B, C, *_ = inputs
    out, states = torch.empty_like(u, memory_format=torch.contiguous_format), kept_states(u, A, keep)
    if u.numel():
        (parts, per_part), packed = _parts(u, A, B), _packed(A, B, C)
        # Without keep every chunk of a part writes its states over those of the chunk before.
        room = states if keep else A.new_empty(u.shape[0], parts, A.shape[1], u.shape[2])
        strides = (room.stride(0), room.stride(1) if keep else 0)
        of_parts, cut = (per_part, 0 if keep else room.stride(1)), {"PARTS": parts > 1, **FORWARD}
        if parts > 1:
            ends, totals = _room_for_parts(u, A, parts)
            after, alone = (totals, ends), (per_part, ends.stride(1))
            of_ends = (ends.stride(0), 0)
            _launch(forward_kernel, (), inputs, packed, after, of_ends, softplus, parts, alone, ENDS=True, **cut)
            begin = room[:, per_part - 1 :] if keep else room[:, 1:]  # the state before the second part
            _join(ends, totals, packed[0], begin, per_part if keep else 1, backward=False)
        _launch(forward_kernel, (), inputs, packed, (out, room), strides, softplus, parts, of_parts, ENDS=False, **cut)
    return out, states


def _room_for_parts(u: Tensor, A: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """For a state and a sum of step sizes of each part: (batch, parts, d_state, channels), (batch, parts, channels)."""
    batch, _, channels = u.shape
    return A.new_empty(batch, parts, A.shape[1], channels), A.new_empty(batch, parts, channels)


def _join(values: Tensor, totals: Tensor, A: Tensor, to: Tensor, places: int, backward: bool) -> None:
    """What each part begins with, of what each gives alone; ``places`` of ``to`` lie between two parts'."""
    batch, parts, d_state, channels = values.shape
    join_kernel[triton.cdiv(channels, SIZES["COLUMNS"]), d_state, batch](
        values, totals, A, to, to.stride(0), places * to.stride(1), parts, d_state, channels,
        BACKWARD=backward, COLUMNS=SIZES["COLUMNS"], AHEAD=8, num_warps=1,
    )  # fmt: skip


def scan_backward(
    dout: Tensor, states: Tensor, inputs, softplus: bool, dz: Tensor, dBC: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta (their dtype) and A, and of D and delta_bias in one (2, channels), float32.

    That of z goes to ``dz``; those of B and C go to ``dBC`` (batch, length, 2 · directions · d_state), B's first.
    """
    u, delta, A, B, C, *_ = inputs
    (batch, length, channels), directions, d_state = u.shape, B.shape[2], A.shape[1]
    du, ddelta = (room_for(t, u) for t in (u, delta))
    empty = u.numel() == 0  # no kernel runs to fill what is summed up below
    new, (parts, per_part) = A.new_zeros if empty else A.new_empty, _parts(u, A, B)
    dA, dvectors = new(batch * parts, d_state, channels), new(batch * parts, 2, channels)
    if not empty:
        blocks, chunks, chunk, packed = _blocks(A, B), _chunks(u), SIZES["CHUNK"], _packed(A, B, C)
        scratch = A.new_empty(2, batch, parts, d_state, channels)
        if parts > 1:
            carries, totals = _room_for_parts(u, A, parts)
            after = (carries, totals)
            _launch(carries_kernel, (dout,), inputs, packed, after, dout.stride()[:2], softplus, parts, (per_part,))
            _join(carries, totals, packed[0], scratch[1], 1, backward=True)
        dpairs = A.new_empty(blocks, batch, directions, chunks, d_state, 2 * chunk)
        strides = (batch, *dout.stride()[:2], *(dz.stride()[:2] if dz.numel() else (0, 0)))
        after, block_n = (states, scratch, du, ddelta, dz, dA, dpairs, dvectors), triton.next_power_of_2(d_state)
        cut = {"PARTS": parts > 1}
        _launch(backward_kernel, (dout,), inputs, packed, after, strides, softplus, parts, (per_part,), **cut)
        unpack_kernel[chunks, directions, batch](
            dpairs, dBC, *dBC.stride()[:2], length, chunks, d_state, blocks, dpairs.stride(0),
            BLOCK_N=block_n, DIRECTIONS=directions, CHUNK=chunk, num_warps=1,
        )  # fmt: skip
    return du, ddelta, sum_rows(dA).t().contiguous(), sum_rows(dvectors)


INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias"


@torch.library.custom_op(
    "mamba_ginr::selective_scan",
    mutates_args=(),
    schema=f"({INPUTS}, bool softplus, bool keep) -> (Tensor, Tensor)",
)
@on_its_gpu
def _triton_scan(u, delta, A, B, C, D, z, delta_bias, softplus, keep):
    return scan_forward((u, delta, A, B, C, D, z, delta_bias), softplus, keep)


@torch.library.custom_op(
    "mamba_ginr::selective_scan_backward",
    mutates_args=(),
    schema=(
        f"(Tensor dout, Tensor states, {INPUTS}, bool softplus)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
@on_its_gpu
def _triton_scan_backward(dout, states, u, delta, A, B, C, D, z, delta_bias, softplus):
    dz, inputs = room_for(z, u), (u, delta, A, B, C, D, z, delta_bias)
    dBC = B.new_zeros(*B.shape[:2], 2 * B.shape[2] * B.shape[3], dtype=torch.float32)
    du, ddelta, dA, dvectors = scan_backward(dout, states, inputs, softplus, dz, dBC)
    dB, dC = dBC.unflatten(-1, (2, *B.shape[2:])).unbind(2)
    return du, ddelta, dA, dB.to(B.dtype, copy=True), dC.to(C.dtype, copy=True), dz, dvectors


@_triton_scan.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, softplus, keep):
    return torch.empty_like(u, memory_format=torch.contiguous_format), kept_states(u, A, keep)


@_triton_scan_backward.register_fake
def _(dout, states, u, delta, A, B, C, D, z, delta_bias, softplus):
    return *(room_for(t, u) for t in (u, delta, A, B, C, z)), A.new_empty(2, len(A))


def save_inputs(ctx, inputs, output) -> None:
    """For operators that take (tensors ..., a flag, keep) and return y and what their backward pass wants."""
    *tensors, ctx.flag, _keep = inputs
    ctx.save_for_backward(*output[1:], *tensors)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dout: Tensor, _dstates):
    states, *tensors = ctx.saved_tensors
    *of_tensors, dz, (dD, dbias) = _triton_scan_backward(contiguous_rows(dout), states, *tensors, ctx.flag)
    gradients = (*of_tensors, dD, dz, dbias)
    return *(None if t is None else g for t, g in zip(tensors, gradients)), None, None


def _try_triton(device: torch.device) -> str:
    try:
        # The first scan may be asked for where autograd does not work, as in inference mode: operators alone.
        with torch.no_grad():
            # Of the kind that the model asks for, so that nothing is compiled in vain.
            x = torch.ones(1, 16, 64, device=device, dtype=torch.float16)
            A, D = torch.full((64, 16), -1.0, device=device), torch.ones(64, device=device)
            B = x[..., :32].unflatten(-1, (2, 16))
            inputs = (x, x, A, B, B, D, x, D)
            with threads_of(device) as pool:  # the compiler works on both passes at once
                if device.type == "cuda":
                    pool.submit(_triton_scan_backward, x, kept_states(x, A, True), *inputs, True)
                out, states = _triton_scan(*inputs, True, True)
            du, *_others = _triton_scan_backward(torch.ones_like(out), states, *inputs, True)
        return "" if torch.isfinite(du).all() else "Triton's kernels give wrong results on this GPU"
    except Exception as error:
        if lacks_memory(error):
            raise
        # No C compiler, a GPU older than the compiler knows, a driver that does not fit.
        return f"Triton's kernels do not run ({first_line(error)}); they need a C compiler and a GPU from Volta on"


refuse_second_derivatives(_triton_scan_backward, "selective_scan: the backend triton")
_triton_scan.register_autograd(_gradients, setup_context=save_inputs)
register("selective_scan", "triton", _scan_triton, _try_triton)
