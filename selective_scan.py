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
import os
import sys
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # not on macOS or Windows
    triton = None

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
    bidirectional: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Run the recurrence h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, y_t = C_t h_t + D u_t from h = 0.

    Args:
        u: (batch, length, channels), float32, float64, bfloat16 or float16.
        delta: (batch, length, channels), the step sizes; any sign if ``delta_softplus``, else positive.
        A: (channels, d_state), real, negative for a state that decays.
        B, C: (batch, length, d_state), shared by all channels; (batch, length, 2, d_state) if ``bidirectional``.
        D: (channels,), or None for no skip.
        z: (batch, length, channels), or None; the output is multiplied by SiLU(z).
        delta_bias: (channels,), added to ``delta`` before the softplus.
        delta_softplus: pass ``delta`` through softplus, which makes it positive.
        bidirectional: the second half of the channels walks from the last token to the first, with B and C [:, :, 1].
        backend: "torch", "triton" or "mamba_ssm"; None takes what ``use_backend`` chose.

    Returns:
        y: (batch, length, channels) in the dtype of ``u``. The state is float32 (float64 for float64 input).

    Raises:
        ValueError: a shape that does not fit ``u`` and ``A``, or an unknown backend.
        RuntimeError: the backend cannot run here; the message says what is missing.
    """
    _check_shapes(u, delta, A, B, C, D, z, delta_bias, bidirectional)
    name = _backend_for(backend, u.device)
    # Autocast would turn the read-out of the state into a bfloat16 product.
    with torch.autocast(u.device.type, enabled=False):
        return BACKENDS[name](u, delta, A, B, C, D, z, delta_bias, delta_softplus, bidirectional)


def _backend_for(asked: str | None, device: torch.device) -> str:
    name = asked or _chosen["backend"]
    if name == "auto":
        name = choose_backend(device)[0]
    if name not in BACKENDS:
        raise ValueError(f"unknown scan backend {name!r}; choose one of: auto, {', '.join(BACKENDS)}")
    return name


def _check_shapes(u, delta, A, B, C, D, z, delta_bias, bidirectional) -> None:
    if u.dim() != 3 or A.dim() != 2 or (bidirectional and u.shape[2] % 2):
        raise ValueError(
            f"selective_scan: u must be (batch, length, channels) and A (channels, d_state), with an even number "
            f"of channels for two directions, got {tuple(u.shape)} and {tuple(A.shape)}"
        )
    (batch, length, channels), d_state = u.shape, A.shape[1]
    directions = (2,) if bidirectional else ()
    expected = {
        "delta": (delta, (batch, length, channels)),
        "A": (A, (channels, d_state)),
        "B": (B, (batch, length, *directions, d_state)),
        "C": (C, (batch, length, *directions, d_state)),
        "D": (D, (channels,)),
        "z": (z, (batch, length, channels)),
        "delta_bias": (delta_bias, (channels,)),
    }
    _expect("selective_scan", expected)


def _expect(caller: str, expected: dict) -> None:
    """ValueError for the first tensor, if it is given, that has not the shape beside it."""
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{caller}: {name} must have shape {shape}, got {tuple(tensor.shape)}")


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor, bidirectional: bool = False, backend: str | None = None
) -> Tensor:
    """Mamba's short convolution before the scan: SiLU(bias + a causal filter of each channel by itself).

    Args:
        x: (batch, length, channels), any float dtype.
        weight: (channels, taps); the last tap is for the token itself, the first for that taps − 1 before.
        bias: (channels,)
        bidirectional: the second half of the channels reads from the last token to the first.
        backend: as for ``selective_scan``; for "mamba_ssm" the PyTorch convolution runs.

    Returns:
        (batch, length, channels) in the dtype of ``x``, summed in float32 (float64 for float64).

    Raises ValueError for shapes that do not fit, RuntimeError for a backend that cannot run here.
    """
    channels = x.shape[-1]
    if x.dim() != 3 or weight.dim() != 2 or len(weight) != channels or bias.shape != (channels,):
        raise ValueError(
            f"causal_conv: x must be (batch, length, channels), weight (channels, taps) and bias (channels,), "
            f"got {tuple(x.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if bidirectional and channels % 2:
        raise ValueError(f"causal_conv: two directions need an even number of channels, got {channels}")
    name = _backend_for(backend, x.device)
    with torch.autocast(x.device.type, enabled=False):
        if name != "triton":
            return _conv_torch(x, weight, bias, bidirectional)
        _require("triton", x.device)
        return _triton_conv(_rows(x), weight.float().contiguous(), bias.float(), bidirectional)


def _conv_torch(x: Tensor, weight: Tensor, bias: Tensor, bidirectional: bool) -> Tensor:
    """The filter as a sum of shifted sequences, one for each tap."""
    dtype, (channels, taps) = torch.promote_types(x.dtype, torch.float32), weight.shape
    weight, bias, length = weight.to(dtype), bias.to(dtype), x.shape[1]
    padded = F.pad(x.to(dtype), (0, 0, taps - 1, taps - 1))
    half = channels // 2 if bidirectional else channels
    forwards, backwards = padded.split([half, channels - half], dim=2)
    y = bias.expand(x.shape)
    for tap in range(taps):
        late = 2 * (taps - 1) - tap
        shifted = torch.cat([forwards[:, tap : tap + length], backwards[:, late : late + length]], dim=2)
        y = torch.addcmul(y, shifted, weight[:, tap])
    return F.silu(y).to(x.dtype)


def mamba_inner(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    bidirectional: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Mamba between its in_proj and its out_proj: convolution, step sizes, B and C from its output, gated scan.

    Args:
        xz: (batch, length, 2 · channels), input and gate as in_proj gives them.
        conv_weight, conv_bias: (channels, taps) and (channels,), see ``causal_conv``.
        x_proj: (rank + 2 · directions · d_state, channels); its output is [step sizes | B | C].
        dt_proj: (channels, rank); widens the step sizes.
        A, D, dt_bias: (channels, d_state), (channels,) and (channels,), see ``selective_scan``.
        bidirectional: the second half of the channels runs from the last token to the first.
        backend: as for ``selective_scan``.

    Returns:
        (batch, length, channels) in the dtype of ``xz``.

    Raises what ``causal_conv`` and ``selective_scan`` raise.
    """
    (channels, d_state), rank, directions = A.shape, dt_proj.shape[-1], 1 + bidirectional
    expected = {
        "xz": (xz, (*xz.shape[:2], 2 * channels)),
        "conv_weight": (conv_weight, (channels, conv_weight.shape[-1])),
        "conv_bias": (conv_bias, (channels,)),
        "x_proj": (x_proj, (rank + 2 * directions * d_state, channels)),
        "dt_proj": (dt_proj, (channels, rank)),
    }
    _expect("mamba_inner", expected)
    x_proj, dt_proj = x_proj.to(xz.dtype), dt_proj.to(xz.dtype)
    with torch.autocast(xz.device.type, enabled=False):
        if _backend_for(backend, xz.device) == "triton" and not triton_fault(xz.device) and xz.dtype != torch.float64:
            A, D, conv_weight, conv_bias, dt_bias = (t.float() for t in (A, D, conv_weight, conv_bias, dt_bias))
            inputs = (xz.contiguous(), conv_weight.contiguous(), conv_bias, x_proj, dt_proj, A, D, dt_bias)
            return _triton_inner(*inputs, bidirectional, _gradients_wanted(inputs))[0]
        x, z = xz.chunk(2, dim=-1)
        u = causal_conv(x, conv_weight, conv_bias, bidirectional, backend)
        delta, B, C = F.linear(u, x_proj).split([rank, directions * d_state, directions * d_state], dim=-1)
        if bidirectional:
            B, C = B.unflatten(-1, (2, d_state)), C.unflatten(-1, (2, d_state))
        delta = F.linear(delta, dt_proj)
        return selective_scan(u, delta, A, B, C, D, z, dt_bias, True, bidirectional, backend)


def _one_direction_at_a_time(scan):
    """Make a scan that walks forwards only do both directions, by flipping the second half of the channels."""

    def both(u, delta, A, B, C, D, z, delta_bias, delta_softplus, bidirectional) -> Tensor:
        if not bidirectional:
            return scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        half = u.shape[2] // 2
        ys = []
        for direction, channels in enumerate((slice(None, half), slice(half, None))):
            sequences = [None if t is None else t[..., channels] for t in (u, delta, z)]
            sequences += [B[:, :, direction], C[:, :, direction]]
            if direction:
                sequences = [None if t is None else t.flip(1) for t in sequences]
            parameters = [None if t is None else t[channels] for t in (A, D, delta_bias)]
            (u_, delta_, z_, B_, C_), (A_, D_, delta_bias_) = sequences, parameters
            y = scan(u_, delta_, A_, B_, C_, D_, z_, delta_bias_, delta_softplus)
            ys.append(y.flip(1) if direction else y)
        return torch.cat(ys, dim=2)

    return both


@_one_direction_at_a_time
def _scan_torch(u, delta, A, B, C, D, z, delta_bias, delta_softplus) -> Tensor:
    """The recurrence in plain PyTorch: any device, any float dtype, time and memory linear in length."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    u_, delta, A, B, C, D, z, delta_bias = (
        None if t is None else t.to(dtype) for t in (u, delta, A, B, C, D, z, delta_bias)
    )
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = F.softplus(delta)
    y = _ChunkedScan.apply(u_, delta, A, B, C)
    if D is not None:
        y = y + D * u_
    return (y if z is None else y * F.silu(z)).to(u.dtype)


@contextmanager
def _exact(device_type: str):
    """No TF32 and no autocast: the state is to be float32 to its last bit, in the backward pass too."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


class _ChunkedScan(torch.autograd.Function):
    """y_t = C_t h_t of the recurrence, in chunks of CHUNK steps.

    Within a chunk only h ← decay h + input is a loop over time; all else is done for the whole chunk at once. Kept for
    the backward pass are the states before each chunk: it computes a chunk's states again and walks them in reverse.
    """

    CHUNK = 16  # steps; a chunk of states should fit into the processor's cache

    @staticmethod
    def _states(u, delta, A, B, h):
        """Decays and states of a chunk, both (T, batch, channels, d_state), time first."""
        decay = torch.exp(delta.unsqueeze(-1) * A)
        states = (delta * u).unsqueeze(-1) * B.unsqueeze(2)
        for t in range(len(states)):
            h = states[t].addcmul_(decay[t], h)
        return decay, states

    @staticmethod
    def forward(ctx, u, delta, A, B, C):
        sequences = [t.transpose(0, 1).contiguous() for t in (u, delta, B, C)]
        h, starts, ys = u.new_zeros(u.shape[0], u.shape[2], A.shape[1]), [], [u.new_empty(0, u.shape[0], u.shape[2])]
        with _exact(u.device.type):
            for u_t, delta_t, B_t, C_t in zip(*(t.split(_ChunkedScan.CHUNK) for t in sequences)):
                if not len(u_t):
                    break  # an empty sequence is split into one empty chunk
                starts.append(h)
                _, states = _ChunkedScan._states(u_t, delta_t, A, B_t, h)
                h = states[-1].clone()
                ys.append((states @ C_t.unsqueeze(-1)).squeeze(-1))
        ctx.save_for_backward(*sequences, A, *starts)
        return torch.cat(ys).transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        u, delta, B, C, A, *starts = ctx.saved_tensors
        dy, dA, later = dy.transpose(0, 1), torch.zeros_like(A), 0.0  # later: what later steps send back to the state
        du, ddelta, dB, dC = (torch.empty_like(t) for t in (u, delta, B, C))
        with _exact(u.device.type):
            for i in reversed(range(len(starts))):
                chunk = slice(i * _ChunkedScan.CHUNK, (i + 1) * _ChunkedScan.CHUNK)
                u_t, delta_t, B_t, C_t, dy_t = (t[chunk] for t in (u, delta, B, C, dy))
                decay, states = _ChunkedScan._states(u_t, delta_t, A, B_t, starts[i])
                dh = dy_t.unsqueeze(-1) * C_t.unsqueeze(2)
                dh[-1] += later
                for t in range(len(dh) - 1, 0, -1):
                    dh[t - 1].addcmul_(decay[t], dh[t])
                later = decay[0] * dh[0]

                dC[chunk] = (dy_t.unsqueeze(2) @ states).squeeze(2)
                dB[chunk] = ((delta_t * u_t).unsqueeze(2) @ dh).squeeze(2)
                dinput = (dh @ B_t.unsqueeze(-1)).squeeze(-1)  # gradient of delta_t u_t
                dexponent = decay.mul_(dh)  # times h_{t-1}: gradient of delta_t A
                dexponent[0] *= starts[i]
                dexponent[1:] *= states[:-1]
                du[chunk] = dinput * delta_t
                ddelta[chunk] = dinput * u_t + (dexponent * A).sum(-1)
                dA += (dexponent * delta_t.unsqueeze(-1)).sum((0, 1))
        du, ddelta, dB, dC = (t.transpose(0, 1) for t in (du, ddelta, dB, dC))
        return du, ddelta, dA, dB, dC


@_one_direction_at_a_time
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


def _scan_triton(u, delta, A, B, C, D, z, delta_bias, delta_softplus, bidirectional) -> Tensor:
    """Both directions in one launch, forward and backward; see the kernels below."""
    _require("triton", u.device)
    if u.dtype == torch.float64:
        raise RuntimeError("scan backend triton: float64 is for the torch backend; the kernel's state is float32")
    if not bidirectional:
        B, C = B.unsqueeze(2), C.unsqueeze(2)
    u, delta, z, B, C = (None if t is None else _rows(t) for t in (u, delta, z, B, C))
    A, D, delta_bias = (None if t is None else t.float().contiguous() for t in (A, D, delta_bias))
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    return _triton_scan(*inputs, delta_softplus, _gradients_wanted(inputs))[0]


def _rows(t: Tensor) -> Tensor:
    """The kernels step through time and batch by strides, but read channels and states side by side."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _gradients_wanted(inputs: tuple) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


BACKENDS = {"torch": _scan_torch, "triton": _scan_triton, "mamba_ssm": _scan_mamba_ssm}
_chosen = {"backend": "auto"}
_faults: dict[str, str] = {}


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
    return _fault_of("triton", device, _try_triton)


def _fault_of(name: str, device: torch.device | str, probe) -> str:
    """What ``probe(device)`` says, asked once for a device."""
    key = f"{name} on {device}"
    if key not in _faults:
        _faults[key] = probe(torch.device(device))
    return _faults[key]


def _try_triton(device: torch.device) -> str:
    try:
        with torch.enable_grad():  # the first scan may be asked for where no gradients are
            x = torch.ones(1, 1, 1, device=device, requires_grad=True)
            A = torch.full((1, 1), -1.0, device=device)
            out, _states = _triton_scan(x, x, A, x[:, :, None], x[:, :, None], None, None, None, False, True)
            out.sum().backward()
        return "" if torch.isfinite(x.grad).all() else "Triton's kernels give wrong results on this GPU"
    except Exception as error:
        # No C compiler, a GPU older than the compiler knows, a driver that does not fit.
        return f"Triton's kernels do not run ({_first_line(error)}); they need a C compiler and a GPU from Volta on"


def mamba_ssm_fault(device: torch.device | str) -> str:
    """Say what keeps mamba-ssm's kernel from running on ``device`` and how to mend it; "" if it runs."""
    if torch.device(device).type != "cuda":
        return f"mamba-ssm runs on CUDA devices only, not on {torch.device(device).type}"
    return _fault_of("mamba_ssm", device, _try_mamba_ssm)


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


# ── Triton kernels ──────────────────────────────────────────────────────────────────────────────────────────────────
#
# One program, one warp, owns one image of the batch and COLUMNS channels of one direction, and walks through time one
# step after the other with their states, (BLOCK_N, COLUMNS), in registers. What a step reads is asked for some steps
# ahead, because a warp waits for memory longer than it computes.
#
# The forward pass keeps the state before every chunk of the backward pass, if there will be one. That repeats a chunk
# from there and keeps the states before groups of GROUP steps in a scratch of the program's own, small enough for the
# cache; from its end backwards it repeats each group, its states now in registers, and walks it in reverse.
#
# Nothing is accumulated with atomics: sums over channels (dB, dC) and over the batch (dA, dD, ddelta_bias) leave the
# kernel as partial sums and are added by PyTorch, so that gradients are the same at every run.

if triton is not None:
    LOG2_E = tl.constexpr(1.4426950408889634)

    @triton.jit
    def _softplus(x):
        """log(1 + eˣ), right to 2e-7 of its value also where that is small: a polynomial instead of the logarithm."""
        e = tl.exp(-tl.abs(x))  # in 0 … 1, where log(1 + e) = e p(e)
        p = 0.0198514480 - 0.0032440221 * e
        p = 0.1060365215 - e * (0.0569595098 - e * p)
        p = 0.1967593879 - e * (0.1530559063 - e * p)
        p = 0.3332996368 - e * (0.2495413423 - e * p)
        p = 1.0 - e * (0.4999990165 - e * p)
        return tl.maximum(x, 0.0) + e * p

    @triton.jit
    def _load(pointer, offsets, mask, MASKED: tl.constexpr):
        """Read; 0 where masked."""
        if MASKED:
            return tl.load(pointer + offsets, mask=mask, other=0.0)
        else:
            return tl.load(pointer + offsets)

    @triton.jit
    def _share(half, COLUMNS: tl.constexpr):
        """Of the first axis of the grid: direction, block of channels, and the channels within the direction."""
        blocks = tl.cdiv(half, COLUMNS)
        block = tl.program_id(0) % blocks
        return tl.program_id(0) // blocks, block, block * COLUMNS + tl.arange(0, COLUMNS)

    @triton.jit
    def _owned(half, d_state, one, COLUMNS: tl.constexpr, N: tl.constexpr):
        """What this program owns: direction, block of channels, image, channels (COLUMNS,), states (N,), and masks."""
        direction, block, inner = _share(half, COLUMNS)
        n = tl.arange(0, N)
        in_half, in_states = inner < half, n < d_state
        d = tl.max_contiguous((direction * half + inner) * one, COLUMNS)
        return direction, block, tl.program_id(1).to(tl.int64), d, n, in_half, in_states

    @triton.jit
    def _place(step, length, direction):
        """Place in the sequence of a direction's ``step``; beyond an end, the place at that end."""
        step = tl.maximum(tl.minimum(step, length - 1), 0)
        return step + direction * (length - 1 - 2 * step)

    @triton.jit
    def _read_step(u, delta, B, place, d, n, in_half, in_states, u_time, delta_time, B_time, MASKED: tl.constexpr):
        """u, delta (COLUMNS,) and B (N,) of one step, as they are stored."""
        u_t = _load(u, place * u_time + d, in_half, MASKED)
        delta_t = _load(delta, place * delta_time + d, in_half, MASKED)
        return u_t, delta_t, _load(B, place * B_time + n, in_states, MASKED)

    @triton.jit
    def _read_output_step(C, z, u_t, place, d, n, in_half, in_states, C_time, z_time, HAS_Z, MASKED: tl.constexpr):
        """C (N,) and z (COLUMNS,) of one step, as they are stored; without a gate, z is a stand-in."""
        z_t = _load(z, place * z_time + d, in_half, MASKED) if HAS_Z else u_t
        return _load(C, place * C_time + n, in_states, MASKED), z_t

    @triton.jit
    def _step_size(stored, bias, in_half, SOFTPLUS: tl.constexpr, MASKED: tl.constexpr):
        """The step size before and after the softplus; the latter is 0 for channels that are not there."""
        raw = stored.to(tl.float32) + bias
        delta_t = _softplus(raw) if SOFTPLUS else raw
        return raw, tl.where(in_half, delta_t, 0.0) if MASKED else delta_t

    @triton.jit
    def _decay(delta_t, A_nd):
        """exp(delta_t A); the step size takes log2 e, because A with it would be off by the same at every step."""
        return tl.exp2((delta_t * LOG2_E)[None, :] * A_nd)

    @triton.jit
    def _advance(h, read, bias, A_nd, in_half, SOFTPLUS: tl.constexpr, MASKED: tl.constexpr):
        """h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t"""
        u_t, stored, B_t = read
        _raw, delta_t = _step_size(stored, bias, in_half, SOFTPLUS, MASKED)
        written = (delta_t * u_t.to(tl.float32))[None, :] * B_t.to(tl.float32)[:, None]
        return _decay(delta_t, A_nd) * h + written

    @triton.jit(do_not_specialize=["one"])
    def _forward_kernel(
        u, delta, A, B, C, D, z, delta_bias, out, starts, one, length, half, d_state,
        u_batch, u_time, delta_batch, delta_time, z_batch, z_time, B_batch, B_time, B_group, C_batch, C_time, C_group,
        HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
        KEEP_EVERY: tl.constexpr, MASKED: tl.constexpr, DIRECTIONS: tl.constexpr,
        COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, AHEAD: tl.constexpr, UNROLL: tl.constexpr,
    ):  # fmt: skip
        # The compiler does not know that ``one`` is 1, so it gives neighbouring channels to neighbouring threads, all
        # states of a channel to one thread: the sum over states then needs no other thread.
        direction, _block, batch, d, n, in_half, in_states = _owned(half, d_state, one, COLUMNS, BLOCK_N)
        channels, here = DIRECTIONS * half, in_states[:, None] & in_half[None, :]
        A_nd = _load(A, n[:, None] * channels + d[None, :], here, MASKED)
        skip = _load(D, d, in_half, MASKED) if HAS_D else 0.0
        bias = _load(delta_bias, d, in_half, MASKED) if HAS_BIAS else 0.0
        u, delta = u + batch * u_batch, delta + batch * delta_batch
        B, C = B + batch * B_batch + direction * B_group, C + batch * C_batch + direction * C_group
        if HAS_Z:
            z += batch * z_batch
        out += batch * length * channels
        if KEEP_EVERY:
            starts += batch * tl.cdiv(length, KEEP_EVERY) * d_state * channels

        queue = ()  # what the next steps need, read ahead
        for ahead in tl.static_range(AHEAD):
            place = _place(ahead, length, direction)
            read = _read_step(u, delta, B, place, d, n, in_half, in_states, u_time, delta_time, B_time, MASKED)
            gate = _read_output_step(C, z, read[0], place, d, n, in_half, in_states, C_time, z_time, HAS_Z, MASKED)
            queue = queue + ((read, gate),)

        h = tl.zeros([BLOCK_N, COLUMNS], tl.float32)
        for step in tl.range(0, length, loop_unroll_factor=UNROLL):
            if KEEP_EVERY:
                if step % KEEP_EVERY == 0:
                    start = step // KEEP_EVERY * d_state * channels
                    tl.store(starts + start + n[:, None] * channels + d[None, :], h, mask=here)
            now, gate_now = queue[0]
            place = _place(step + AHEAD, length, direction)
            read = _read_step(u, delta, B, place, d, n, in_half, in_states, u_time, delta_time, B_time, MASKED)
            gate = _read_output_step(C, z, read[0], place, d, n, in_half, in_states, C_time, z_time, HAS_Z, MASKED)
            queue = queue[1:] + ((read, gate),)

            h = _advance(h, now, bias, A_nd, in_half, SOFTPLUS, MASKED)
            C_t, z_t = gate_now
            y = tl.sum(h * C_t.to(tl.float32)[:, None], 0)
            if HAS_D:
                y += skip * now[0].to(tl.float32)
            if HAS_Z:
                y *= z_t.to(tl.float32) * tl.sigmoid(z_t.to(tl.float32))
            place = _place(step, length, direction)
            tl.store(out + place * channels + d, y.to(out.dtype.element_ty), mask=in_half)

    @triton.jit
    def _backward_kernel(
        dout, u, delta, A, B, C, D, z, delta_bias, starts, scratch, du, ddelta, dz, dA, dB, dC, dD, ddelta_bias,
        batches, dout_batch, dout_time, dz_batch, dz_time, length, half, d_state,
        u_batch, u_time, delta_batch, delta_time, z_batch, z_time, B_batch, B_time, B_group, C_batch, C_time, C_group,
        HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
        MASKED: tl.constexpr, DIRECTIONS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr,
        CHUNK: tl.constexpr, GROUP: tl.constexpr, AHEAD: tl.constexpr, UNROLL: tl.constexpr,
    ):  # fmt: skip
        # Here neighbouring channels share a thread, since the sums over channels (dB, dC) cost most.
        direction, block, batch, d, n, in_half, in_states = _owned(half, d_state, 1, COLUMNS, BLOCK_N)
        channels, chunks, here = DIRECTIONS * half, tl.cdiv(length, CHUNK), in_states[:, None] & in_half[None, :]
        A_nd = _load(A, n[:, None] * channels + d[None, :], here, MASKED)
        skip = _load(D, d, in_half, MASKED) if HAS_D else 0.0
        bias = _load(delta_bias, d, in_half, MASKED) if HAS_BIAS else 0.0
        u, delta, dout = u + batch * u_batch, delta + batch * delta_batch, dout + batch * dout_batch
        B, C = B + batch * B_batch + direction * B_group, C + batch * C_batch + direction * C_group
        row = batch * length * channels
        du, ddelta = du + row, ddelta + row
        if HAS_Z:
            z, dz = z + batch * z_batch, dz + batch * dz_batch
        starts += batch * chunks * d_state * channels
        sums = (block * batches + batch) * length * DIRECTIONS * d_state + direction * d_state
        dB, dC = dB + sums, dC + sums
        SLOT: tl.constexpr = BLOCK_N * COLUMNS
        own = tl.arange(0, BLOCK_N)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        scratch += (batch * tl.num_programs(0) + tl.program_id(0)) * (CHUNK // GROUP) * SLOT

        dA_nd = tl.zeros([BLOCK_N, COLUMNS], tl.float32)
        dh = tl.zeros([BLOCK_N, COLUMNS], tl.float32)  # what later steps send back to the state
        h = tl.zeros([BLOCK_N, COLUMNS], tl.float32)  # after the step that is walked back
        dD_d = tl.zeros([COLUMNS], tl.float32)
        dbias_d = tl.zeros([COLUMNS], tl.float32)
        for back in range(chunks):
            first = (chunks - 1 - back) * CHUNK
            start = (chunks - 1 - back) * d_state * channels
            state = _load(starts, start + n[:, None] * channels + d[None, :], here, MASKED)
            tl.store(scratch + own, state)
            # Sums over time in two levels, within a chunk and over chunks: one chain would lose digits.
            dA_chunk = tl.zeros([BLOCK_N, COLUMNS], tl.float32)
            dD_chunk = tl.zeros([COLUMNS], tl.float32)
            dbias_chunk = tl.zeros([COLUMNS], tl.float32)

            # The chunk once more, as in the forward pass: the states before its groups of steps go to the scratch. The
            # state after it is known, except after the last chunk of all.
            size = CHUNK - GROUP
            if back == 0:
                size = length - first
            queue = ()
            for ahead in tl.static_range(AHEAD):
                place = _place(first + ahead, length, direction)
                queue = queue + (
                    _read_step(u, delta, B, place, d, n, in_half, in_states, u_time, delta_time, B_time, MASKED),
                )
            for step in tl.range(0, size, loop_unroll_factor=UNROLL):
                now = queue[0]
                place = _place(first + step + AHEAD, length, direction)
                queue = queue[1:] + (
                    _read_step(u, delta, B, place, d, n, in_half, in_states, u_time, delta_time, B_time, MASKED),
                )
                state = _advance(state, now, bias, A_nd, in_half, SOFTPLUS, MASKED)
                done = step + 1
                if (done % GROUP == 0) & (done < CHUNK):
                    tl.store(scratch + done // GROUP * SLOT + own, state)
            if back == 0:
                h = state
            tl.debug_barrier()

            groups = tl.cdiv(tl.minimum(CHUNK, length - first), GROUP)
            for back_group in range(groups):
                group = groups - 1 - back_group
                begin = first + group * GROUP
                steps = tl.minimum(GROUP, length - begin)
                place = _place(begin + steps - 1, length, direction)
                read = _read_step(u, delta, B, place, d, n, in_half, in_states, u_time, delta_time, B_time, MASKED)
                gate = _read_output_step(C, z, read[0], place, d, n, in_half, in_states, C_time, z_time, HAS_Z, MASKED)
                dy_read = _load(dout, place * dout_time + d, in_half, MASKED)

                # The states before each step of the group, in registers.
                state = tl.load(scratch + group * SLOT + own)
                states = (state,)
                for i in tl.static_range(GROUP - 1):
                    place = _place(begin + i, length, direction)
                    now = _read_step(u, delta, B, place, d, n, in_half, in_states, u_time, delta_time, B_time, MASKED)
                    state = _advance(state, now, bias, A_nd, in_half, SOFTPLUS, MASKED)
                    states = states + (state,)
                for _beyond in range(GROUP - steps):
                    states = (states[0],) + states[: GROUP - 1]

                for back_step in range(steps):
                    step = begin + steps - 1 - back_step
                    earlier_h = states[GROUP - 1]
                    states = (states[0],) + states[: GROUP - 1]
                    u_t, B_t, C_t = read[0].to(tl.float32), read[2].to(tl.float32), gate[0].to(tl.float32)
                    z_t, dy = gate[1].to(tl.float32), dy_read.to(tl.float32)
                    raw, delta_t = _step_size(read[1], bias, in_half, SOFTPLUS, MASKED)
                    # The step before, read a step ahead.
                    place = _place(step - 1, length, direction)
                    read = _read_step(u, delta, B, place, d, n, in_half, in_states, u_time, delta_time, B_time, MASKED)
                    gate = _read_output_step(
                        C, z, read[0], place, d, n, in_half, in_states, C_time, z_time, HAS_Z, MASKED
                    )
                    dy_read = _load(dout, place * dout_time + d, in_half, MASKED)
                    place = _place(step, length, direction)

                    # Through the gate and the skip.
                    if HAS_Z:
                        y = tl.sum(h * C_t[:, None], 0)
                        if HAS_D:
                            y += skip * u_t
                        open_z = tl.sigmoid(z_t)
                        dz_t = dy * y * open_z * (1 + z_t * (1 - open_z))
                        tl.store(dz + place * dz_time + d, dz_t.to(dz.dtype.element_ty), mask=in_half)
                        dy *= z_t * open_z
                    if HAS_D:
                        dD_chunk += dy * u_t

                    # Through the state: h_t = decay_t h_{t-1} + delta_t u_t B_t, y_t = C_t h_t.
                    dh += C_t[:, None] * dy[None, :]
                    dwritten = tl.sum(dh * B_t[:, None], 0)  # gradient of delta_t u_t
                    dB_t = tl.sum(dh * (delta_t * u_t)[None, :], 1)
                    dC_t = tl.sum(h * dy[None, :], 1)
                    tl.store(dB + place * (DIRECTIONS * d_state) + n, dB_t, mask=in_states)
                    tl.store(dC + place * (DIRECTIONS * d_state) + n, dC_t, mask=in_states)
                    dh *= _decay(delta_t, A_nd)
                    dexponent = dh * earlier_h  # gradient of delta_t A
                    ddelta_t = dwritten * u_t + tl.sum(dexponent * A_nd, 0)
                    dA_chunk += dexponent * delta_t[None, :]
                    if SOFTPLUS:
                        ddelta_t *= tl.sigmoid(raw)
                    if HAS_BIAS:
                        dbias_chunk += tl.where(in_half, ddelta_t, 0.0) if MASKED else ddelta_t
                    tl.store(ddelta + place * channels + d, ddelta_t.to(ddelta.dtype.element_ty), mask=in_half)
                    du_t = dwritten * delta_t
                    if HAS_D:
                        du_t += skip * dy
                    tl.store(du + place * channels + d, du_t.to(du.dtype.element_ty), mask=in_half)
                    h = earlier_h
            dA_nd += dA_chunk
            dD_d += dD_chunk
            dbias_d += dbias_chunk
            tl.debug_barrier()

        # Sums over this image's time; (batch, ...).
        tl.store(dA + (batch * d_state + n[:, None]) * channels + d[None, :], dA_nd, mask=here)
        if HAS_D:
            tl.store(dD + batch * channels + d, dD_d, mask=in_half)
        if HAS_BIAS:
            tl.store(ddelta_bias + batch * channels + d, dbias_d, mask=in_half)

    # Channels of a program, steps read ahead and unrolled; steps of a chunk, and of a group whose states fit into the
    # registers. Found by measuring (benchmarks/NOTES.md).
    FORWARD = {"COLUMNS": 64, "AHEAD": 2, "UNROLL": 2}
    BACKWARD = {"COLUMNS": 32, "AHEAD": 2, "UNROLL": 2, "CHUNK": 16, "GROUP": 4}

    def _sizes(u: Tensor, A: Tensor, B: Tensor, sizes: dict) -> tuple[int, int, int]:
        """Channels of a direction, blocks of them, and the states padded to a power of two."""
        half = u.shape[2] // B.shape[2]
        return half, triton.cdiv(half, sizes["COLUMNS"]), triton.next_power_of_2(A.shape[1])

    def _launch(kernel, before, inputs, after, softplus, sizes, **flags):
        """Run a kernel with one warp for every image, direction and block of channels."""
        u, delta, A, B, C, D, z, delta_bias = inputs
        if not u.numel():
            return
        (batch, length, _), directions, d_state = u.shape, B.shape[2], A.shape[1]
        half, blocks, block_n = _sizes(u, A, B, sizes)
        strides = [s for t in (u, delta, u if z is None else z) for s in t.stride()[:2]]
        strides += [s for t in (B, C) for s in t.stride()[:3]]
        # A as (d_state, channels): neighbouring channels lie side by side.
        kernel[blocks * directions, batch](
            *before, u, delta, A.t().contiguous(), *inputs[3:], *after, length, half, d_state, *strides,
            HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=softplus,
            MASKED=half % sizes["COLUMNS"] != 0 or block_n != d_state, DIRECTIONS=directions, BLOCK_N=block_n,
            num_warps=1, **sizes, **flags,
        )  # fmt: skip

    def _room_for(t: Tensor | None, like: Tensor) -> Tensor:
        """Room for the gradient of an input that may be missing (custom operators return tensors only)."""
        return like.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)

    def _kept_states(u: Tensor, A: Tensor, keep: bool) -> Tensor:
        """Room for the state before every chunk of the backward pass: (batch, chunks, d_state, channels)."""
        batch, length, channels = u.shape
        return A.new_empty(batch, triton.cdiv(length, BACKWARD["CHUNK"]) if keep else 0, A.shape[1], channels)

    def _scan_forward(inputs, softplus: bool, keep: bool) -> tuple[Tensor, Tensor]:
        """The output, and the states that ``_scan_backward`` wants if ``keep``."""
        u, _, A, *_ = inputs
        out, starts = torch.empty_like(u, memory_format=torch.contiguous_format), _kept_states(u, A, keep)
        every = BACKWARD["CHUNK"] if keep else 0
        _launch(_forward_kernel, (), inputs, (out, starts, 1), softplus, FORWARD, KEEP_EVERY=every)
        return out, starts

    def _scan_backward(dout: Tensor, starts: Tensor, inputs, softplus: bool, dz: Tensor) -> tuple[Tensor, ...]:
        """Gradients of u, delta (their dtype), A, B, C, D and delta_bias (float32); that of z goes to ``dz``."""
        u, delta, A, B, _C, D, _z, delta_bias = inputs
        batch, _, channels = u.shape
        du, ddelta = (_room_for(t, u) for t in (u, delta))
        _, blocks, block_n = _sizes(u, A, B, BACKWARD)
        new = A.new_empty if u.numel() else A.new_zeros  # without input no kernel runs to fill them
        dA, dB, dC = new(batch, A.shape[1], channels), new(blocks, *B.shape), new(blocks, *B.shape)
        dD, dbias = (new(batch, 0 if t is None else channels) for t in (D, delta_bias))
        groups = BACKWARD["CHUNK"] // BACKWARD["GROUP"]
        scratch = A.new_empty(batch * blocks * B.shape[2] * groups * BACKWARD["COLUMNS"] * block_n)
        strides = (*dout.stride()[:2], *(dz.stride()[:2] if dz.numel() else (0, 0)))
        after = (starts, scratch, du, ddelta, dz, dA, dB, dC, dD, dbias, batch, *strides)
        _launch(_backward_kernel, (dout,), inputs, after, softplus, BACKWARD)
        return du, ddelta, dA.sum(0).t().contiguous(), dB.sum(0), dC.sum(0), dD.sum(0), dbias.sum(0)

    INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias"
    GRADIENTS = ", ".join(["Tensor"] * 8)

    @torch.library.custom_op(
        "mamba_ginr::selective_scan",
        mutates_args=(),
        schema=f"({INPUTS}, bool softplus, bool keep) -> (Tensor, Tensor)",
    )
    def _triton_scan(u, delta, A, B, C, D, z, delta_bias, softplus, keep):
        return _scan_forward((u, delta, A, B, C, D, z, delta_bias), softplus, keep)

    @torch.library.custom_op(
        "mamba_ginr::selective_scan_backward",
        mutates_args=(),
        schema=f"(Tensor dout, Tensor starts, {INPUTS}, bool softplus) -> ({GRADIENTS})",
    )
    def _triton_scan_backward(dout, starts, u, delta, A, B, C, D, z, delta_bias, softplus):
        dz = _room_for(z, u)
        inputs = (u, delta, A, B, C, D, z, delta_bias)
        du, ddelta, dA, dB, dC, dD, dbias = _scan_backward(dout, starts, inputs, softplus, dz)
        return du, ddelta, dA, dB.to(B.dtype), dC.to(C.dtype), dD, dz, dbias

    @_triton_scan.register_fake
    def _(u, delta, A, B, C, D, z, delta_bias, softplus, keep):
        return torch.empty_like(u, memory_format=torch.contiguous_format), _kept_states(u, A, keep)

    @_triton_scan_backward.register_fake
    def _(dout, starts, u, delta, A, B, C, D, z, delta_bias, softplus):
        return tuple(_room_for(t, u) for t in (u, delta, A, B, C, D, z, delta_bias))

    def _save_inputs(ctx, inputs, output) -> None:
        """For operators that take (tensors ..., a flag, keep) and return (y, the kept states)."""
        *tensors, ctx.flag, _keep = inputs
        ctx.save_for_backward(output[1], *tensors)
        ctx.set_materialize_grads(False)

    def _gradients(ctx, dout: Tensor, _dstarts):
        starts, *tensors = ctx.saved_tensors
        gradients = _triton_scan_backward(_rows(dout), starts, *tensors, ctx.flag)
        return *(None if t is None else g for t, g in zip(tensors, gradients)), None, None

    _triton_scan.register_autograd(_gradients, setup_context=_save_inputs)

    # ── The short convolution ───────────────────────────────────────────────────────────────────────────────────────
    #
    # One program owns COLUMNS channels of one image and one direction and walks through TOKENS steps, with the last
    # TAPS - 1 inputs in registers. Each value is read once; the backward pass walks TAPS - 1 steps into the next
    # program's part, because a token's gradient comes from the tokens after it.

    @triton.jit
    def _conv_part(half, COLUMNS: tl.constexpr, TOKENS: tl.constexpr):
        """Direction, image, number of this part among all, channels and whether they are there, first step."""
        direction, _block, inner = _share(half, COLUMNS)
        batch = tl.program_id(2).to(tl.int64)
        part = batch * tl.num_programs(1) + tl.program_id(1)
        return direction, batch, part, direction * half + inner, inner < half, tl.program_id(1) * TOKENS

    @triton.jit
    def _read_row(x, step, length, direction, x_time, d, in_half):
        """Channels at a direction's ``step``, zero outside the sequence."""
        inside = in_half & (step >= 0) & (step < length)
        return tl.load(x + _place(step, length, direction) * x_time + d, mask=inside, other=0.0).to(tl.float32)

    @triton.jit
    def _taps(weight, d, in_half, TAPS: tl.constexpr):
        """The filter, newest token first."""
        taps = ()
        for back in tl.static_range(TAPS):
            taps = taps + (tl.load(weight + d * TAPS + (TAPS - 1 - back), mask=in_half, other=0.0),)
        return taps

    @triton.jit
    def _window(x, first, length, direction, x_time, d, in_half, TAPS: tl.constexpr):
        """The TAPS - 1 inputs before step ``first``, newest first."""
        window = ()
        for back in tl.static_range(1, TAPS):
            window = window + (_read_row(x, first - back, length, direction, x_time, d, in_half),)
        return window

    @triton.jit
    def _filter(taps, window, bias_d, TAPS: tl.constexpr):
        """The sum before the SiLU."""
        total = bias_d
        for back in tl.static_range(TAPS):
            total += taps[back] * window[back]
        return total

    @triton.jit
    def _conv_forward_kernel(
        x, weight, bias, out, length, half, channels, x_batch, x_time,
        TAPS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, UNROLL: tl.constexpr,
    ):  # fmt: skip
        direction, batch, _part, d, in_half, first = _conv_part(half, COLUMNS, TOKENS)
        x, out = x + batch * x_batch, out + batch * length * channels
        taps, bias_d = _taps(weight, d, in_half, TAPS), tl.load(bias + d, mask=in_half, other=0.0)
        window = _window(x, first, length, direction, x_time, d, in_half, TAPS)
        for step in tl.range(first, tl.minimum(first + TOKENS, length), loop_unroll_factor=UNROLL):
            window = (_read_row(x, step, length, direction, x_time, d, in_half),) + window
            total = _filter(taps, window, bias_d, TAPS)
            window = window[: TAPS - 1]
            y = total * tl.sigmoid(total)
            tl.store(out + _place(step, length, direction) * channels + d, y.to(out.dtype.element_ty), mask=in_half)

    @triton.jit
    def _conv_backward_kernel(
        dout, x, weight, bias, dx, dweight, dbias, length, half, channels,
        dout_batch, dout_time, x_batch, x_time, dx_batch, dx_time,
        TAPS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, UNROLL: tl.constexpr,
    ):  # fmt: skip
        direction, batch, part, d, in_half, first = _conv_part(half, COLUMNS, TOKENS)
        x, dout, dx = x + batch * x_batch, dout + batch * dout_batch, dx + batch * dx_batch
        taps, bias_d = _taps(weight, d, in_half, TAPS), tl.load(bias + d, mask=in_half, other=0.0)
        zero = tl.zeros([COLUMNS], tl.float32)
        window, dbias_d = _window(x, first, length, direction, x_time, d, in_half, TAPS), zero
        dtotals, dtaps = (), (zero,)
        for _back in tl.static_range(1, TAPS):
            dtotals, dtaps = dtotals + (zero,), dtaps + (zero,)
        end = tl.minimum(first + TOKENS, length)
        for step in tl.range(first, end + TAPS - 1, loop_unroll_factor=UNROLL):
            window = (_read_row(x, step, length, direction, x_time, d, in_half),) + window
            total = _filter(taps, window, bias_d, TAPS)
            gate = tl.sigmoid(total)
            dy = _read_row(dout, step, length, direction, dout_time, d, in_half)
            dtotal = dy * gate * (1 + total * (1 - gate))
            # Of the sum before the SiLU at this step and the TAPS - 1 before, newest first.
            dtotals = (dtotal,) + dtotals
            own = tl.where(step < end, dtotal, 0.0)
            dbias_d += own
            sums, dx_t = (), zero
            for back in tl.static_range(TAPS):
                sums = sums + (dtaps[back] + own * window[back],)
                dx_t += taps[TAPS - 1 - back] * dtotals[back]
            window, dtotals, dtaps = window[: TAPS - 1], dtotals[: TAPS - 1], sums
            to = step - (TAPS - 1)
            mask = in_half & (to >= first)
            tl.store(dx + _place(to, length, direction) * dx_time + d, dx_t.to(dx.dtype.element_ty), mask=mask)
        tl.store(dbias + part * channels + d, dbias_d, mask=in_half)
        for back in tl.static_range(TAPS):
            tl.store(dweight + (part * channels + d) * TAPS + (TAPS - 1 - back), dtaps[back], mask=in_half)

    CONV = {"COLUMNS": 128, "TOKENS": 64, "UNROLL": 4}

    def _launch_conv(kernel, x, weight, bidirectional, tensors, *strided):
        (batch, length, channels), half = x.shape, x.shape[2] // (2 if bidirectional else 1)
        if x.numel():
            grid = (triton.cdiv(half, CONV["COLUMNS"]) * (channels // half), triton.cdiv(length, CONV["TOKENS"]), batch)
            strides = [stride for t in strided for stride in t.stride()[:2]]
            kernel[grid](*tensors, length, half, channels, *strides, TAPS=weight.shape[1], num_warps=1, **CONV)

    def _conv_forward(x, weight, bias, both) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        _launch_conv(_conv_forward_kernel, x, weight, both, (x, weight, bias, out), x)
        return out

    def _conv_backward(dout, x, weight, bias, both, dx) -> tuple[Tensor, Tensor]:
        """Gradients of weight and bias; that of x goes to ``dx``."""
        parts = x.shape[0] * triton.cdiv(x.shape[1], CONV["TOKENS"])
        dweight, dbias = weight.new_empty(parts, *weight.shape), bias.new_empty(parts, *bias.shape)
        tensors = (dout, x, weight, bias, dx, dweight, dbias)
        _launch_conv(_conv_backward_kernel, x, weight, both, tensors, dout, x, dx)
        return dweight.sum(0), dbias.sum(0)

    @torch.library.custom_op(
        "mamba_ginr::causal_conv", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor bias, bool both) -> Tensor"
    )
    def _triton_conv(x, weight, bias, both):
        return _conv_forward(x, weight, bias, both)

    @torch.library.custom_op(
        "mamba_ginr::causal_conv_backward",
        mutates_args=(),
        schema="(Tensor dout, Tensor x, Tensor weight, Tensor bias, bool both) -> (Tensor, Tensor, Tensor)",
    )
    def _triton_conv_backward(dout, x, weight, bias, both):
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        return dx, *_conv_backward(dout, x, weight, bias, both, dx)

    @_triton_conv.register_fake
    def _(x, weight, bias, both):
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @_triton_conv_backward.register_fake
    def _(dout, x, weight, bias, both):
        return _room_for(x, x), torch.empty_like(weight), torch.empty_like(bias)

    def _save_conv_inputs(ctx, inputs, output) -> None:
        *tensors, ctx.both = inputs
        ctx.save_for_backward(*tensors)

    def _conv_gradients(ctx, dout: Tensor):
        return *_triton_conv_backward(_rows(dout), *ctx.saved_tensors, ctx.both), None

    _triton_conv.register_autograd(_conv_gradients, setup_context=_save_conv_inputs)

    # ── All between in_proj and out_proj ────────────────────────────────────────────────────────────────────────────
    #
    # One operator, so that the backward pass can compute the convolution and the step sizes again instead of keeping
    # them, and write the gradients of both halves of xz where in_proj's backward wants them.

    def _inner_parts(xz, conv_weight, conv_bias, x_proj, dt_proj, A, both):
        """Input x of the convolution; inputs of the scan u, delta, B, C, z; the small projection that holds B and C."""
        x, z = xz.chunk(2, dim=-1)
        u = _conv_forward(x, conv_weight, conv_bias, both)
        small, rank = u @ x_proj.t(), dt_proj.shape[1]
        B, C = small[..., rank:].unflatten(-1, (2, -1, A.shape[1])).unbind(2)
        return x, u, small[..., :rank] @ dt_proj.t(), B, C, z, small

    WEIGHTS = (
        "Tensor conv_weight, Tensor conv_bias, Tensor x_proj, Tensor dt_proj, "
        "Tensor A, Tensor D, Tensor dt_bias, bool both"
    )

    @torch.library.custom_op(
        "mamba_ginr::inner", mutates_args=(), schema=f"(Tensor xz, {WEIGHTS}, bool keep) -> (Tensor, Tensor)"
    )
    def _triton_inner(xz, conv_weight, conv_bias, x_proj, dt_proj, A, D, dt_bias, both, keep):
        _x, u, delta, B, C, z, _small = _inner_parts(xz, conv_weight, conv_bias, x_proj, dt_proj, A, both)
        return _scan_forward((u, delta, A, B, C, D, z, dt_bias), True, keep)

    @torch.library.custom_op(
        "mamba_ginr::inner_backward",
        mutates_args=(),
        schema=f"(Tensor dy, Tensor starts, Tensor xz, {WEIGHTS}) -> ({GRADIENTS})",
    )
    def _triton_inner_backward(dy, starts, xz, conv_weight, conv_bias, x_proj, dt_proj, A, D, dt_bias, both):
        x, u, delta, B, C, z, small = _inner_parts(xz, conv_weight, conv_bias, x_proj, dt_proj, A, both)
        dxz, dsmall, rank = torch.empty_like(xz), torch.empty_like(small), dt_proj.shape[1]
        dx, dz = dxz.chunk(2, dim=-1)
        scan = (u, delta, A, B, C, D, z, dt_bias)
        du, ddelta, dA, dB, dC, dD, dbias = _scan_backward(dy, starts, scan, True, dz)
        dsmall[..., :rank] = ddelta @ dt_proj
        dsmall[..., rank:].unflatten(-1, (2, *B.shape[2:])).copy_(torch.stack([dB, dC], dim=2))
        rows, wide = dsmall.flatten(0, 1), du.flatten(0, 1)
        dx_proj = rows.t() @ u.flatten(0, 1)
        ddt_proj = ddelta.flatten(0, 1).t() @ small.flatten(0, 1)[:, :rank]
        wide.addmm_(rows, x_proj)
        dconv_weight, dconv_bias = _conv_backward(du, x, conv_weight, conv_bias, both, dx)
        return dxz, dconv_weight, dconv_bias, dx_proj, ddt_proj, dA, dD, dbias

    @_triton_inner.register_fake
    def _(xz, conv_weight, conv_bias, x_proj, dt_proj, A, D, dt_bias, both, keep):
        y = xz.new_empty(*xz.shape[:2], xz.shape[2] // 2)
        return y, _kept_states(y, A, keep)

    @_triton_inner_backward.register_fake
    def _(dy, starts, xz, conv_weight, conv_bias, x_proj, dt_proj, A, D, dt_bias, both):
        return tuple(torch.empty_like(t) for t in (xz, conv_weight, conv_bias, x_proj, dt_proj, A, D, dt_bias))

    def _inner_gradients(ctx, dy: Tensor, _dstarts):
        return *_triton_inner_backward(_rows(dy), *ctx.saved_tensors, ctx.flag), None, None

    _triton_inner.register_autograd(_inner_gradients, setup_context=_save_inputs)
