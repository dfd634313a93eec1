"""The choice of a backend: what runs, what does not and why, and that the model is the same with each."""

import importlib
import types
from contextlib import contextmanager

import pytest
import torch
from kernel_checks import DEVICE, make_inputs, needs_triton, relative_norm

from mamba_ginr.kernels import (
    add_norm,
    backends,
    causal_conv,
    choose_backend,
    mamba_inner,
    mlp,
    selective_scan,
    triton_fault,
    use_backend,
)


@needs_triton
def test_triton_backend_names_what_it_cannot_do(monkeypatch):
    inputs = make_inputs(3, (), torch.float64, device=DEVICE)
    with pytest.raises(RuntimeError, match="float64 is for the torch backend"):
        selective_scan(**inputs, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="Triton kernels run on CUDA devices, not on cpu"):
        use_backend("triton", "cpu")
    monkeypatch.setattr(backends, "triton", None)
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        use_backend("triton", "cpu")


def test_an_unknown_backend_lists_the_known():
    with pytest.raises(ValueError, match="auto, torch, triton, mamba_ssm"):
        use_backend("cuda", "cpu")
    with pytest.raises(ValueError, match="auto, torch, triton, mamba_ssm"):
        selective_scan(**make_inputs(4, (), torch.float32), backend="cuda")


def test_the_cpu_takes_torch_and_says_why():
    name, why = use_backend("auto", "cpu")
    assert name == "torch"
    assert "need a GPU" in why


def test_mamba_ssm_by_name_on_the_cpu_is_an_error():
    with pytest.raises(RuntimeError, match="CUDA devices only"):
        use_backend("mamba_ssm", "cpu")


def install_fake(monkeypatch, error_at_import=None, scan=None):
    """Make importing or calling mamba_ssm fail in a given way; with neither error nor scan it is not installed."""
    monkeypatch.setattr(backends, "_faults", {})
    monkeypatch.setitem(backends._probes, "triton", lambda device: "Triton's kernels do not run (a test)")
    real_import = importlib.import_module

    def fake_import(name):
        if not name.startswith("mamba_ssm"):
            return real_import(name)
        if error_at_import:
            raise error_at_import
        return types.SimpleNamespace(selective_scan_fn=scan)

    monkeypatch.setattr(importlib, "import_module", fake_import)
    found = scan or error_at_import
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found and types.SimpleNamespace(name=name))
    # The probe puts its tensors on the GPU asked for; here it gets the CPU.
    probe = backends._probes["mamba_ssm"]
    monkeypatch.setitem(backends._probes, "mamba_ssm", lambda device: probe(torch.device("cpu")))


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
    name, why = choose_backend("cuda")
    assert name == "torch"
    assert said in why
    assert "SLOW" in why
    assert "pip install" in why
    assert "\n" not in why
    with pytest.raises(RuntimeError, match="scan backend mamba_ssm"):
        use_backend("mamba_ssm", "cuda")


def test_a_working_mamba_ssm_is_taken(monkeypatch):
    install_fake(monkeypatch, scan=lambda u, *_: u)
    name, why = choose_backend("cuda")
    assert name == "mamba_ssm"
    assert "WARNING" in why
    assert "Triton's kernels do not run" in why


@needs_triton
def test_triton_comes_first_where_it_runs(monkeypatch):
    install_fake(monkeypatch, scan=lambda u, *_: u)
    monkeypatch.setitem(backends._probes, "triton", lambda device: "")
    name, why = choose_backend("cuda")
    assert name == "triton"
    assert "WARNING" not in why


@needs_triton
def test_triton_is_tried_where_no_gradients_are():
    with torch.no_grad():
        assert backends._probes["triton"](torch.device(DEVICE)) == ""


@needs_triton
def test_triton_is_tried_in_inference_mode_and_under_a_transform():
    # What autograd cannot do there was once remembered as what Triton cannot.
    def fault(x):
        with torch.inference_mode():
            return x + len(backends._probes["triton"](torch.device(DEVICE)))

    assert torch.vmap(fault)(torch.zeros(2)).tolist() == [0, 0]


@needs_triton
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("Triton Error [CUDA]: out of memory")],
    ids=["of PyTorch", "of Triton"],
)
def test_a_lack_of_memory_is_told_and_not_remembered(monkeypatch, error):
    def full(*_):
        raise error

    operators = importlib.import_module("mamba_ginr.kernels.selective_scan.triton_ops")
    monkeypatch.setattr(backends, "_faults", {})
    probe = backends._probes["triton"]  # on the GPU asked for; here it gets the CPU where there is none
    monkeypatch.setitem(backends._probes, "triton", lambda _: probe(torch.device(DEVICE)))
    monkeypatch.setattr(operators, "_triton_scan", full)
    name, why = choose_backend("cuda")
    assert name == "torch"
    assert "no memory was left on cuda" in why
    assert "to try triton, which is tried again next time" in why
    monkeypatch.setitem(backends._probes, "triton", lambda _: "")
    assert choose_backend("cuda")[0] == "triton"


@needs_triton
def test_mamba_ssm_without_memory_is_not_remembered_either(monkeypatch):
    full = torch.OutOfMemoryError("CUDA out of memory.")
    install_fake(monkeypatch, scan=lambda *_: (_ for _ in ()).throw(full))
    assert "no memory was left" in choose_backend("cuda")[1]
    install_fake(monkeypatch, scan=lambda u, *_: u)
    assert choose_backend("cuda")[0] == "mamba_ssm"


def test_a_backend_is_not_tried_while_a_cuda_graph_is_captured(monkeypatch):
    monkeypatch.setattr(backends, "_faults", {})
    for name, value in (("is_available", True), ("current_device", 0), ("is_current_stream_capturing", True)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    with pytest.raises(
        RuntimeError, match=r'cannot be while a CUDA graph is captured; call .*use_backend\("auto", "cu'
    ):
        choose_backend("cuda")
    assert backends._faults == {}


@needs_triton
def test_every_kernel_is_launched_with_the_gpu_of_its_tensors_current(triton_backend, monkeypatch):
    # Triton takes the current GPU; on another than the tensors' the next launch fails with "invalid resource handle".
    entered, launches, device_of = [], [], torch.cuda.device_of

    @contextmanager
    def watched(tensor):
        entered.append(tensor.device.type)
        with device_of(tensor):
            yield
        entered.pop()

    if DEVICE == "cuda":
        runner, name = importlib.import_module("triton.runtime.jit").JITFunction, "run"
    else:
        runner, name = importlib.import_module("triton.runtime.interpreter").GridExecutor, "__call__"
    run = getattr(runner, name)
    monkeypatch.setattr(torch.cuda, "device_of", watched)
    monkeypatch.setattr(runner, name, lambda *a, **k: launches.append(list(entered)) or run(*a, **k))
    x, two, one = (torch.ones(shape, device=DEVICE) for shape in ((1, 2, 2), (2, 2), (2,)))
    first, second = (torch.nn.Linear(2, 2, device=DEVICE) for _ in range(2))
    x.requires_grad_()
    outputs = [
        selective_scan(x, x, -two, x, x, backend="triton"),
        causal_conv(x, two, one, backend="triton"),
        mamba_inner(torch.cat([x, x], -1), two, one, two.new_ones(5, 2), two[:, :1], -two, one, one, backend="triton"),
    ]
    with torch.autocast(DEVICE, torch.float16):
        outputs += [mlp(x, first, second, "gelu")[0], add_norm(x, None, torch.nn.LayerNorm(2, device=DEVICE))[1]]
    sum(y.float().sum() for y in outputs).backward()
    # Forwards 2 + 1 + 3 + 1 + 1; backwards with their sums 5 + 2 + 7 + 2 + 2.
    assert len(launches) == 26
    assert all(launch and set(launch) == {DEVICE} for launch in launches)


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_triton_cannot_use_is_a_fault_not_a_crash(monkeypatch):
    monkeypatch.setattr(backends, "_faults", {})
    assert "Triton's kernels do not run" in triton_fault("cuda")


@needs_triton
def test_the_models_outputs_and_gradients_are_those_of_pytorchs_layers(triton_backend, nb, tiny):
    model, images = tiny(dim=32, num_lp=8), torch.rand(2, 3, 8, 8, device=DEVICE)
    model.to(DEVICE).precision, coords = torch.float16, nb.pixel_grid(8).to(DEVICE)
    parameters = {n: p for n, p in model.named_parameters() if not n.startswith("head.")}  # which these queries reach
    results = []
    for backend in ("torch", "triton"):
        use_backend(backend, DEVICE)
        output = model(images, coords)
        loss = 100 * output.square().mean()
        results.append((output, *torch.autograd.grad(loss, tuple(parameters.values()))))
    names = ("output", *parameters)
    for name, of_torch, of_triton in zip(names, *results):
        assert relative_norm(of_triton, of_torch) < 0.03, name


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_two_gpus_in_one_process():
    results = []
    for device in ("cuda:1", "cuda:0", "cuda:1"):  # cuda:0 stays the current one
        inputs = make_inputs(19, ("D", "z"), torch.float32, device=device)
        y = selective_scan(**inputs, backend="triton")
        results.append([y, *torch.autograd.grad(y.sum(), [t for t in inputs.values() if t is not None])])
    assert torch.cuda.current_device() == 0
    for others in results[1:]:
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(results[0], others))
