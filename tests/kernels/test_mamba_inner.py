"""All of Mamba between its projections: as one operator against its parts."""

from importlib import import_module

import pytest
import torch
from kernel_checks import DEVICE, TOLERANCE, needs_triton, relative_error

from mamba_ginr.kernels import mamba_inner


def inner_inputs(dtype, both, device, length=19, channels=6, d_state=3, rank=2):
    generator, directions = torch.Generator().manual_seed(0), 1 + both
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    inputs = {
        "xz": draw(2, length, 2 * channels),
        "conv_weight": draw(channels, 4),
        "conv_bias": draw(channels),
        "x_proj": draw(rank + 2 * directions * d_state, channels),
        "dt_proj": draw(channels, rank),
        "A": -draw(channels, d_state).exp(),
        "D": draw(channels),
        "dt_bias": draw(channels),
    }
    parameter_dtype = torch.promote_types(dtype, torch.float32)
    return {k: v.to(device, dtype if k == "xz" else parameter_dtype).requires_grad_() for k, v in inputs.items()}


@needs_triton
@pytest.mark.parametrize("both", [False, True])
def test_the_fused_mamba_equals_its_parts(both):
    exact = inner_inputs(torch.float64, both, "cpu")
    inputs = inner_inputs(torch.float32, both, DEVICE)
    values = []
    for tensors, backend in ((exact, "torch"), (inputs, "triton")):
        y = mamba_inner(**tensors, bidirectional=both, backend=backend)
        weights = torch.arange(y.numel(), dtype=torch.float64).cos().view_as(y).to(y)
        values.append((y, *torch.autograd.grad(y, tuple(tensors.values()), weights)))
    for name, truth, value in zip(["y", *inputs], *values):
        assert relative_error(value, truth) < TOLERANCE[torch.float32], name


@needs_triton
def test_nothing_is_kept_where_no_gradient_is_asked_for(monkeypatch):
    scan = import_module("mamba_ginr.kernels.selective_scan.triton_ops")
    kept, room = [], scan.kept_states
    monkeypatch.setattr(scan, "kept_states", lambda *a: kept.append(room(*a)) or kept[-1])
    inputs = inner_inputs(torch.float32, True, DEVICE)
    with torch.no_grad():
        alone = mamba_inner(**inputs, bidirectional=True, backend="triton")
    assert [t.numel() for t in kept] == [0]
    assert torch.equal(alone, mamba_inner(**inputs, bidirectional=True, backend="triton"))
    assert kept[1].numel() > 0


@pytest.mark.parametrize("name", ["xz", "conv_weight", "conv_bias", "x_proj", "dt_proj"])
def test_a_wrong_shape_of_the_fused_mamba_is_named(name):
    inputs = inner_inputs(torch.float32, True, "cpu")
    inputs[name] = inputs[name].detach()[..., :-1] if name == "xz" else inputs[name].detach()[:-1]
    with pytest.raises(ValueError, match=rf"mamba_inner: {name} must have shape \(.*\), got \("):
        mamba_inner(**inputs, bidirectional=True)
