"""Inputs of every kind: what is no real float or lies elsewhere is named, all else is right."""

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DEVICE, DEVICES, OPTIONS, TOLERANCE, make_inputs, needs_triton, relative_error, seeded
from torch import nn

from mamba_ginr.kernels import add_norm, causal_conv, mamba_inner, mlp, selective_scan
from mamba_ginr.kernels.selective_scan.reference import reference

BACKENDS = ["torch", pytest.param("triton", marks=needs_triton)]
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def plain_inputs(**sizes) -> dict:
    return {k: v.detach() for k, v in make_inputs(5, OPTIONS["all"], torch.float32, **sizes).items()}


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_scan_of_other_than_real_floats_is_refused_by_name(name, dtype):
    inputs = plain_inputs()
    inputs[name] = inputs[name].to(dtype)
    with pytest.raises(ValueError, match=f"^selective_scan: {name} is {dtype}, .*convert it to one of float16, "):
        selective_scan(**inputs)


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_tensor_elsewhere_is_refused_by_name(name):
    inputs = plain_inputs()
    inputs[name] = inputs[name].to("meta")
    with pytest.raises(ValueError, match=f"^selective_scan: {name} is on meta and u on cpu; move all tensors to one"):
        selective_scan(**inputs)


def test_numbers_without_a_tensor_and_tensors_without_numbers_are_named():
    with pytest.raises(TypeError, match="selective_scan: D must be a tensor, got float"):
        selective_scan(**{**plain_inputs(), "D": 1.0})
    with pytest.raises(ValueError, match="selective_scan: u is on the device meta, which holds no numbers"):
        selective_scan(**{k: v.to("meta") for k, v in plain_inputs().items()})


def test_the_layers_refuse_the_same():
    x, two, one = torch.ones(1, 3, 2), torch.ones(2, 2), torch.ones(2)
    whole, layer, norm = x.long(), nn.Linear(2, 2), nn.LayerNorm(2)
    inner = (two, one, torch.ones(5, 2), two[:, :1], -two, one, one)
    for run, said in (
        (lambda: causal_conv(whole, two, one), "causal_conv: x is torch.int64"),
        (lambda: causal_conv(x, two + 1j, one), "causal_conv: weight is torch.complex64"),
        (lambda: mamba_inner(torch.cat([whole, whole], -1), *inner), "mamba_inner: xz is torch.int64"),
        (lambda: mlp(whole, layer, layer, "relu"), "mlp: x is torch.int64"),
        (lambda: add_norm(whole, None, norm), "add_norm: x is torch.int64"),
        # A kernel would read beyond these.
        (lambda: causal_conv(x, two[:, :0], one), "causal_conv: weight must have at least one tap"),
        (lambda: mamba_inner(torch.cat([x, x], -1), *inner[:5], one[:1], one), "mamba_inner: D must have shape"),
        (lambda: mamba_inner(torch.cat([x, x], -1), *inner[:6], one[:1]), "mamba_inner: dt_bias must have shape"),
        (lambda: mlp(torch.ones(3, 4), layer, layer, "relu"), r"mlp: x must have shape \(3, 2\), got \(3, 4\)"),
        (lambda: mlp(x, layer, nn.Linear(3, 2), "relu"), r"mlp: second.weight must have shape \(2, 2\), got \(2, 3\)"),
        (lambda: mlp(x, nn.Linear(2, 2, bias=False), layer, "relu"), "mlp: first.bias is None"),
        (lambda: add_norm(x, (x[..., :1], one), norm), "add_norm: product must have shape"),
        (lambda: add_norm(x, None, nn.LayerNorm(3)), "add_norm: x must have shape"),
    ):
        with pytest.raises(ValueError, match=f"^{said}"):
            run()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("directions", [1, 2])
def test_a_scan_of_no_states_is_its_skip_gated(backend, directions):
    inputs = make_inputs(5, OPTIONS["all"], torch.float32, d_state=0, directions=directions, device=DEVICES[backend])
    y = selective_scan(**inputs, delta_softplus=True, bidirectional=directions == 2, backend=backend)
    expected = inputs["D"] * inputs["u"] * F.silu(inputs["z"])
    assert torch.allclose(y, expected, atol=1e-6)
    gradients = torch.autograd.grad(y.sum(), list(inputs.values()))
    true = torch.autograd.grad(expected.sum(), list(inputs.values()), allow_unused=True)
    for value, expected, given in zip(gradients, true, inputs.values()):
        assert torch.allclose(value, torch.zeros_like(given) if expected is None else expected, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mamba_of_no_states(backend):
    draw = lambda *shape: seeded(*shape).float().to(DEVICES[backend])  # noqa: E731
    xz, taps, bias, A = draw(1, 3, 4), draw(2, 2), draw(2), draw(2, 0)
    D = draw(3)[1:]
    y = mamba_inner(xz, taps, bias, draw(1, 2), draw(2, 1), A, D, bias, backend=backend)
    x, z = xz.chunk(2, -1)
    assert torch.allclose(y, D * causal_conv(x, taps, bias, backend="torch") * F.silu(z), atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_one_input_of_another_dtype(name, dtype, backend):
    if (name, dtype, backend) == ("u", torch.float64, "triton"):
        pytest.skip("float64 is for the torch backend; test_backends")
    given = {k: v.to(DEVICES[backend]) for k, v in plain_inputs(batch=1, channels=2, d_state=2).items()}
    given[name] = given[name].to(dtype)
    inputs = {k: v.requires_grad_() for k, v in given.items()}
    exact = {k: v.detach().cpu().double().requires_grad_() for k, v in inputs.items()}
    y, truth = selective_scan(**inputs, delta_softplus=True, backend=backend), reference(**exact, delta_softplus=True)
    gradients = torch.autograd.grad(y.double().sin().sum(), list(inputs.values()))
    true = torch.autograd.grad(truth.sin().sum(), list(exact.values()))
    assert y.dtype == inputs["u"].dtype
    for key, value, expected in zip(("y", *inputs), (y, *gradients), (truth, *true)):
        assert key == "y" or value.dtype == inputs[key].dtype
        half = torch.float16 in (inputs["u"].dtype, value.dtype)  # of what passes through u's dtype, too
        assert relative_error(value, expected) < TOLERANCE[torch.float16 if half else torch.float32], key


@needs_triton
def test_fused_layers_of_a_model_in_half(triton_backend):
    # Weights and residual stream in float16, as after model.half(): the kernels sum in float32 none the less.
    norm, x = nn.LayerNorm(48).to(DEVICE, torch.float16), (seeded(2, 7, 48) + 30).to(DEVICE, torch.float16)
    total, y = add_norm(x.requires_grad_(), None, norm)
    assert relative_error(y, F.layer_norm(x.double(), (48,)).detach()) < 2e-3
    (gradient,) = torch.autograd.grad(y.float().square().sum() + total.float().sum(), x)
    assert gradient.dtype == torch.float16


@needs_triton
def test_a_norm_whose_sum_alone_is_used_and_one_without_weights(triton_backend):
    x, norm = seeded(1, 3, 8).float().to(DEVICE).requires_grad_(), nn.LayerNorm(8).to(DEVICE)
    with torch.autocast(DEVICE, torch.float16):
        total, _ = add_norm(x, None, norm)
        plain = add_norm(x, None, nn.LayerNorm(8, elementwise_affine=False))[1]
    assert torch.equal(torch.autograd.grad(total.sum(), x)[0], torch.ones_like(x))
    assert relative_error(plain.detach(), F.layer_norm(x.double(), (8,)).detach()) < 2e-3
