"""The selective scan in plain PyTorch, in chunks of steps: the backend "torch"."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba_ginr.kernels.backends import register
from mamba_ginr.kernels.selective_scan.directions import one_direction_at_a_time


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
    y = _ChunkedScan.apply(u_, delta, A, B, C)
    if D is not None:
        y = y + D * u_
    return (y if z is None else y * F.silu(z)).to(u.dtype)


@contextmanager
def _exact(device_type: str):
    """No TF32 and no autocast: the state is to be float32 to its last bit, in the backward pass too."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


class _ChunkedScan(torch.autograd.Function):
    """y_t = C_t h_t of the recurrence, in chunks of CHUNK steps.

    Within a chunk only h ← decay h + input is a loop over time; all else is done for the whole chunk at once. Kept for
    the backward pass are the states before each chunk: it computes a chunk's states again and walks them in reverse.
    """

    CHUNK = 16  # steps; a chunk of states should fit into the processor's cache

    @staticmethod
    def _states(u, delta, A, B, h):
        """Decays and states of a chunk, both (T, batch, channels, d_state), time first."""
        decay = torch.exp(delta.unsqueeze(-1) * A)
        states = (delta * u).unsqueeze(-1) * B.unsqueeze(2)
        for t in range(len(states)):
            h = states[t].addcmul_(decay[t], h)
        return decay, states

    @staticmethod
    def forward(ctx, u, delta, A, B, C):
        sequences = [t.transpose(0, 1).contiguous() for t in (u, delta, B, C)]
        h, starts, ys = u.new_zeros(u.shape[0], u.shape[2], A.shape[1]), [], [u.new_empty(0, u.shape[0], u.shape[2])]
        with _exact(u.device.type):
            for u_t, delta_t, B_t, C_t in zip(*(t.split(_ChunkedScan.CHUNK) for t in sequences)):
                if not len(u_t):
                    break  # an empty sequence is split into one empty chunk
                starts.append(h)
                _, states = _ChunkedScan._states(u_t, delta_t, A, B_t, h)
                h = states[-1].clone()
                ys.append((states @ C_t.unsqueeze(-1)).squeeze(-1))
        ctx.save_for_backward(*sequences, A, *starts)
        return torch.cat(ys).transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        u, delta, B, C, A, *starts = ctx.saved_tensors
        dy, dA, later = dy.transpose(0, 1), torch.zeros_like(A), 0.0  # later: what later steps send back to the state
        du, ddelta, dB, dC = (torch.empty_like(t) for t in (u, delta, B, C))
        with _exact(u.device.type):
            for i in reversed(range(len(starts))):
                chunk = slice(i * _ChunkedScan.CHUNK, (i + 1) * _ChunkedScan.CHUNK)
                u_t, delta_t, B_t, C_t, dy_t = (t[chunk] for t in (u, delta, B, C, dy))
                decay, states = _ChunkedScan._states(u_t, delta_t, A, B_t, starts[i])
                dh = dy_t.unsqueeze(-1) * C_t.unsqueeze(2)
                dh[-1] += later
                for t in range(len(dh) - 1, 0, -1):
                    dh[t - 1].addcmul_(decay[t], dh[t])
                later = decay[0] * dh[0]

                dC[chunk] = (dy_t.unsqueeze(2) @ states).squeeze(2)
                dB[chunk] = ((delta_t * u_t).unsqueeze(2) @ dh).squeeze(2)
                dinput = (dh @ B_t.unsqueeze(-1)).squeeze(-1)  # gradient of delta_t u_t
                dexponent = decay.mul_(dh)  # times h_{t-1}: gradient of delta_t A
                dexponent[0] *= starts[i]
                dexponent[1:] *= states[:-1]
                du[chunk] = dinput * delta_t
                ddelta[chunk] = dinput * u_t + (dexponent * A).sum(-1)
                dA += (dexponent * delta_t.unsqueeze(-1)).sum((0, 1))
        du, ddelta, dB, dC = (t.transpose(0, 1) for t in (du, ddelta, dB, dC))
        return du, ddelta, dA, dB, dC


register("selective_scan", "torch", _scan_torch)
