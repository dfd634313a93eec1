"""Sizes beyond what a CUDA grid and 32 bits count: right, or refused before a kernel starts."""

from importlib import import_module

import pytest
import torch
from kernel_checks import DEVICE, OPTIONS, TOLERANCE, make_inputs, needs_triton, relative_error, seeded
from test_mamba_inner import inner_inputs

from mamba_ginr.kernels import causal_conv, mamba_inner, selective_scan

pytestmark = needs_triton


@pytest.fixture
def parts(monkeypatch):
    """CUDA's limit of 65,535 made 2; returns how many results were joined, at each time that some were."""
    joined, cat = [], torch.cat
    monkeypatch.setattr(import_module("mamba_ginr.kernels.triton_tiles"), "GRID", 2)
    monkeypatch.setattr(torch, "cat", lambda parts, *a, **k: joined.append(len(parts)) or cat(parts, *a, **k))
    return joined


def test_more_images_than_a_grid_counts_are_scanned_in_parts(parts):
    inputs = make_inputs(5, OPTIONS["all"], torch.float32, 5, 2, 2, device=DEVICE)
    exact = {k: v.detach().cpu().double().requires_grad_() for k, v in inputs.items()}
    results = []
    for tensors, backend in ((exact, "torch"), (inputs, "triton")):
        y = selective_scan(**tensors, delta_softplus=True, backend=backend)
        results.append((y, *torch.autograd.grad(y.sin().sum(), list(tensors.values()))))
    assert parts == [3]
    for name, value, truth in zip(("y", *inputs), results[1], results[0]):
        assert relative_error(value, truth) < TOLERANCE[torch.float32], name


def test_more_images_than_a_grid_counts_in_the_other_operators(parts):
    x, weight, bias = (seeded(*shape).float().to(DEVICE) for shape in ((3, 2, 1), (1, 2), (1,)))
    conv = causal_conv(x, weight, bias, backend="triton")
    inputs = {k: v.detach() for k, v in inner_inputs(torch.float32, False, DEVICE, length=2, channels=1).items()}
    inputs["xz"] = torch.stack([inputs["xz"][0], *inputs["xz"]])
    mamba = mamba_inner(**inputs, backend="triton")
    assert parts == [2, 2]
    assert torch.allclose(conv, causal_conv(x, weight, bias, backend="torch"), atol=1e-6)
    assert torch.allclose(mamba, mamba_inner(**inputs, backend="torch"), atol=1e-5)


def test_a_view_with_strides_beyond_32_bits_is_right():
    # Three steps 2**30 numbers apart; the memory between them is never touched.
    far = torch.empty(2**31 + 4, dtype=torch.float16, device=DEVICE).as_strided((1, 3, 2), (1, 2**30, 1))
    near = seeded(1, 3, 2).half().to(DEVICE)
    far.copy_(near)
    A, one = -torch.ones(2, 2, device=DEVICE), torch.ones(2, device=DEVICE)
    results = [selective_scan(u, near.abs(), A, u, u, backend="triton") for u in (near, far)]
    assert torch.equal(*results)
    assert torch.equal(*(causal_conv(x, A, one, backend="triton") for x in (near, far)))


@pytest.mark.parametrize(("length", "channels", "d_state"), [(2**20, 2**11, 1), (2**20, 2**10, 64)], ids=str)
def test_a_sequence_that_32_bits_cannot_count_is_refused(length, channels, d_state):
    zero = torch.zeros((), device=DEVICE)  # expanded: no memory
    u, B, A = zero.expand(1, length, channels), zero.expand(1, length, d_state), zero.expand(channels, d_state)
    with pytest.raises(ValueError, match=r"selective_scan: a sequence of 1,048,576 steps .* counts to 2\*\*31"):
        selective_scan(u, u, A, B, B, backend="triton")


def test_a_convolution_that_cannot_be_counted_is_refused():
    zero = torch.zeros((), device=DEVICE)
    taps = zero.expand(2**11, 4), zero.expand(2**11)
    with pytest.raises(ValueError, match=r"causal_conv: a sequence of 1,048,576 steps of up to 2,048 numbers"):
        causal_conv(zero.expand(1, 2**20, 2**11), *taps, backend="triton")
    with pytest.raises(ValueError, match=r"causal_conv: a sequence of 9,000,000 steps; .* some 8 million"):
        causal_conv(zero.expand(1, 9_000_000, 2), taps[0][:2], taps[1][:2], backend="triton")
    xz, two, A = zero.expand(1, 2**20, 2**11), zero.expand(2**10, 2), zero.expand(2**10, 1)
    inner = (two, two[:, 0], zero.expand(3, 2**10), two[:, :1], A, two[:, 0], two[:, 0])
    with pytest.raises(ValueError, match=r"mamba_inner: a sequence of 1,048,576 steps of up to 2,048 numbers"):
        mamba_inner(xz, *inner, backend="triton")


def test_rows_beyond_32_bits_of_the_layers_are_refused():
    zero, mlp = torch.zeros((), dtype=torch.float16, device=DEVICE), import_module("mamba_ginr.kernels.mlp_triton")
    wide = zero.expand(2**16, 2**15)
    with pytest.raises(ValueError, match=r"mlp: 2 rows and weights of 2,147,483,648 and 2,147,483,648 numbers"):
        mlp._mlp_triton(zero.expand(2, 2**15), wide, zero.expand(2**16), wide.t(), True)
    norm = import_module("mamba_ginr.kernels.add_norm_triton")
    with pytest.raises(ValueError, match=r"add_norm: 2,147,483,648 rows"):
        norm._expect_rows(zero.expand(2**31, 1))
