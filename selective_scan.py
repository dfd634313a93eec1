"""The selective scan of Mamba (S6), behind one function with interchangeable backends.

    from selective_scan import selective_scan, use_backend

    backend, why = use_backend("auto", device)
    y = selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus=True)

Glossary, with the letters of Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State
Spaces" (arXiv 2312.00752), Section 3.2 and Algorithm 2:

    u      input sequence             delta  step size, positive, in units of one token
    h      state, one per channel     A      decay rate of the state per unit of delta, negative
    y      output sequence            B, C   how the input enters the state, how the state is read
    z      gate                       D      skip connection from input to output
"""

import importlib
import importlib.util
import sys

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Without these flags pip may reuse a build without the kernel, or give up where no ready wheel can be looked up.
INSTALL = (
    "MAMBA_FORCE_BUILD=TRUE MAMBA_KEEP_CUDA_BUILD=TRUE "
    "pip install --no-build-isolation --no-cache-dir -r requirements-cuda.txt"
)
REBUILD = f"{INSTALL} --force-reinstall --no-deps"


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Run the recurrence h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, y_t = C_t h_t + D u_t from h = 0.

    Args:
        u: (batch, length, channels), float32, float64, bfloat16 or float16.
        delta: (batch, length, channels), the step sizes; any sign if ``delta_softplus``, else positive.
        A: (channels, d_state), real, negative for a state that decays.
        B, C: (batch, length, d_state), shared by all channels.
        D: (channels,), or None for no skip.
        z: (batch, length, channels), or None; the output is multiplied by SiLU(z).
        delta_bias: (channels,), added to ``delta`` before the softplus.
        delta_softplus: pass ``delta`` through softplus, which makes it positive.
        backend: "torch" or "mamba_ssm"; None takes what ``use_backend`` chose.

    Returns:
        y: (batch, length, channels) in the dtype of ``u``. The state is float32 (float64 for float64 input).

    Raises:
        ValueError: a shape that does not fit ``u`` and ``A``, or an unknown backend.
        RuntimeError: the backend cannot run here; the message says what is missing.
    """
    _check_shapes(u, delta, A, B, C, D, z, delta_bias)
    name = backend or _chosen["backend"]
    if name == "auto":
        name = choose_backend(u.device)[0]
    if name not in BACKENDS:
        raise ValueError(f"unknown scan backend {name!r}; choose one of: auto, {', '.join(BACKENDS)}")
    # Autocast would turn the read-out of the state into a bfloat16 product.
    with torch.autocast(u.device.type, enabled=False):
        return BACKENDS[name](u, delta, A, B, C, D, z, delta_bias, delta_softplus)


def _check_shapes(u, delta, A, B, C, D, z, delta_bias) -> None:
    if u.dim() != 3 or A.dim() != 2:
        raise ValueError(
            f"selective_scan: u must be (batch, length, channels) and A (channels, d_state), "
            f"got {tuple(u.shape)} and {tuple(A.shape)}"
        )
    (batch, length, channels), d_state = u.shape, A.shape[1]
    expected = {
        "delta": (delta, (batch, length, channels)),
        "A": (A, (channels, d_state)),
        "B": (B, (batch, length, d_state)),
        "C": (C, (batch, length, d_state)),
        "D": (D, (channels,)),
        "z": (z, (batch, length, channels)),
        "delta_bias": (delta_bias, (channels,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"selective_scan: {name} must have shape {shape}, got {tuple(tensor.shape)}")


def _scan_torch(u, delta, A, B, C, D, z, delta_bias, delta_softplus) -> Tensor:
    """The recurrence, written as a loop over time: any device, any float dtype."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    arguments = [None if t is None else t.to(dtype) for t in (u, delta, A, B, C, D, z, delta_bias)]
    if u.is_cuda and torch.is_grad_enabled():
        # A CUDA device usually meets batches at which 512 stored states are tens of gigabytes: compute them twice.
        y = checkpoint(_time_loop, *arguments, delta_softplus, use_reentrant=False)
    else:
        y = _time_loop(*arguments, delta_softplus)
    return y.to(u.dtype)


def _time_loop(u, delta, A, B, C, D, z, delta_bias, delta_softplus) -> Tensor:
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = F.softplus(delta)
    h = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    ys = []
    # unbind, because the backward of indexing [:, t] fills a whole (batch, length, ...) gradient at each t.
    for delta_t, input_t, B_t, C_t in zip(delta.unbind(1), (delta * u).unbind(1), B.unbind(1), C.unbind(1)):
        decay = torch.exp(delta_t.unsqueeze(-1) * A)  # (B, D, N)
        h = torch.addcmul(input_t.unsqueeze(-1) * B_t.unsqueeze(1), decay, h)
        ys.append((h * C_t.unsqueeze(1)).sum(-1))  # (B, D); not a matmul, which TF32 would round
    y = torch.stack(ys, 1) if ys else torch.zeros_like(u)  # (B, L, D)
    if D is not None:
        y = y + D * u
    return y if z is None else y * F.silu(z)


def _scan_mamba_ssm(u, delta, A, B, C, D, z, delta_bias, delta_softplus) -> Tensor:
    """The CUDA kernel of the mamba-ssm package, which keeps time last: (batch, channels, length)."""
    try:
        selective_scan_fn = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    except ImportError as error:
        raise RuntimeError(f"scan backend mamba_ssm: {mamba_ssm_fault(u.device)}") from error
    delta, B, C = (t.to(u.dtype).transpose(1, 2) for t in (delta, B, C))
    z = None if z is None else z.to(u.dtype).transpose(1, 2)
    A, D, delta_bias = (None if t is None else t.float() for t in (A, D, delta_bias))
    y = selective_scan_fn(
        u.transpose(1, 2), delta, A, B, C, D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus
    )
    return y.transpose(1, 2)


BACKENDS = {"torch": _scan_torch, "mamba_ssm": _scan_mamba_ssm}
_chosen = {"backend": "auto"}
_faults: dict[str, str] = {}


def use_backend(name: str, device: torch.device | str) -> tuple[str, str]:
    """Make ``name`` the default of ``selective_scan``; return the backend that ``device`` gets, and why, in words.

    "auto" takes the fastest that runs. Where that is a slow one, the reason says what is missing and how to mend it.

    Raises:
        ValueError: a name other than "auto", "torch" and "mamba_ssm".
        RuntimeError: "mamba_ssm" was asked for by name and cannot run on ``device``.
    """
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"unknown scan backend {name!r}; choose one of: auto, {', '.join(BACKENDS)}")
    if name == "mamba_ssm" and (fault := mamba_ssm_fault(device)):
        raise RuntimeError(f"scan backend mamba_ssm: {fault}")
    _chosen["backend"] = name
    return choose_backend(device) if name == "auto" else (name, "as asked")


def choose_backend(device: torch.device | str) -> tuple[str, str]:
    """Return the fastest backend that runs on ``device`` and the reason in words."""
    if torch.device(device).type != "cuda":
        return "torch", "the CUDA kernel of mamba-ssm needs a GPU"
    fault = mamba_ssm_fault(device)
    if not fault:
        return "mamba_ssm", f"CUDA kernel, release {getattr(sys.modules.get('mamba_ssm'), '__version__', 'unknown')}"
    return "torch", f"SLOW, a training step takes some 80 times as long as with the CUDA kernel: {fault}"


def mamba_ssm_fault(device: torch.device | str) -> str:
    """Say what keeps mamba-ssm's kernel from running on ``device`` and how to mend it; "" if it runs."""
    device = torch.device(device)
    if device.type != "cuda":
        return f"mamba-ssm runs on CUDA devices only, not on {device.type}"
    if str(device) not in _faults:
        _faults[str(device)] = _try_mamba_ssm(device)
    return _faults[str(device)]


def _try_mamba_ssm(device: torch.device) -> str:
    if importlib.util.find_spec("mamba_ssm") is None:
        return f"mamba-ssm is not installed; with nvcc at hand: {INSTALL}"
    try:
        scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    except ModuleNotFoundError as error:
        if error.name == "selective_scan_cuda":
            return f"mamba-ssm is installed without its CUDA kernel; rebuild it: {REBUILD}"
        return f"mamba-ssm lacks the package {error.name}; install it: pip install {error.name}"
    except Exception as error:
        # A clash with transformers, or a kernel built for another torch (undefined symbol).
        return f"mamba-ssm does not import ({_first_line(error)}); rebuild its newest release: {REBUILD}"
    try:
        # Some releases import without the kernel and fail at the first call only.
        x = torch.ones(1, 1, 8, device=device)
        scan(x, x, torch.full((1, 1), -1.0, device=device), x, x).sum().item()
    except Exception as error:
        return f"mamba-ssm's CUDA kernel does not run ({_first_line(error)}); rebuild it: {REBUILD}"
    return ""


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
