"""The selective scan against a plain recurrence in float64, gradients too, on each of its backends."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DEVICE, DEVICES, OPTIONS, TOLERANCE, make_inputs, needs_triton, relative_error

from mamba_ginr.kernels import backend_fault, selective_scan
from mamba_ginr.kernels.selective_scan.reference import reference


def check_against_reference(inputs, softplus, backend):
    """Outputs and every gradient against the float64 recurrence."""
    dtype = inputs["u"].dtype
    exact = {k: None if v is None else v.detach().cpu().double().requires_grad_() for k, v in inputs.items()}
    bidirectional = inputs["B"].dim() == 4
    y = selective_scan(**inputs, delta_softplus=softplus, bidirectional=bidirectional, backend=backend)
    truth = reference(**exact, delta_softplus=softplus)
    assert y.dtype == dtype
    assert relative_error(y, truth) < TOLERANCE[dtype]

    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    used = [k for k, v in inputs.items() if v is not None]
    gradients = torch.autograd.grad((y.double() * weights.to(y.device)).sum(), [inputs[k] for k in used])
    true_gradients = torch.autograd.grad((truth * weights).sum(), [exact[k] for k in used])
    for name, gradient, true_gradient in zip(used, gradients, true_gradients):
        assert gradient.dtype == inputs[name].dtype, name
        assert relative_error(gradient, true_gradient) < TOLERANCE[dtype], name


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("length", [1, 16, 19])
@pytest.mark.parametrize("options", OPTIONS)
def test_torch_backend_equals_the_recurrence(options, length, dtype, directions):
    inputs = make_inputs(length, OPTIONS[options], dtype, directions=directions)
    check_against_reference(inputs, "softplus" in OPTIONS[options], "torch")


# Lengths beyond 16, the longest chunk of any backend, so that states pass from chunk to chunk.
@needs_triton
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("options", OPTIONS)
def test_triton_backend_equals_the_recurrence(options, directions):
    inputs = make_inputs(19, OPTIONS[options], torch.float32, directions=directions, device=DEVICE)
    check_against_reference(inputs, "softplus" in OPTIONS[options], "triton")


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("length", "channels", "d_state"),
    [(1, 1, 1), (32, 32, 2), (5, 35, 3), (35, 2, 16)],
    ids=["one of each", "no masks needed", "two blocks and a rest", "16 states"],
)
def test_triton_backend_at_odd_sizes(length, channels, d_state, dtype):
    inputs = make_inputs(
        length,
        OPTIONS["all"],
        dtype,
        1,
        channels,
        d_state,
        directions=2 if channels < 32 else 1,
        device=DEVICE,
    )
    check_against_reference(inputs, True, "triton")


@needs_triton
@pytest.mark.parametrize(
    ("length", "programs", "least", "options", "directions", "parts"),
    [
        (3 * 16, 100, 1, "all", 2, 3),
        (3 * 16 + 5, 4, 2, "all", 2, 2),
        (2 * 16 + 1, 100, 1, "plain", 1, 3),
        (10 * 16 + 1, 100, 1, "plain", 1, 11),
    ],
)
def test_a_sequence_cut_into_parts_gives_what_it_gives_whole(
    monkeypatch, length, programs, least, options, directions, parts
):
    operators = import_module("mamba_ginr.kernels.selective_scan.triton_ops")
    for name, value in {"WHOLE": 0, "PROGRAMS": programs, "PART_CHUNKS": least}.items():
        monkeypatch.setattr(operators, name, value)
    inputs = make_inputs(length, OPTIONS[options], torch.float32, 1, directions=directions, device=DEVICE)
    B = inputs["B"] if directions == 2 else inputs["B"].unsqueeze(2)
    assert operators._parts(inputs["u"], inputs["A"], B)[0] == parts
    check_against_reference(inputs, "softplus" in OPTIONS[options], "triton")
    how = {"delta_softplus": True, "bidirectional": directions == 2, "backend": "triton"}
    with torch.no_grad():  # keeps no states
        alone = selective_scan(**inputs, **how)
    assert torch.equal(alone, selective_scan(**inputs, **how))


@needs_triton
def test_many_or_short_sequences_stay_whole():
    operators = import_module("mamba_ginr.kernels.selective_scan.triton_ops")

    def parts(batch, length):
        u, B = torch.empty(batch, length, 1024, device="meta"), torch.empty(batch, length, 2, 16, device="meta")
        return operators._parts(u, torch.empty(1024, 16, device="meta"), B)

    whole = {(40, 512): 32, (24, 512): 32, (64, 2048): 128, (32, 8192): 512, (8, 512): 32, (1, 512): 32}  # chunks
    assert {shape: parts(*shape) for shape in whole} == {shape: (1, chunks) for shape, chunks in whole.items()}
    assert parts(16, 8192) == (32, 16)  # images of 128 × 128 pixels
    assert parts(8, 32_768) == (64, 32)
    assert parts(1, 131_072) == (512, 16)  # one of 512 × 512
    assert parts(1, 16 * 33) == (2, 17)  # one of 17 chunks and one of 16


@needs_triton
def test_triton_softplus_keeps_its_digits_where_it_is_small():
    raw = torch.linspace(-20, 30, 1001, device=DEVICE).view(1, 1, -1)
    one, A = torch.ones_like(raw), -torch.ones(raw.shape[2], 1, device=raw.device)
    # After one step from h = 0 with u = B = C = 1, y is the step size.
    y = selective_scan(one, raw, A, one[..., :1], one[..., :1], delta_softplus=True, backend="triton")
    assert torch.allclose(y.double(), F.softplus(raw.double(), threshold=100), rtol=1e-6, atol=0)


@needs_triton
def test_triton_backend_takes_slices_as_they_are():
    inputs = make_inputs(6, OPTIONS["all"], torch.float32, directions=2, device=DEVICE)
    how = {"delta_softplus": True, "bidirectional": True, "backend": "triton"}
    wide = {k: torch.cat([v, v.flip(0)], dim=-1)[..., : v.shape[-1]] for k, v in inputs.items() if v.dim() > 2}
    assert not wide["u"].is_contiguous()
    assert torch.equal(selective_scan(**{**inputs, **wide}, **how), selective_scan(**inputs, **how))


@needs_triton
def test_triton_backend_is_a_well_formed_operator():
    inputs = make_inputs(5, OPTIONS["all"], torch.float32, directions=2, device=DEVICE)
    operator = import_module("mamba_ginr.kernels.selective_scan.triton_ops")._triton_scan
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, (*inputs.values(), True, True), test_utils=checks)


def test_gradients_by_finite_differences():
    inputs = make_inputs(5, OPTIONS["all"], torch.float64, batch=1, channels=2, d_state=2)
    assert torch.autograd.gradcheck(lambda *a: selective_scan(*a, delta_softplus=True), tuple(inputs.values()))


def test_autocast_leaves_the_state_in_float32():
    inputs = make_inputs(33, OPTIONS["all"], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = selective_scan(**inputs, delta_softplus=True)
    assert torch.equal(inside, selective_scan(**inputs, delta_softplus=True))


PRECISIONS = {
    "old": lambda: torch.set_float32_matmul_precision("high"),
    "new": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "new of all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "new of the processor": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
}


@pytest.fixture
def default_precision():
    """What tests set of products' precision ends with them."""
    yield
    for holder in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        holder.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for holder in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        holder.fp32_precision = "none"


@pytest.mark.usefixtures("default_precision")
@pytest.mark.parametrize("order", ["old", "new", "new of all", "new of the processor", "old, new", "new, old"])
def test_whatever_is_set_for_products_the_state_is_float32_and_the_setting_stays(order):
    inputs = make_inputs(33, OPTIONS["all"], torch.float32, device=DEVICE)

    def results():
        y = selective_scan(**inputs, delta_softplus=True, backend="torch")
        return [y, *torch.autograd.grad(y.sin().sum(), list(inputs.values()))]

    def settings():
        backends = torch.backends
        values = [holder.fp32_precision for holder in (backends, backends.cuda.matmul, backends.mkldnn.matmul)]
        try:
            return [*values, torch.get_float32_matmul_precision()]
        except RuntimeError:  # the new setting alone: PyTorch refuses to read the old one
            return values

    exact = results()
    for setting in order.split(", "):
        PRECISIONS[setting]()
    before = settings()
    for name, value, truth in zip(("y", *inputs), results(), exact):
        assert relative_error(value, truth) < 1e-6, name
    assert settings() == before


@pytest.mark.parametrize(("directions", "dynamic"), [(1, True), (2, False)])
def test_the_compiler_takes_the_scan_in_one_piece(directions, dynamic):
    inputs = make_inputs(35, OPTIONS["all"], torch.float32, directions=directions)
    scan = lambda *a: selective_scan(*a, True, directions == 2, "torch")  # noqa: E731
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for run in (scan, compiled):
        y = run(*inputs.values())
        results.append((y, *torch.autograd.grad(y.sin().sum(), list(inputs.values()))))
    for name, truth, value in zip(("y", *inputs), *results):
        assert relative_error(value, truth) < 1e-6, name
    again = lambda y: torch.autograd.grad(y.sum(), inputs["u"], create_graph=True)[0].sum()  # noqa: E731
    with pytest.raises(RuntimeError, match=r"create_graph=False|double backward"):  # the compiler's own refusals
        again(compiled(*inputs.values())).backward()


def test_the_compilers_operator_is_well_formed():
    chunked = import_module("mamba_ginr.kernels.selective_scan.chunked")
    operator = chunked._compiled_scan
    u, delta, A, B, C, *_ = make_inputs(18, (), torch.float32).values()
    torch.library.opcheck(operator, (u, delta, B, C, A))
    y, starts = (t.detach() for t in operator(u, delta, B, C, A))
    inputs = (y, *(t.detach() for t in (u, delta, B, C, A)), starts)
    torch.library.opcheck(chunked._compiled_backward, inputs, test_utils=("test_schema", "test_faketensor"))
    gradients = torch.autograd.grad(operator(u, delta, B, C, A)[0].square().sum(), u, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"the compiled selective_scan has first derivatives .* uncompiled, has them"
    ):
        gradients[0].sum().backward()


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_empty_sequence(backend):
    inputs = {
        k: v if v is None or v.dim() < 3 else v[:, :0] for k, v in make_inputs(2, OPTIONS["all"], torch.float32).items()
    }
    y = selective_scan(**{k: v.to(DEVICES[backend]) for k, v in inputs.items()}, backend=backend)
    assert y.shape == (2, 0, 3)
    y.sum().backward()


@pytest.mark.parametrize("name", ["delta", "B", "C", "D", "z", "delta_bias"])
def test_a_wrong_shape_is_named(name):
    inputs = make_inputs(4, OPTIONS["all"], torch.float32)
    inputs[name] = inputs[name].detach()[..., :-1]
    with pytest.raises(ValueError, match=rf"{name} must have shape \(.*\), got \("):
        selective_scan(**inputs)


def test_a_wrong_rank_is_named():
    inputs = make_inputs(4, (), torch.float32)
    with pytest.raises(ValueError, match=r"u must be \(batch, length, channels\)"):
        selective_scan(**{**inputs, "u": inputs["u"][0]})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 127, 512])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", ["mamba_ssm", "triton"])
def test_backends_agree_on_the_gpu(backend, options, length, dtype):
    if fault := backend_fault(backend, "cuda"):
        pytest.skip(fault)
    softplus = "softplus" in OPTIONS[options]
    inputs = make_inputs(length, OPTIONS[options], dtype, channels=70, d_state=16, directions=2, device="cuda")
    used = [k for k, v in inputs.items() if v is not None]
    results = {}
    for name in ("torch", backend):
        y = selective_scan(**inputs, delta_softplus=softplus, bidirectional=True, backend=name)
        results[name] = (y, *torch.autograd.grad(y.float().square().sum(), [inputs[k] for k in used]))
    # For one token mamba-ssm's gradient of A is 2e-5, not zero.
    smallest = 1e-2 if backend == "mamba_ssm" else 1e-3
    for name, ours, theirs in zip(["y", *used], results["torch"], results[backend]):
        assert relative_error(theirs, ours, smallest) < TOLERANCE[dtype], name


# The grid of mamba-ssm's own test of its scan, tests/ops/test_selective_scan.py of release 2.3.2, in both directions.
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [8, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("softplus", [False, True], ids=["", "softplus"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("skip", [False, True], ids=["", "D"])
@pytest.mark.parametrize("gate", [False, True], ids=["", "z"])
def test_triton_on_the_grid_of_mamba_ssm(gate, skip, bias, softplus, length, dtype):
    options = {"z": gate, "D": skip, "delta_bias": bias, "softplus": softplus}
    options = [name for name, used in options.items() if used]
    inputs = make_inputs(length, options, dtype, batch=2, channels=4, d_state=8, directions=2, device="cuda")
    if bias and not softplus:  # a step size must be positive
        inputs["delta_bias"] = inputs["delta_bias"].detach().abs().requires_grad_()
    results = []
    for backend in ("torch", "triton"):
        exact = backend == "torch"
        tensors = {k: None if v is None else v.detach().double() if exact else v.detach() for k, v in inputs.items()}
        used = [v.requires_grad_() for v in tensors.values() if v is not None]
        y = selective_scan(**tensors, delta_softplus=softplus, bidirectional=True, backend=backend)
        results.append(
            (y, *torch.autograd.grad(y, used, torch.linspace(-1, 1, y.numel(), device="cuda").view_as(y).to(y)))
        )
    for name, truth, value in zip(["y", *(k for k, v in inputs.items() if v is not None)], *results):
        assert relative_error(value, truth) < 5 * TOLERANCE[dtype], name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_triton_at_the_size_of_the_model(dtype):
    inputs = make_inputs(512, OPTIONS["all"], dtype, 4, 512, 16, directions=2, device="cuda")
    results = {}
    for backend in ("torch", "triton", "triton"):
        y = selective_scan(**inputs, delta_softplus=True, bidirectional=True, backend=backend)
        values = (y, *torch.autograd.grad(y, tuple(inputs.values()), torch.ones_like(y)))
        if backend in results:  # the same at every run, bit for bit
            assert all(torch.equal(a, b) for a, b in zip(values, results[backend]))
        results[backend] = values
    for name, ours, theirs in zip(["y", *inputs], results["torch"], results["triton"]):
        assert relative_error(theirs, ours) < TOLERANCE[dtype], name
