"""The fused layers against PyTorch's own, in Triton's interpreter on a CPU."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused
import selective_scan as scan_module
from fused import add_norm, mlp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
needs_triton = pytest.mark.skipif(scan_module.triton is None, reason="needs Triton")


@pytest.fixture
def triton_backend():
    scan_module.use_backend("triton", DEVICE)
    yield
    scan_module.use_backend("auto", DEVICE)


def relative_error(value, truth) -> float:
    truth = truth.double().cpu()
    return ((value.double().cpu() - truth).norm() / truth.norm()).item()


def calls_of(monkeypatch, name: str) -> list:
    """What the operator ``name`` of the fused layers was called with, from now on."""
    calls, operator = [], getattr(fused, name)
    monkeypatch.setattr(fused, name, lambda *a: calls.append(a) or operator(*a))
    return calls


def seeded(*shape, scale: float = 1.0):
    generator = torch.Generator().manual_seed(sum(shape))
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


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
        assert relative_error(value, true) < TOLERANCE[dtype], name


# Triton's interpreter multiplies matrices of bfloat16 as if their bits were integers.
MULTIPLIED = [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


@needs_triton
@pytest.mark.parametrize("dtype", MULTIPLIED)
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("sizes", [(33, 40, 72, 24), (64, 64, 128, 64), (1, 5, 3, 2)], ids=str)
def test_mlp_equals_two_layers(triton_backend, monkeypatch, sizes, activation, dtype):
    calls = calls_of(monkeypatch, "_mlp")
    check_mlp(sizes, activation, dtype)
    assert len(calls) == 1


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_mlp_in_float32_is_pytorchs_own(activation):
    check_mlp((33, 40, 72, 24), activation, torch.float32)


@needs_triton
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_an_mlp_keeps_nothing_where_no_gradient_is_asked_for(triton_backend, monkeypatch, activation):
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
        assert relative_error(value, true) < TOLERANCE[dtype], name


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("shape", [(2, 19, 48), (3, 7, 32), (1, 1, 5)], ids=str)
def test_add_norm_equals_sum_and_layer_norm(triton_backend, monkeypatch, shape, branch, dtype):
    monkeypatch.setattr(fused, "PROGRAMS", 3)  # each with rows of its own, and some with none
    calls = calls_of(monkeypatch, "_add_norm")
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
    assert relative_error(gradient, torch.autograd.grad((norm(x) * weights).sum(), x)[0]) < 2e-3


@needs_triton
def test_layers_that_are_not_contiguous(triton_backend):
    norm, x = nn.LayerNorm(16).to(DEVICE), torch.randn(2, 3, 32, device=DEVICE)
    first, second = nn.Linear(16, 8).to(DEVICE), nn.Linear(8, 4).to(DEVICE)
    half = x[..., ::2]
    with torch.autocast(DEVICE, torch.float16):
        for layer in (lambda t: mlp(t, first, second, "gelu")[0], lambda t: add_norm(t, None, norm)[1]):
            assert torch.equal(layer(half), layer(half.contiguous()))


@needs_triton
def test_the_models_outputs_and_gradients_are_those_of_pytorchs_layers(triton_backend, nb, tiny):
    model, images = tiny(dim=32, num_lp=8), torch.rand(2, 3, 8, 8, device=DEVICE)
    model.to(DEVICE).precision, coords = torch.float16, nb.pixel_grid(8).to(DEVICE)
    parameters = {n: p for n, p in model.named_parameters() if not n.startswith("head.")}  # which these queries reach
    results = []
    for backend in ("torch", "triton"):
        scan_module.use_backend(backend, DEVICE)
        output = model(images, coords)
        loss = 100 * output.square().mean()
        results.append((output, *torch.autograd.grad(loss, tuple(parameters.values()))))
    names = ("output", *parameters)
    for name, of_torch, of_triton in zip(names, *results):
        assert relative_error(of_triton, of_torch) < 0.03, name


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import fused

KINDS = dict(x="*fp32", total="*fp32", bias="*fp32", branch_bias="*fp32", sums="*fp32")
KINDS |= dict(dbias="*fp32", eps="fp32", rows="i32", inner="i32", columns="i32", dim="i32")


def size(kernel, constants, **options):
    signature = {n: "constexpr" if n in constants else KINDS.get(n, "*fp16") for n in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    return len(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"])


for gelu in (True, False):
    for backward, sizes in ((False, fused.FORWARD[gelu]), (True, fused.BACKWARD[gelu])):
        tile = {n: sizes[n] for n in ("ROWS", "COLUMNS", "INNER")}
        absent = dict(bias=None) if backward else dict(dhidden=None, dbias=None)
        absent |= {} if backward or gelu else dict(kept=None)
        strides = dict(weight_k=512, weight_n=1) if backward else dict(weight_k=1, weight_n=512)
        flags = dict(GELU=gelu, BACKWARD=backward)
        options = dict(num_warps=sizes["num_warps"], num_stages=sizes["num_stages"])
        print(size(fused._product_kernel, {**tile, **absent, **strides, **flags}, **options))
for branch in (True, False):
    KINDS["weight"] = "*fp32"
    forward, backward = fused.NORM_FORWARD, fused.NORM_BACKWARD
    absent = {} if branch else dict(branch=None, branch_bias=None)
    flags = dict(BRANCH=branch, ROWS=forward["ROWS"], DIM=256)
    print(size(fused._norm_forward_kernel, {**flags, **absent}, num_warps=forward["num_warps"]))
    flags = dict(STREAM=branch, ROWS=backward["ROWS"], DIM=256)
    print(size(fused._norm_backward_kernel, flags, num_warps=backward["num_warps"]))
"""


@needs_triton
def test_kernels_compile_for_a_gpu_that_is_not_here(compiled_sizes):
    assert [size > 1000 for size in compiled_sizes(COMPILE)] == [True] * 8


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize(("activation", "sizes"), [("gelu", (16384, 256, 1024, 256)), ("relu", (32768, 512, 512, 512))])
def test_mlp_at_the_sizes_of_the_training_step(triton_backend, activation, sizes):
    check_mlp(sizes, activation, torch.float16)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("branch", [True, False])
def test_add_norm_at_the_sizes_of_the_training_step(triton_backend, branch):
    check_add_norm((64, 512, 256), branch, torch.float16)
