"""What the tests of the kernels share: devices, tolerances, seeded inputs, errors."""

import pytest
import torch

from mamba_ginr.kernels import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU, Triton's kernels run in its interpreter
DEVICES = {"torch": "cpu", "triton": DEVICE}
needs_triton = pytest.mark.skipif(backends.triton is None, reason="needs Triton")

# Largest error relative to the largest value, outputs and gradients: a few units in the last place, grown over time.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# Of the fused layers: root mean square of the error, relative to that of the values.
FUSED_TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
OPTIONS = {
    "plain": (),
    "D": ("D",),
    "z": ("z",),
    "softplus": ("delta_bias", "softplus"),
    "all": ("D", "z", "delta_bias", "softplus"),
}


def make_inputs(length, options, dtype, batch=2, channels=3, d_state=4, directions=1, device="cpu"):
    """Seeded inputs of selective_scan; the parameters A, D and delta_bias stay float32 beside bfloat16 inputs."""
    generator = torch.Generator().manual_seed(length)
    parameter_dtype = torch.promote_types(dtype, torch.float32)

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    channels *= directions
    sequence = (batch, length, channels)
    states = (batch, length, *((2,) if directions == 2 else ()), d_state)
    inputs = {
        "u": draw(*sequence),
        "delta": draw(*sequence) if "softplus" in options else draw(*sequence).abs(),
        "A": -draw(channels, d_state, dtype=parameter_dtype).exp(),
        "B": draw(*states),
        "C": draw(*states),
        "D": draw(channels, dtype=parameter_dtype) if "D" in options else None,
        "z": draw(*sequence) if "z" in options else None,
        "delta_bias": draw(channels, dtype=parameter_dtype) if "delta_bias" in options else None,
    }
    return {k: None if v is None else v.requires_grad_() for k, v in inputs.items()}


def relative_error(value, truth, smallest=1e-3):
    # A gradient can be zero, of A for one token; against that a kernel's 1e-9 is no error. The inputs are near 1.
    return ((value.double().cpu() - truth.double().cpu()).abs().max() / truth.abs().max().clamp_min(smallest)).item()


def relative_norm(value, truth) -> float:
    """Root mean square of the error, relative to that of the truth."""
    truth = truth.double().cpu()
    return ((value.double().cpu() - truth).norm() / truth.norm()).item()


def seeded(*shape, scale: float = 1.0):
    generator = torch.Generator().manual_seed(sum(shape))
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def calls_of(monkeypatch, module, name: str) -> list:
    """What the operator ``name`` of a module was called with, from now on."""
    calls, operator = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a: calls.append(a) or operator(*a))
    return calls
