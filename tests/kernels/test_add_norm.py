"""The residual sum and its norm against PyTorch's own, gradients too."""

from importlib import import_module

import pytest
import torch
from kernel_checks import DEVICE, FUSED_TOLERANCE, calls_of, needs_triton, relative_norm, seeded
from torch import nn

from mamba_ginr.kernels import add_norm, mlp


def check_add_norm(shape, branch: bool, dtype) -> None:
    dim = shape[-1]
    norm = nn.LayerNorm(dim).double()
    with torch.no_grad():
        norm.weight.copy_(1 + seeded(dim, scale=0.1)), norm.bias.copy_(seeded(dim + 1)[:dim])
    x = (seeded(*shape) + 3).float().double()
    product = seeded(*shape[::-1]).reshape(shape).to(dtype).double()
    leaves = [t.requires_grad_() for t in ((x, product, seeded(dim).float().double()) if branch else (x,))]
    total = sum(leaves) if branch else x
    weights = seeded(2, *shape)
    truths = (total, norm(total))
    loss = sum((t * w).sum() for t, w in zip(truths, weights))
    exact = (*truths, *torch.autograd.grad(loss, (*leaves, *norm.parameters())))

    norm.to(DEVICE, torch.float32)
    kinds = (torch.float32, dtype, torch.float32)
    leaves = [t.detach().to(DEVICE, kind).requires_grad_() for t, kind in zip(leaves, kinds)]
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        total, y = add_norm(leaves[0], tuple(leaves[1:]) or None, norm)
    assert (total.dtype, y.dtype) == (torch.float32, dtype)
    loss = (total * weights[0].to(total)).sum() + (y.float() * weights[1].to(total)).sum()
    values = (total, y, *torch.autograd.grad(loss, (*leaves, *norm.parameters())))
    names = ("sum", "norm", "x", *(("product", "bias") if branch else ()), "weight", "norm's bias")
    for name, value, true in zip(names, values, exact):
        assert relative_norm(value, true) < FUSED_TOLERANCE[dtype], name


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("shape", [(2, 19, 48), (3, 7, 32), (1, 1, 5)], ids=str)
def test_add_norm_equals_sum_and_layer_norm(triton_backend, monkeypatch, shape, branch, dtype):
    fused = import_module("mamba_ginr.kernels.add_norm_triton")
    monkeypatch.setattr(fused, "PROGRAMS", 3)  # each with rows of its own, and some with none
    calls = calls_of(monkeypatch, fused, "_add_norm")
    check_add_norm(shape, branch, dtype)
    assert len(calls) == 1


@pytest.mark.parametrize("branch", [True, False])
def test_add_norm_in_float32_is_pytorchs_own(branch):
    check_add_norm((2, 19, 48), branch, torch.float32)


@needs_triton
def test_a_sum_that_nothing_uses_needs_no_gradient(triton_backend):
    norm, x = nn.LayerNorm(16).to(DEVICE), torch.randn(2, 3, 16, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, torch.float16):
        y = add_norm(x, None, norm)[1]
    weights = torch.arange(96.0, device=DEVICE).cos().view_as(x)
    gradient = torch.autograd.grad((y.float() * weights).sum(), x)[0]
    assert relative_norm(gradient, torch.autograd.grad((norm(x) * weights).sum(), x)[0]) < 2e-3


@needs_triton
def test_layers_that_are_not_contiguous(triton_backend):
    norm, x = nn.LayerNorm(16).to(DEVICE), torch.randn(2, 3, 32, device=DEVICE)
    first, second = nn.Linear(16, 8).to(DEVICE), nn.Linear(8, 4).to(DEVICE)
    half = x[..., ::2]
    with torch.autocast(DEVICE, torch.float16):
        for layer in (lambda t: mlp(t, first, second, "gelu")[0], lambda t: add_norm(t, None, norm)[1]):
            assert torch.equal(layer(half), layer(half.contiguous()))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("branch", [True, False])
def test_add_norm_at_the_sizes_of_the_training_step(triton_backend, branch):
    check_add_norm((64, 512, 256), branch, torch.float16)
