"""The selective scan in plain PyTorch, in chunks of steps: the backend "torch"."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_ginr.kernels.backends import refuse_second_derivatives, register
from mamba_ginr.kernels.selective_scan.directions import one_direction_at_a_time


def chunk_length(batch: int, channels: int, d_state: int) -> int:
    """Steps of a chunk: its states should fit into the processor's cache."""
    return 32 if batch * channels * d_state <= 32_768 else 16


@one_direction_at_a_time
def _scan_torch(u, delta, A, B, C, D, z, delta_bias, delta_softplus) -> Tensor:
    """The recurrence in plain PyTorch: any device, any float dtype, time and memory linear in length."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    u_, delta, A, B, C, D, z, delta_bias = (
        None if t is None else t.to(dtype) for t in (u, delta, A, B, C, D, z, delta_bias)
    )
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = F.softplus(delta)
    if torch.compiler.is_compiling():  # the compiler takes the scan as one operator; its loops would be thousands
        y = _compiled_scan(u_, delta, B, C, A)[0]
    else:
        y = _ChunkedScan.apply(*_time_first(u_, delta, B, C), A)[0].transpose(0, 1)
    if D is not None:
        y = y + D * u_
    return (y if z is None else y * F.silu(z)).to(u.dtype)


def _time_first(*sequences: Tensor) -> list[Tensor]:
    return [t.transpose(0, 1).contiguous() for t in sequences]


def _product_of(device: torch.device):
    """a @ b in float32 to the last bit, whatever the user set for products, and without a change to it."""
    matmul = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul
    if matmul.fp32_precision in ("ieee", "none"):
        return torch.matmul
    return lambda a, b: (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2)  # no TF32 here


def _chunk_of_states(u, delta, B, A, h, room):
    """Decays and states of a chunk, both (T, batch, d_state, channels): channels last, along which vectors run.

    A is (d_state, channels). The two are written into ``room``, which stays in the processor's cache from chunk to
    chunk: in place, as ``out=`` has no rule under vmap.
    """
    decay, states = room[:, : len(u)]
    decay.copy_(A).mul_(delta.unsqueeze(2)).exp_()
    states.copy_(B.unsqueeze(-1)).mul_((delta * u).unsqueeze(2))
    for decay_t, state in zip(decay.unbind(), states.unbind()):
        h = state.addcmul_(decay_t, h)
    return decay, states


# From here on all sequences are contiguous, and time comes first: (length, batch, channels or d_state). A is
# (channels, d_state), and its transpose in the loops over chunks.
def _forward(u, delta, B, C, A) -> tuple[Tensor, Tensor]:
    """The output, and the states before each chunk: (length, batch, channels), (chunks, batch, d_state, channels)."""
    length, batch, channels = u.shape
    steps = chunk_length(batch, *A.shape)
    y, starts = torch.empty_like(u), u.new_zeros(-(-length // steps), batch, A.shape[1], channels)
    product, A, room = _product_of(u.device), A.mT.contiguous(), starts.new_empty(2, steps, *starts.shape[1:])
    with torch.autocast(u.device.type, enabled=False):
        for i in range(len(starts)):
            chunk = slice(i * steps, (i + 1) * steps)
            _, states = _chunk_of_states(u[chunk], delta[chunk], B[chunk], A, starts[i], room)
            if i + 1 < len(starts):
                starts[i + 1] = states[-1]
            y[chunk] = product(C[chunk].unsqueeze(2), states).squeeze(2)
    return y, starts


def _backward(dy, u, delta, B, C, A, starts) -> tuple[Tensor, ...]:
    """Gradients of u, delta, B, C and A: a chunk's states are computed again and walked in reverse."""
    steps = chunk_length(u.shape[1], *A.shape)
    product, A, room = _product_of(u.device), A.mT.contiguous(), starts.new_empty(2, steps, *starts.shape[1:])
    # Made from dy, so that they have its further axes where vmap gives it some.
    dA, later = dy.new_zeros(A.shape), 0.0  # later: what later steps send back to the state
    du, ddelta, dB, dC = (dy.new_empty(t.shape) for t in (u, delta, B, C))
    with torch.autocast(u.device.type, enabled=False):
        for i in reversed(range(len(starts))):
            chunk = slice(i * steps, (i + 1) * steps)
            u_t, delta_t, B_t, C_t, dy_t = (t[chunk] for t in (u, delta, B, C, dy))
            decay, states = _chunk_of_states(u_t, delta_t, B_t, A, starts[i], room)
            dh = dy_t.unsqueeze(2) * C_t.unsqueeze(-1)
            dh[-1] += later
            each = dh.unbind()
            for decay_t, dh_t, earlier in zip(decay.unbind()[:0:-1], each[:0:-1], each[-2::-1]):
                earlier.addcmul_(decay_t, dh_t)
            later = decay[0] * dh[0]

            dC[chunk] = product(dy_t.unsqueeze(2), states.mT).squeeze(2)
            dB[chunk] = product((delta_t * u_t).unsqueeze(2), dh.mT).squeeze(2)
            dinput = product(B_t.unsqueeze(2), dh).squeeze(2)  # gradient of delta_t u_t
            dexponent = dh.mul_(decay)  # times h_{t-1}: gradient of delta_t A
            dexponent[0] *= starts[i]
            dexponent[1:] *= states[:-1]
            du[chunk] = dinput * delta_t
            ddelta[chunk] = dinput * u_t + (dexponent * A).sum(2)
            dA += (dexponent * delta_t.unsqueeze(2)).sum((0, 1))
    return du, ddelta, dB, dC, dA.mT.contiguous()


def _recurrence(decay, inputs) -> Tensor:
    """All states h_t = decay_t h_{t-1} + inputs_t, by operations that can be differentiated again."""
    h, states = torch.zeros_like(inputs[:1].sum(0)), []
    for decay_t, input_t in zip(decay.unbind(0), inputs.unbind(0)):
        h = decay_t * h + input_t
        states.append(h)
    return torch.stack(states) if states else inputs


def _states_and_before(u, delta, B, A) -> tuple[Tensor, Tensor, Tensor]:
    """Decays, states after each step and before it."""
    decay = torch.exp(delta.unsqueeze(-1) * A)
    states = _recurrence(decay, (delta * u).unsqueeze(-1) * B.unsqueeze(2))
    return decay, states, torch.cat([torch.zeros_like(states[:1]), states[:-1]])


def _differentiable_backward(dy, u, delta, B, C, A) -> tuple[Tensor, ...]:
    """``_backward`` for whoever differentiates once more: memory for all states, and no chunks."""
    decay, states, before = _states_and_before(u, delta, B, A)
    next_decay = torch.cat([decay[1:], torch.zeros_like(decay[:1])])
    dh = _recurrence(next_decay.flip(0), (dy.unsqueeze(-1) * C.unsqueeze(2)).flip(0)).flip(0)
    dinput, dexponent = (dh * B.unsqueeze(2)).sum(-1), dh * decay * before
    ddelta = dinput * u + (dexponent * A).sum(-1)
    dB, dC = ((delta * u).unsqueeze(-1) * dh).sum(2), (dy.unsqueeze(-1) * states).sum(2)
    dA = (dexponent * delta.unsqueeze(-1)).sum((0, 1))
    return dinput * delta, ddelta, dB, dC, dA


class _ChunkedScan(torch.autograd.Function):
    """y_t = C_t h_t of the recurrence, in chunks of ``chunk_length`` steps, and the states before each chunk.

    Within a chunk only h ← decay h + input is a loop over time; all else is done for the whole chunk at once. Kept for
    the backward pass are the states before each chunk. Second derivatives, forward mode and vmap are right, too.
    """

    @staticmethod
    def forward(*inputs):
        return _forward(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.save_for_forward(*inputs)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dy, _dstarts):
        if dy is None:
            return (None,) * 5
        *inputs, starts = ctx.saved_tensors
        if torch.is_grad_enabled():  # someone asks for the gradients' own
            return _differentiable_backward(dy, *inputs)
        return _backward(dy, *inputs, starts)

    @staticmethod
    def jvp(ctx, *tangents):
        inputs = ctx.saved_tensors
        dots = (torch.zeros_like(t) if dot is None else dot for t, dot in zip(inputs, tangents))
        (u, delta, B, C, A), (u_dot, delta_dot, B_dot, C_dot, A_dot) = inputs, dots
        decay, states, before = _states_and_before(u, delta, B, A)
        decay_dot = decay * (delta_dot.unsqueeze(-1) * A + delta.unsqueeze(-1) * A_dot)
        input_dot = (delta_dot * u + delta * u_dot).unsqueeze(-1) * B.unsqueeze(2)
        input_dot = input_dot + (delta * u).unsqueeze(-1) * B_dot.unsqueeze(2)
        states_dot = _recurrence(decay, decay_dot * before + input_dot)
        y_dot = (states_dot * C.unsqueeze(2)).sum(-1) + (states * C_dot.unsqueeze(2)).sum(-1)
        return y_dot, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        """One scan after the other, because images may share A, but A differs between what vmap maps over."""
        pieces = [[t] * info.batch_size if axis is None else t.unbind(axis) for t, axis in zip(inputs, in_dims)]
        ys, starts = zip(*(_ChunkedScan.apply(*piece) for piece in zip(*pieces)))
        return (torch.stack(ys), torch.stack(starts)), (0, 0)


@torch.library.custom_op("mamba_ginr::chunked_scan", mutates_args=())
def _compiled_scan(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """``_ChunkedScan`` of sequences with the batch first, all contiguous as the compiler has it from ``empty_like``."""
    y, starts = _forward(*_time_first(u, delta, B, C), A)
    return y.transpose(0, 1).contiguous(), starts


@torch.library.custom_op("mamba_ginr::chunked_scan_backward", mutates_args=())
def _compiled_backward(
    dy: Tensor, u: Tensor, delta: Tensor, B: Tensor, C: Tensor, A: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *gradients, dA = _backward(*_time_first(dy, u, delta, B, C), A, starts)
    return *(t.transpose(0, 1).contiguous() for t in gradients), dA


@_compiled_scan.register_fake
def _(u, delta, B, C, A):
    (batch, length, channels), d_state = u.shape, A.shape[1]
    steps = chunk_length(batch, channels, d_state)
    return u.new_empty(u.shape), u.new_empty((length + steps - 1) // steps, batch, d_state, channels)


@_compiled_backward.register_fake
def _(dy, u, delta, B, C, A, starts):
    return tuple(dy.new_empty(t.shape) for t in (u, delta, B, C, A))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)


_compiled_scan.register_autograd(lambda ctx, dy, _: _compiled_backward(dy, *ctx.saved_tensors), setup_context=_save)
refuse_second_derivatives(_compiled_backward, "the compiled selective_scan")
register("selective_scan", "torch", _scan_torch)
