"""The selective scan: against a plain recurrence in float64, gradients too, and the choice of its backend."""

import types

import pytest
import torch
import torch.nn.functional as F

import selective_scan as scan_module
from selective_scan import selective_scan

# Largest error relative to the largest value, outputs and gradients: a few units in the last place, grown over time.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
OPTIONS = {
    "plain": (),
    "D": ("D",),
    "z": ("z",),
    "softplus": ("delta_bias", "softplus"),
    "all": ("D", "z", "delta_bias", "softplus"),
}


DEVICE = {"torch": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}  # on the CPU: Triton's interpreter
needs_triton = pytest.mark.skipif(scan_module.triton is None, reason="needs Triton")


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


def reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """The recurrence as the paper writes it, one channel and one state at a time, in float64."""
    batch, length, channels = u.shape
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = F.softplus(delta)
    rows = []
    for b in range(batch):
        for d in range(channels):
            backwards = B.dim() == 4 and d >= channels // 2
            B_b, C_b = (m[b] if m.dim() == 3 else m[b, :, int(backwards)] for m in (B, C))
            h, ys = [u.new_zeros(()) for _ in range(A.shape[1])], {}
            for t in reversed(range(length)) if backwards else range(length):
                for n in range(A.shape[1]):
                    h[n] = torch.exp(delta[b, t, d] * A[d, n]) * h[n] + delta[b, t, d] * B_b[t, n] * u[b, t, d]
                y = sum(C_b[t, n] * h[n] for n in range(A.shape[1]))
                y = y if D is None else y + D[d] * u[b, t, d]
                ys[t] = y if z is None else y * z[b, t, d] * torch.sigmoid(z[b, t, d])
            rows.append(torch.stack([ys[t] for t in range(length)]))
    return torch.stack(rows).view(batch, channels, length).transpose(1, 2)


def relative_error(value, truth, smallest=1e-3):
    # A gradient can be zero, of A for one token; against that a kernel's 1e-9 is no error. The inputs are near 1.
    return ((value.double().cpu() - truth.double().cpu()).abs().max() / truth.abs().max().clamp_min(smallest)).item()


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
    inputs = make_inputs(19, OPTIONS[options], torch.float32, directions=directions, device=DEVICE["triton"])
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
        device=DEVICE["triton"],
    )
    check_against_reference(inputs, True, "triton")


@needs_triton
@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (37, 5, 7), (3, 0), (0, 4)], ids=str)
def test_sums_of_partial_sums(shape):
    parts = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE["triton"])
    assert torch.allclose(scan_module.sum_rows(parts), parts.sum(0), atol=1e-5)


@needs_triton
def test_triton_softplus_keeps_its_digits_where_it_is_small():
    raw = torch.linspace(-20, 30, 1001, device=DEVICE["triton"]).view(1, 1, -1)
    one, A = torch.ones_like(raw), -torch.ones(raw.shape[2], 1, device=raw.device)
    # After one step from h = 0 with u = B = C = 1, y is the step size.
    y = selective_scan(one, raw, A, one[..., :1], one[..., :1], delta_softplus=True, backend="triton")
    assert torch.allclose(y.double(), F.softplus(raw.double(), threshold=100), rtol=1e-6, atol=0)


@needs_triton
def test_triton_backend_takes_slices_as_they_are():
    inputs = make_inputs(6, OPTIONS["all"], torch.float32, directions=2, device=DEVICE["triton"])
    how = {"delta_softplus": True, "bidirectional": True, "backend": "triton"}
    wide = {k: torch.cat([v, v.flip(0)], dim=-1)[..., : v.shape[-1]] for k, v in inputs.items() if v.dim() > 2}
    assert not wide["u"].is_contiguous()
    assert torch.equal(selective_scan(**{**inputs, **wide}, **how), selective_scan(**inputs, **how))


@needs_triton
def test_triton_backend_is_a_well_formed_operator():
    inputs = make_inputs(5, OPTIONS["all"], torch.float32, directions=2, device=DEVICE["triton"])
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(scan_module._triton_scan, (*inputs.values(), True, True), test_utils=checks)


def conv_reference(x, weight, bias, both):
    """PyTorch's own depthwise convolution, the second half of the channels on the reversed sequence."""
    parts, half = [], x.shape[2] // 2 if both else x.shape[2]
    for part, backwards in ((slice(0, half), False), (slice(half, None), True)):
        u, w = x[..., part].transpose(1, 2), weight[part].unsqueeze(1)
        u = F.conv1d(u.flip(2) if backwards else u, w, bias[part], padding=weight.shape[1] - 1, groups=len(w))
        u = F.silu(u[..., : x.shape[1]])
        parts.append((u.flip(2) if backwards else u).transpose(1, 2))
        if not both:
            break
    return torch.cat(parts, dim=2)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("length", "channels", "taps"), [(1, 2, 4), (3, 6, 4), (70, 130, 4), (66, 256, 2)])
def test_the_short_convolution_equals_conv1d(length, channels, taps, dtype, both, backend):
    generator, device = torch.Generator().manual_seed(length), DEVICE[backend]
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    # Wider than what is read, so that rows are not contiguous.
    wide, weight, bias = draw(2, length, channels + 3), draw(channels, taps), draw(channels)
    wide = wide.to(dtype).double()
    exact = [t.clone().requires_grad_() for t in (wide[..., :channels], weight, bias)]
    truth = conv_reference(*exact, both)
    weights = draw(*truth.shape).to(dtype).double()
    true_gradients = torch.autograd.grad((truth * weights).sum(), exact)

    x = wide.to(device, dtype)[..., :channels].detach().requires_grad_()
    inputs = (x, *(t.to(device, torch.float32).requires_grad_() for t in (weight, bias)))
    y = scan_module.causal_conv(*inputs, both, backend)
    gradients = torch.autograd.grad(y, inputs, weights.to(device, dtype))
    assert y.dtype == dtype
    for name, value, exact_value in zip("yxwb", (y, *gradients), (truth, *true_gradients)):
        assert relative_error(value, exact_value) < TOLERANCE[dtype], name


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
    inputs = inner_inputs(torch.float32, both, DEVICE["triton"])
    values = []
    for tensors, backend in ((exact, "torch"), (inputs, "triton")):
        y = scan_module.mamba_inner(**tensors, bidirectional=both, backend=backend)
        weights = torch.arange(y.numel(), dtype=torch.float64).cos().view_as(y).to(y)
        values.append((y, *torch.autograd.grad(y, tuple(tensors.values()), weights)))
    for name, truth, value in zip(["y", *inputs], *values):
        assert relative_error(value, truth) < TOLERANCE[torch.float32], name


@needs_triton
def test_nothing_is_kept_where_no_gradient_is_asked_for(monkeypatch):
    kept = []
    room = scan_module._kept_states
    monkeypatch.setattr(scan_module, "_kept_states", lambda *a: kept.append(room(*a)) or kept[-1])
    inputs = inner_inputs(torch.float32, True, DEVICE["triton"])
    with torch.no_grad():
        alone = scan_module.mamba_inner(**inputs, bidirectional=True, backend="triton")
    assert [t.numel() for t in kept] == [0]
    assert torch.equal(alone, scan_module.mamba_inner(**inputs, bidirectional=True, backend="triton"))
    assert kept[1].numel() > 0


@pytest.mark.parametrize("name", ["xz", "conv_weight", "conv_bias", "x_proj", "dt_proj"])
def test_a_wrong_shape_of_the_fused_mamba_is_named(name):
    inputs = inner_inputs(torch.float32, True, "cpu")
    inputs[name] = inputs[name].detach()[..., :-1] if name == "xz" else inputs[name].detach()[:-1]
    with pytest.raises(ValueError, match=rf"mamba_inner: {name} must have shape \(.*\), got \("):
        scan_module.mamba_inner(**inputs, bidirectional=True)


def test_wrong_shapes_of_the_convolution_are_named():
    x, weight, bias = torch.ones(1, 5, 3), torch.ones(3, 4), torch.ones(3)
    with pytest.raises(ValueError, match=r"got \(1, 5, 3\), \(2, 4\) and \(3,\)"):
        scan_module.causal_conv(x, weight[:2], bias)
    with pytest.raises(ValueError, match="even number of channels, got 3"):
        scan_module.causal_conv(x, weight, bias, bidirectional=True)


@needs_triton
def test_triton_backend_names_what_it_cannot_do(monkeypatch):
    inputs = make_inputs(3, (), torch.float64, device=DEVICE["triton"])
    with pytest.raises(RuntimeError, match="float64 is for the torch backend"):
        selective_scan(**inputs, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="Triton kernels run on CUDA devices, not on cpu"):
        scan_module.use_backend("triton", "cpu")
    monkeypatch.setattr(scan_module, "triton", None)
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        scan_module.use_backend("triton", "cpu")


def test_gradients_by_finite_differences():
    inputs = make_inputs(5, OPTIONS["all"], torch.float64, batch=1, channels=2, d_state=2)
    assert torch.autograd.gradcheck(lambda *a: selective_scan(*a, delta_softplus=True), tuple(inputs.values()))


def test_autocast_leaves_the_state_in_float32():
    inputs = make_inputs(33, OPTIONS["all"], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = selective_scan(**inputs, delta_softplus=True)
    assert torch.equal(inside, selective_scan(**inputs, delta_softplus=True))


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_empty_sequence(backend):
    inputs = {
        k: v if v is None or v.dim() < 3 else v[:, :0] for k, v in make_inputs(2, OPTIONS["all"], torch.float32).items()
    }
    y = selective_scan(**{k: v.to(DEVICE[backend]) for k, v in inputs.items()}, backend=backend)
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


def test_an_unknown_backend_lists_the_known():
    with pytest.raises(ValueError, match="auto, torch, triton, mamba_ssm"):
        scan_module.use_backend("cuda", "cpu")
    with pytest.raises(ValueError, match="auto, torch, triton, mamba_ssm"):
        selective_scan(**make_inputs(4, (), torch.float32), backend="cuda")


def test_the_cpu_takes_torch_and_says_why():
    name, why = scan_module.use_backend("auto", "cpu")
    assert name == "torch"
    assert "need a GPU" in why


def test_mamba_ssm_by_name_on_the_cpu_is_an_error():
    with pytest.raises(RuntimeError, match="CUDA devices only"):
        scan_module.use_backend("mamba_ssm", "cpu")


def install_fake(monkeypatch, error_at_import=None, scan=None):
    """Make importing or calling mamba_ssm fail in a given way; with neither error nor scan it is not installed."""
    monkeypatch.setattr(scan_module, "_faults", {})
    monkeypatch.setattr(scan_module, "_try_triton", lambda device: "Triton's kernels do not run (a test)")
    real_import = scan_module.importlib.import_module

    def fake_import(name):
        if not name.startswith("mamba_ssm"):
            return real_import(name)
        if error_at_import:
            raise error_at_import
        return types.SimpleNamespace(selective_scan_fn=scan)

    monkeypatch.setattr(scan_module.importlib, "import_module", fake_import)
    found = scan or error_at_import
    monkeypatch.setattr(
        scan_module.importlib.util, "find_spec", lambda name: found and types.SimpleNamespace(name=name)
    )
    # The probe puts its tensors on the GPU asked for; here it gets the CPU.
    probe = scan_module._try_mamba_ssm
    monkeypatch.setattr(scan_module, "_try_mamba_ssm", lambda device: probe(torch.device("cpu")))


def broken_scan(*_):
    raise RuntimeError("selective_scan_cuda is not available.\nReinstall.")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({}, "not installed"),
        ({"error_at_import": ModuleNotFoundError("No module", name="selective_scan_cuda")}, "without its CUDA kernel"),
        ({"error_at_import": ModuleNotFoundError("No module", name="transformers")}, "pip install transformers"),
        ({"error_at_import": ImportError("cannot import name 'GreedySearchDecoderOnlyOutput'")}, "does not import"),
        ({"error_at_import": ImportError("undefined symbol: _ZN3c10")}, "undefined symbol"),
        ({"scan": broken_scan}, "does not run (RuntimeError: selective_scan_cuda is not available.)"),
    ],
    ids=["absent", "no kernel", "missing dependency", "transformers clash", "other torch", "fails when called"],
)
def test_each_fault_of_mamba_ssm_is_told_in_one_line_and_torch_goes_on(monkeypatch, fault, said):
    install_fake(monkeypatch, **fault)
    name, why = scan_module.choose_backend("cuda")
    assert name == "torch"
    assert said in why
    assert "SLOW" in why
    assert "pip install" in why
    assert "\n" not in why
    with pytest.raises(RuntimeError, match="scan backend mamba_ssm"):
        scan_module.use_backend("mamba_ssm", "cuda")


def test_a_working_mamba_ssm_is_taken(monkeypatch):
    install_fake(monkeypatch, scan=lambda u, *_: u)
    name, why = scan_module.choose_backend("cuda")
    assert name == "mamba_ssm"
    assert "WARNING" in why
    assert "Triton's kernels do not run" in why


@needs_triton
def test_triton_comes_first_where_it_runs(monkeypatch):
    install_fake(monkeypatch, scan=lambda u, *_: u)
    monkeypatch.setattr(scan_module, "_try_triton", lambda device: "")
    name, why = scan_module.choose_backend("cuda")
    assert name == "triton"
    assert "WARNING" not in why


@needs_triton
def test_triton_is_tried_where_no_gradients_are():
    with torch.no_grad():
        assert scan_module._try_triton(torch.device(DEVICE["triton"])) == ""


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_triton_cannot_use_is_a_fault_not_a_crash(monkeypatch):
    monkeypatch.setattr(scan_module, "_faults", {})
    assert "Triton's kernels do not run" in scan_module.triton_fault("cuda")


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import selective_scan as scan

flags = dict(HAS_D=True, HAS_Z=True, HAS_BIAS=True, SOFTPLUS=True, MASKED=True)
sizes = dict(DIRECTIONS=2, BLOCK_N=16, **scan.SIZES)
packing = dict(BLOCK_N=16, CHUNK=scan.SIZES["CHUNK"])
float32 = "A D delta_bias pairs states scratch dA dpairs dvectors weight bias parts total".split()
bfloat16 = "dout u delta B C z out du ddelta dz dBC x dx".split()
kernels = [
    (scan._pack_kernel, packing),
    (scan._forward_kernel, {**flags, **sizes, "AHEAD": scan.FORWARD["AHEAD"]}),
    (scan._backward_kernel, {**flags, **sizes}),
    (scan._unpack_kernel, {**packing, "DIRECTIONS": 2}),
    (scan._sum_kernel, {"ROWS": 16, "COLUMNS": 32}),
    (scan._conv_forward_kernel, {**scan.CONV_FORWARD, "TAPS": 4}),
    (scan._conv_backward_kernel, {**scan.CONV_BACKWARD, "TAPS": 4}),
]
for kernel, constants in kernels:
    kinds = dict.fromkeys(float32, "*fp32") | dict.fromkeys(bfloat16, "*bf16") | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, {name: kinds.get(name, "i32") for name in kernel.arg_names}, constants)
    print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1}).asm["cubin"]))
"""


@needs_triton
def test_triton_kernels_compile_for_a_gpu_that_is_not_here(compiled_sizes):
    assert [size > 1000 for size in compiled_sizes(COMPILE)] == [True] * 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 127, 512])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", ["mamba_ssm", "triton"])
def test_backends_agree_on_the_gpu(backend, options, length, dtype):
    if fault := scan_module.backend_fault(backend, "cuda"):
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
