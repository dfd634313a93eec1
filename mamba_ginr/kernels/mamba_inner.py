"""All of Mamba between its two outer projections, as its parts or, where Triton runs, as one operator."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_ginr.kernels.backends import backend_for, implementation
from mamba_ginr.kernels.causal_conv import causal_conv
from mamba_ginr.kernels.inputs import expect_floats, expect_shapes
from mamba_ginr.kernels.selective_scan.interface import selective_scan


def mamba_inner(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    bidirectional: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Mamba between its in_proj and its out_proj: convolution, step sizes, B and C from its output, gated scan.

    Equivalent to, for one direction::

        x, z = xz.chunk(2, dim=-1)
        u = causal_conv(x, conv_weight, conv_bias)
        delta, B, C = F.linear(u, x_proj).split([rank, d_state, d_state], dim=-1)
        return selective_scan(u, F.linear(delta, dt_proj), A, B, C, D, z, dt_bias, delta_softplus=True)

    Args:
        xz: (batch, length, 2 · channels), input and gate as in_proj gives them.
        conv_weight, conv_bias: (channels, taps) and (channels,), see ``causal_conv``.
        x_proj: (rank + 2 · directions · d_state, channels); its output is [step sizes | B | C].
        dt_proj: (channels, rank); widens the step sizes.
        A, D, dt_bias: (channels, d_state), (channels,) and (channels,), see ``selective_scan``.
        bidirectional: the second half of the channels runs from the last token to the first.
        backend: as for ``selective_scan``.

    Returns:
        (batch, length, channels) in the dtype of ``xz``.

    Raises what ``causal_conv`` and ``selective_scan`` raise.
    """
    tensors = {"conv_weight": conv_weight, "conv_bias": conv_bias, "x_proj": x_proj, "dt_proj": dt_proj}
    expect_floats("mamba_inner", xz=xz, **tensors, A=A, D=D, dt_bias=dt_bias)
    if A.dim() != 2 or (bidirectional and len(A) % 2):
        raise ValueError(
            f"mamba_inner: A must be (channels, d_state), with an even number of channels for two directions, "
            f"got {tuple(A.shape)}"
        )
    (channels, d_state), rank, directions = A.shape, dt_proj.shape[-1], 1 + bidirectional
    expected = {
        "xz": (xz, (*xz.shape[:2], 2 * channels)),
        "conv_weight": (conv_weight, (channels, conv_weight.shape[-1])),
        "conv_bias": (conv_bias, (channels,)),
        "x_proj": (x_proj, (rank + 2 * directions * d_state, channels)),
        "dt_proj": (dt_proj, (channels, rank)),
        "D": (D, (channels,)),
        "dt_bias": (dt_bias, (channels,)),
    }
    expect_shapes("mamba_inner", expected)
    x_proj, dt_proj = x_proj.to(xz.dtype), dt_proj.to(xz.dtype)
    with torch.autocast(xz.device.type, enabled=False):
        if backend_for(backend, xz.device) == "triton" and xz.dtype != torch.float64 and d_state:
            fused = implementation("mamba_inner", "triton")
            return fused(xz, conv_weight, conv_bias, x_proj, dt_proj, A, D, dt_bias, bidirectional)
        x, z = xz.chunk(2, dim=-1)
        u = causal_conv(x, conv_weight, conv_bias, bidirectional, backend)
        delta, B, C = F.linear(u, x_proj).split([rank, directions * d_state, directions * d_state], dim=-1)
        if bidirectional:
            B, C = B.unflatten(-1, (2, d_state)), C.unflatten(-1, (2, d_state))
        delta = F.linear(delta, dt_proj)
        return selective_scan(u, delta, A, B, C, D, z, dt_bias, True, bidirectional, backend)
