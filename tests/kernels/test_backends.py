"""The choice of a backend: what runs, what does not and why, and that the model is the same with each."""

import importlib
import types

import pytest
import torch
from kernel_checks import DEVICE, make_inputs, needs_triton, relative_norm

from mamba_ginr.kernels import backends, choose_backend, selective_scan, triton_fault, use_backend


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
