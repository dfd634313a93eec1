"""The public function of the selective scan, and the checks of its inputs."""

import torch
from torch import Tensor

from mamba_ginr.kernels.backends import backend_for, implementation
from mamba_ginr.kernels.inputs import expect_floats, expect_shapes


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    bidirectional: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Run the recurrence h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, y_t = C_t h_t + D u_t from h = 0.

    Equivalent to, with all of the arguments and one direction::

        delta, h, ys = F.softplus(delta + delta_bias), 0, []
        for u_t, delta_t, B_t, C_t in zip(*(t.unbind(1) for t in (u, delta, B, C))):
            h = torch.exp(delta_t[..., None] * A) * h + (delta_t * u_t)[..., None] * B_t[:, None]
            ys.append((h * C_t[:, None]).sum(-1) + D * u_t)
        return torch.stack(ys, 1) * F.silu(z)

    Args:
        u: (batch, length, channels), float32, float64, bfloat16 or float16.
        delta: (batch, length, channels), the step sizes; any sign if ``delta_softplus``, else positive.
        A: (channels, d_state), real, negative for a state that decays.
        B, C: (batch, length, d_state), shared by all channels; (batch, length, 2, d_state) if ``bidirectional``.
        D: (channels,), or None for no skip.
        z: (batch, length, channels), or None; the output is multiplied by SiLU(z).
        delta_bias: (channels,), added to ``delta`` before the softplus.
        delta_softplus: pass ``delta`` through softplus, which makes it positive.
        bidirectional: the second half of the channels walks from the last token to the first, with B and C [:, :, 1].
        backend: "torch", "triton" or "mamba_ssm"; None takes what ``use_backend`` chose.

    Returns:
        y: (batch, length, channels) in the dtype of ``u``. The state is float32 (float64 for float64 ``u``),
            whatever the dtypes of the others, each of which gets a gradient in its own.

    Raises:
        ValueError: a shape that does not fit ``u`` and ``A``, integers or complex numbers, tensors on several devices,
            an unknown backend, or a sequence too long for Triton (2³¹ numbers).
        RuntimeError: the backend cannot run here; the message says what is missing. Or a derivative that the backend
            does not have: "torch" has all, of any order, forwards and backwards and under torch.func; "triton" and
            "mamba_ssm" have gradients.
    """
    expect_floats("selective_scan", u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    _check_shapes(u, delta, A, B, C, D, z, delta_bias, bidirectional)
    name = backend_for(backend, u.device)
    # Of no states the kernels know nothing: y = D u, gated, which PyTorch computes from empty tensors.
    scan = implementation("selective_scan", name if A.shape[1] else "torch")
    # Autocast would turn the read-out of the state into a bfloat16 product.
    with torch.autocast(u.device.type, enabled=False):
        return scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, bidirectional)


def _check_shapes(u, delta, A, B, C, D, z, delta_bias, bidirectional) -> None:
    if u.dim() != 3 or A.dim() != 2 or (bidirectional and u.shape[2] % 2):
        raise ValueError(
            f"selective_scan: u must be (batch, length, channels) and A (channels, d_state), with an even number "
            f"of channels for two directions, got {tuple(u.shape)} and {tuple(A.shape)}"
        )
    (batch, length, channels), d_state = u.shape, A.shape[1]
    directions = (2,) if bidirectional else ()
    expected = {
        "delta": (delta, (batch, length, channels)),
        "A": (A, (channels, d_state)),
        "B": (B, (batch, length, *directions, d_state)),
        "C": (C, (batch, length, *directions, d_state)),
        "D": (D, (channels,)),
        "z": (z, (batch, length, channels)),
        "delta_bias": (delta_bias, (channels,)),
    }
    expect_shapes("selective_scan", expected)
