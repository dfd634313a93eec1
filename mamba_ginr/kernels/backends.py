"""Which implementation of an operation runs on a device, and why.

An operation, such as the selective scan, has an implementation in plain PyTorch, which runs everywhere, and may have
others: in Triton, or from the package mamba-ssm. This module imports none of them: each registers itself.
"""

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

try:
    import triton
    import triton.language
except ImportError:  # not on macOS or Windows
    triton = None

BACKENDS = ("torch", "triton", "mamba_ssm")
_runs: dict[str, dict[str, Callable]] = {}  # by operation and backend
_probes: dict[str, Callable[[torch.device], str]] = {}  # by backend
_chosen = {"backend": "auto"}
_faults: dict[str, str] = {}  # by backend and device


def register(operation: str, backend: str, run: Callable, probe: Callable[[torch.device], str] | None = None) -> None:
    """Make ``run`` what ``backend`` does for ``operation``.

    ``probe`` tries the backend on a GPU, once a process: it returns what keeps it from running there, "" if it runs.
    What may be otherwise the next time, such as a lack of memory, it raises, as ``lacks_memory`` tells.
    """
    _runs.setdefault(operation, {})[backend] = run
    if probe is not None:
        _probes[backend] = probe


def implementation(operation: str, backend: str) -> Callable:
    """What ``backend`` runs for ``operation``: the PyTorch way, if it has none of its own."""
    runs = _runs[operation]
    return runs[backend if backend in runs else "torch"]


def use_backend(name: str, device: torch.device | str) -> tuple[str, str]:
    """Make ``name`` the default of ``selective_scan``; return the backend that ``device`` gets, and why, in words.

    "auto" takes the fastest that runs. Where that is a slow one, the reason says what is missing and how to mend it.

    Raises:
        ValueError: a name other than "auto", "torch", "triton" and "mamba_ssm".
        RuntimeError: a backend was asked for by name and cannot run on ``device``.
    """
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"unknown scan backend {name!r}; choose one of: auto, {', '.join(BACKENDS)}")
    _require(name, device)
    _chosen["backend"] = name
    return choose_backend(device) if name == "auto" else (name, "as asked")


@contextmanager
def backend_set_to(name: str) -> Iterator[None]:
    """Have ``name`` for the default within, whatever was chosen."""
    chosen, _chosen["backend"] = _chosen["backend"], name
    try:
        yield
    finally:
        _chosen["backend"] = chosen


def choose_backend(device: torch.device | str) -> tuple[str, str]:
    """Return the fastest backend that runs on ``device`` and the reason in words."""
    if torch.device(device).type != "cuda":
        return "torch", "the kernels of Triton and mamba-ssm need a GPU"
    no_triton = triton_fault(device)
    if not no_triton:
        return "triton", f"both directions in one kernel, Triton {triton.__version__}"
    no_mamba = mamba_ssm_fault(device)
    if not no_mamba:
        release = getattr(sys.modules.get("mamba_ssm"), "__version__", "unknown")
        return "mamba_ssm", f"WARNING, the next best: {no_triton}; mamba-ssm's CUDA kernel, release {release}"
    return "torch", f"WARNING, SLOW, made of thousands of small kernels: {no_triton}; {no_mamba}"


@torch.compiler.assume_constant_result  # what it asks of the machine would cut a compiled model into pieces
def backend_for(asked: str | None, device: torch.device) -> str:
    """The backend to take; RuntimeError if it does not run on ``device``. Compiled code keeps what it was once told."""
    name = asked or _chosen["backend"]
    if name == "auto":
        name = choose_backend(device)[0]
    if name not in BACKENDS:
        raise ValueError(f"unknown scan backend {name!r}; choose one of: auto, {', '.join(BACKENDS)}")
    _require(name, device)
    return name


def backend_fault(name: str, device: torch.device | str) -> str:
    """Say what keeps the backend ``name`` from running on ``device``; "" if it runs."""
    return {"mamba_ssm": mamba_ssm_fault, "triton": triton_fault}.get(name, lambda _: "")(device)


def _require(name: str, device: torch.device | str) -> None:
    """RuntimeError that says why, if the backend ``name`` does not run on ``device``."""
    if fault := backend_fault(name, device):
        raise RuntimeError(f"scan backend {name}: {fault}")


def triton_fault(device: torch.device | str) -> str:
    """Say what keeps the Triton kernels from running on ``device``; "" if they run."""
    if triton is None:
        return "Triton is not installed; PyTorch brings it on Linux"
    if torch.device(device).type != "cuda":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return "" if interpreted else f"Triton kernels run on CUDA devices, not on {torch.device(device).type}"
    return _fault_of("triton", device)


def mamba_ssm_fault(device: torch.device | str) -> str:
    """Say what keeps mamba-ssm's kernel from running on ``device`` and how to mend it; "" if it runs."""
    if torch.device(device).type != "cuda":
        return f"mamba-ssm runs on CUDA devices only, not on {torch.device(device).type}"
    return _fault_of("mamba_ssm", device)


def _fault_of(name: str, device: torch.device | str) -> str:
    """What the backend's probe says, asked once for a device; a lack of memory is told, but not remembered."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    key = f"{name} on {device}"
    if key not in _faults:
        if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"scan backend {name} was not tried on {device} yet, and cannot be while a CUDA graph is captured; "
                f'call mamba_ginr.kernels.use_backend("auto", "{device}") before'
            )
        try:
            _faults[key] = _probes[name](device)
        except Exception as error:
            if not lacks_memory(error):
                raise
            return f"no memory was left on {device} to try {name}, which is tried again next time ({first_line(error)})"
    return _faults[key]


def lacks_memory(error: BaseException) -> bool:
    """Whether an error is a lack of memory, of the GPU or of the computer, which says nothing of anything else."""
    kinds, told = (MemoryError, torch.OutOfMemoryError), str(error).lower()
    return isinstance(error, kinds) or "out of memory" in told or "allocate memory" in told


def threads_of(device: torch.device | str) -> ThreadPoolExecutor:
    """Threads whose kernels go to ``device``, for work that the compiler does."""
    device = torch.device(device)
    if device.type != "cuda":
        return ThreadPoolExecutor()
    index = torch.cuda.current_device() if device.index is None else device.index
    return ThreadPoolExecutor(initializer=torch.cuda.set_device, initargs=(index,))


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of its message, for a fault that fits in one line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


REFUSED = "has first derivatives by backward() and autograd.grad only"
INSTEAD = (
    'For torch.func, forward mode and higher derivatives use_backend("torch", device), uncompiled, has them all '
    "(as has the plain recurrence, mamba_ginr.kernels.selective_scan.reference)"
)


def refuse_second_derivatives(backward_operator, name: str) -> None:
    """Have whoever differentiates an operator's gradients be told that, and not get a part of the truth."""

    def refuse(_ctx, *_gradients):
        raise RuntimeError(f"{name} {REFUSED}, and a second derivative was asked for. {INSTEAD}.")

    backward_operator.register_autograd(refuse)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """What a Linear would compute in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def is_fused(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the fused layers, which know no float32, run for ``x`` in ``dtype``."""
    return dtype in (torch.float16, torch.bfloat16) and backend_for(None, x.device) == "triton"
