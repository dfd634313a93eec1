"""The perceptron against two of PyTorch's layers, gradients too."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DEVICE, FUSED_TOLERANCE, calls_of, needs_triton, relative_norm, seeded
from torch import nn

from mamba_ginr.kernels import mlp


def perceptron(inputs: int, hidden: int, outputs: int, dtype) -> tuple[nn.Linear, nn.Linear]:
    """Two layers with seeded weights that ``dtype`` holds exactly, in float64."""
    layers = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)
    for layer in layers:
        layer.double()
        for parameter in layer.parameters():
            with torch.no_grad():
                parameter.copy_(seeded(*parameter.shape, scale=inputs**-0.5).to(dtype))
    return layers


def check_mlp(sizes, activation: str, dtype) -> None:
    rows, inputs, hidden, outputs = sizes
    first, second = perceptron(inputs, hidden, outputs, dtype)
    x = seeded(2, rows, inputs).to(dtype).double().requires_grad_()
    truth = second({"relu": F.relu, "gelu": F.gelu}[activation](first(x)))
    weights = seeded(*truth.shape).to(dtype).double()
    leaves = (x, *first.parameters(), *second.parameters())
    exact = (truth, *torch.autograd.grad((truth * weights).sum(), leaves))

    first, second = (layer.to(DEVICE, torch.float32) for layer in (first, second))
    x = x.detach().to(DEVICE, torch.float32).requires_grad_()
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        product, bias = mlp(x, first, second, activation)
    assert product.dtype == dtype
    leaves = (x, *first.parameters(), *second.parameters())
    y = product + bias
    values = (y, *torch.autograd.grad((y * weights.to(y)).sum(), leaves))
    for name, value, true in zip(("y", "x", "weight1", "bias1", "weight2", "bias2"), values, exact):
        assert relative_norm(value, true) < FUSED_TOLERANCE[dtype], name


# Triton's interpreter multiplies matrices of bfloat16 as if their bits were integers.
MULTIPLIED = [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


@needs_triton
@pytest.mark.parametrize("dtype", MULTIPLIED)
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("sizes", [(33, 40, 72, 24), (64, 64, 128, 64), (1, 5, 3, 2)], ids=str)
def test_mlp_equals_two_layers(triton_backend, monkeypatch, sizes, activation, dtype):
    calls = calls_of(monkeypatch, import_module("mamba_ginr.kernels.mlp_triton"), "_mlp")
    check_mlp(sizes, activation, dtype)
    assert len(calls) == 1


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_mlp_in_float32_is_pytorchs_own(activation):
    check_mlp((33, 40, 72, 24), activation, torch.float32)


@needs_triton
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_an_mlp_keeps_nothing_where_no_gradient_is_asked_for(triton_backend, monkeypatch, activation):
    fused = import_module("mamba_ginr.kernels.mlp_triton")
    kept, operator = [], fused._mlp
    monkeypatch.setattr(fused, "_mlp", lambda *a: kept.append(operator(*a)) or kept[-1])
    layers = [layer.to(DEVICE, torch.float32) for layer in perceptron(5, 3, 2, torch.float16)]
    x, outputs = seeded(4, 5).to(DEVICE, torch.float16), []
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), torch.autocast(DEVICE, torch.float16):
            outputs.append(mlp(x, *layers, activation)[0])
    assert torch.equal(*outputs)
    assert [t.shape for _, t in kept] == [(0,), (4, 3)]


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match="unknown activation 'tanh'; choose one of: relu, gelu"):
        mlp(torch.ones(1, 2), nn.Linear(2, 2), nn.Linear(2, 2), "tanh")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize(("activation", "sizes"), [("gelu", (16384, 256, 1024, 256)), ("relu", (32768, 512, 512, 512))])
def test_mlp_at_the_sizes_of_the_training_step(triton_backend, activation, sizes):
    check_mlp(sizes, activation, torch.float16)
