"""Mamba's short convolution before its scan, and the PyTorch way to compute it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_ginr.kernels.backends import backend_for, implementation, register
from mamba_ginr.kernels.inputs import expect_floats


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor, bidirectional: bool = False, backend: str | None = None
) -> Tensor:
    """Mamba's short convolution before the scan: SiLU(bias + a causal filter of each channel by itself).

    Equivalent to, for one direction::

        padded = F.pad(x, (0, 0, taps - 1, 0)).transpose(1, 2)
        y = F.conv1d(padded, weight[:, None], bias, groups=channels)
        return F.silu(y).transpose(1, 2)

    Args:
        x: (batch, length, channels), any float dtype.
        weight: (channels, taps); the last tap is for the token itself, the first for that taps − 1 before.
        bias: (channels,)
        bidirectional: the second half of the channels reads from the last token to the first.
        backend: as for ``selective_scan``; for "mamba_ssm" the PyTorch convolution runs.

    Returns:
        (batch, length, channels) in the dtype of ``x``, summed in float32 (float64 for float64).

    Raises ValueError for shapes that do not fit, integers, complex numbers or several devices, RuntimeError for a
    backend that cannot run here or has no such derivative; see ``selective_scan``.
    """
    expect_floats("causal_conv", x=x, weight=weight, bias=bias)
    channels = x.shape[-1]
    if x.dim() != 3 or weight.dim() != 2 or len(weight) != channels or bias.shape != (channels,):
        raise ValueError(
            f"causal_conv: x must be (batch, length, channels), weight (channels, taps) and bias (channels,), "
            f"got {tuple(x.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if not weight.shape[1]:
        raise ValueError("causal_conv: weight must have at least one tap, got none")
    if bidirectional and channels % 2:
        raise ValueError(f"causal_conv: two directions need an even number of channels, got {channels}")
    conv = implementation("causal_conv", backend_for(backend, x.device))
    with torch.autocast(x.device.type, enabled=False):
        return conv(x, weight, bias, bidirectional)


def _conv_torch(x: Tensor, weight: Tensor, bias: Tensor, bidirectional: bool) -> Tensor:
    """The filter as a sum of shifted sequences, one for each tap."""
    dtype, (channels, taps) = torch.promote_types(x.dtype, torch.float32), weight.shape
    weight, bias, length = weight.to(dtype), bias.to(dtype), x.shape[1]
    padded = F.pad(x.to(dtype), (0, 0, taps - 1, taps - 1))
    half = channels // 2 if bidirectional else channels
    forwards, backwards = padded.split([half, channels - half], dim=2)
    y = bias.expand(x.shape)
    for tap in range(taps):
        late = 2 * (taps - 1) - tap
        shifted = torch.cat([forwards[:, tap : tap + length], backwards[:, late : late + length]], dim=2)
        y = torch.addcmul(y, shifted, weight[:, tap])
    return F.silu(y).to(x.dtype)


register("causal_conv", "torch", _conv_torch)
