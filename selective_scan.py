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
    name = backend_for(backend, u.device)
    # Autocast would turn the read-out of the state into a bfloat16 product.
    with torch.autocast(u.device.type, enabled=False):
        return BACKENDS[name](u, delta, A, B, C, D, z, delta_bias, delta_softplus, bidirectional)


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
    name = backend_for(backend, x.device)
    with torch.autocast(x.device.type, enabled=False):
        if name != "triton":
            return _conv_torch(x, weight, bias, bidirectional)
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
        if backend_for(backend, xz.device) == "triton" and xz.dtype != torch.float64:
            A, D, conv_weight, conv_bias, dt_bias = (t.float() for t in (A, D, conv_weight, conv_bias, dt_bias))
            inputs = (xz.contiguous(), conv_weight.contiguous(), conv_bias, x_proj, dt_proj, A, D, dt_bias)
            return _triton_inner(*inputs, bidirectional, gradients_wanted(inputs))[0]
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
    selective_scan_fn = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    delta, B, C = (t.to(u.dtype).transpose(1, 2) for t in (delta, B, C))
    z = None if z is None else z.to(u.dtype).transpose(1, 2)
    A, D, delta_bias = (None if t is None else t.float() for t in (A, D, delta_bias))
    y = selective_scan_fn(
        u.transpose(1, 2), delta, A, B, C, D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus
    )
    return y.transpose(1, 2)


def _scan_triton(u, delta, A, B, C, D, z, delta_bias, delta_softplus, bidirectional) -> Tensor:
    """Both directions in one launch, forward and backward; see the kernels below."""
    if u.dtype == torch.float64:
        raise RuntimeError("scan backend triton: float64 is for the torch backend; the kernel's state is float32")
    if not bidirectional:
        B, C = B.unsqueeze(2), C.unsqueeze(2)
    u, delta, z, B, C = (None if t is None else _rows(t) for t in (u, delta, z, B, C))
    A, D, delta_bias = (None if t is None else t.float().contiguous() for t in (A, D, delta_bias))
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    return _triton_scan(*inputs, delta_softplus, gradients_wanted(inputs))[0]


def _rows(t: Tensor) -> Tensor:
    """The kernels step through time and batch by strides, but read channels and states side by side."""
    return t if t.stride(-1) == 1 else t.contiguous()


def gradients_wanted(inputs: tuple) -> bool:
    """Whether what a backward pass wants is to be kept."""
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
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    key = f"{name} on {device}"
    if key not in _faults:
        _faults[key] = probe(device)
    return _faults[key]


def _try_triton(device: torch.device) -> str:
    try:
        with torch.enable_grad():  # the first scan may be asked for where no gradients are
            # Of the kind that the model asks for, so that nothing is compiled in vain.
            x = torch.ones(1, 16, 64, device=device, dtype=torch.float16, requires_grad=True)
            A, D = torch.full((64, 16), -1.0, device=device), torch.ones(64, device=device)
            B = x[..., :32].unflatten(-1, (2, 16))
            out, _states = _triton_scan(x, x, A, B, B, D, x, D, True, True)
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
# One program, one warp, owns one image of the batch and COLUMNS channels of one direction, one to a thread. It takes
# time in chunks of CHUNK steps and, within a chunk, one state after the other: all that a state needs for the steps of
# a chunk then lies in registers, and only the state itself goes to memory between chunks. Inputs are read as tiles
# (steps, channels) and cut into one tensor (channels,) for each step, which is free where a thread holds a channel.
#
# The forward pass keeps the states after every chunk, if there will be a backward pass. That starts from them: it walks
# through a chunk once more, its states and decays now in registers, and back.
#
# A warp waits longer for memory than it computes, and a load does not pass a store: what comes next, state or chunk,
# is asked for before the present one is worked on.
#
# Nothing is accumulated with atomics: sums over channels (dB, dC) and over the batch (dA, dD, ddelta_bias) leave the
# kernel as partial sums and are added afterwards, so that gradients are the same at every run.

if triton is not None:
    LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)

    # By so much is the exponent of a GPU's approximate 2ˣ too small on average where x is near 0, as in a long memory.
    EXP2_SHORT = tl.constexpr(1.4e-8)

    @triton.jit
    def _softplus(x):
        """log(1 + eˣ), right to about 1e-6 of its value down to x = −20: a polynomial instead of the logarithm."""
        e = tl.exp2(tl.abs(x) * -LOG2_E)  # in 0 … 1, where log(1 + e) = e p(e)
        p = 0.0198514480 - 0.0032440221 * e
        p = 0.1060365215 - e * (0.0569595098 - e * p)
        p = 0.1967593879 - e * (0.1530559063 - e * p)
        p = 0.3332996368 - e * (0.2495413423 - e * p)
        p = 1.0 - e * (0.4999990165 - e * p)
        return tl.maximum(x, 0.0) + e * p

    @triton.jit
    def _sigmoid(x):
        """1 / (1 + e⁻ˣ) without tl.sigmoid's care for subnormal numbers; a root takes fewer instructions than 1 / x."""
        root = tl.rsqrt(1 + tl.exp2(x * -LOG2_E))
        return root * root

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
    def _owned(
        half, D, delta_bias,
        HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, MASKED: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """What a program of the scan owns: direction, block, channels and whether they are there, their D and bias."""
        direction, block, inner = _share(half, COLUMNS)
        in_half, d = inner < half, direction * half + inner
        zero = tl.zeros([COLUMNS], tl.float32)
        skip = _load(D, d, in_half, MASKED) if HAS_D else zero
        bias = _load(delta_bias, d, in_half, MASKED) if HAS_BIAS else zero
        return direction, block, d, in_half, skip, bias

    @triton.jit
    def _place(step, length, direction):
        """Place in the sequence of a direction's ``step``; beyond an end, the place at that end."""
        step = tl.maximum(tl.minimum(step, length - 1), 0)
        return step + direction * (length - 1 - 2 * step)

    @triton.jit
    def _halves_of(tensors, COUNT: tl.constexpr):
        """Cut every tensor (channels, 2 COUNT) into its first and its last COUNT columns."""
        halves = ()
        for i in tl.static_range(len(tensors)):
            pair = tl.reshape(tensors[i], (tensors[i].shape[0], 2, COUNT))
            first, last = tl.split(tl.permute(pair, (0, 2, 1)))
            halves = halves + (first, last)
        return halves

    @triton.jit
    def _pairs_of(tensors):
        """Put tensors (channels, count) side by side, two and two: half as many (channels, 2 count)."""
        pairs = ()
        for i in tl.static_range(len(tensors) // 2):
            both = tl.permute(tl.join(tensors[2 * i], tensors[2 * i + 1]), (0, 2, 1))
            pairs = pairs + (tl.reshape(both, (both.shape[0], 2 * both.shape[2])),)
        return pairs

    @triton.jit
    def _rows_of(tile):
        """Cut a tile (16 or 32, channels) into its rows (channels,)."""
        columns = (tl.trans(tile),)
        if tile.shape[0] == 32:
            columns = _halves_of(columns, 16)
        columns = _halves_of(_halves_of(_halves_of(_halves_of(columns, 8), 4), 2), 1)
        rows = ()
        for i in tl.static_range(len(columns)):
            rows = rows + (tl.reshape(columns[i], (columns[i].shape[0],)),)
        return rows

    @triton.jit
    def _tile_of(rows):
        """Undo ``_rows_of``."""
        columns = ()
        for i in tl.static_range(len(rows)):
            columns = columns + (tl.reshape(rows[i], (rows[i].shape[0], 1)),)
        columns = _pairs_of(_pairs_of(_pairs_of(_pairs_of(columns))))
        if len(rows) == 32:
            columns = _pairs_of(columns)
        return tl.trans(columns[0])

    @triton.jit
    def _sum_of(rows):
        """Sum of 16 or 32 tensors, two and two."""
        for _level in tl.static_range(4 if len(rows) == 16 else 5):
            sums = ()
            for i in tl.static_range(len(rows) // 2):
                sums = sums + (rows[2 * i] + rows[2 * i + 1],)
            rows = sums
        return rows[0]

    @triton.jit
    def _add(total, lost, term):
        """Add to a long sum, with what the last addition lost (Kahan): the sum, and what is lost now."""
        term -= lost
        larger = total + term
        return larger, (larger - total) - term

    @triton.jit
    def _zeros_like(rows):
        zeros = ()
        for i in tl.static_range(len(rows)):
            zeros = zeros + (tl.zeros_like(rows[i]),)
        return zeros

    @triton.jit
    def _places(chunk, length, direction, in_half, CHUNK: tl.constexpr):
        """Of a chunk: places of its steps in the sequence (CHUNK, 1); which channels of which steps are there."""
        step = chunk * CHUNK + tl.arange(0, CHUNK)[:, None]
        return _place(step, length, direction), (step < length) & in_half[None, :]

    @triton.jit
    def _read_tile(rows, row_time, chunk, length, direction, in_half, MASKED: tl.constexpr, CHUNK: tl.constexpr):
        """The program's channels at the steps of a chunk, as they are stored (CHUNK, COLUMNS); nothing of use before
        the first chunk and after the last."""
        place, there = _places(chunk, length, direction, in_half, CHUNK)
        return _load(rows, place * row_time, there, MASKED)

    @triton.jit
    def _read_inputs(
        u, delta, z, dout, chunk, length, direction, in_half, u_time, delta_time, z_time, dout_time,
        HAS_Z: tl.constexpr, MASKED: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        """What the backward pass reads of a chunk: u, delta, z and dout; without a gate, z is a stand-in."""
        u_tile = _read_tile(u, u_time, chunk, length, direction, in_half, MASKED, CHUNK)
        delta_tile = _read_tile(delta, delta_time, chunk, length, direction, in_half, MASKED, CHUNK)
        z_tile = _read_tile(z, z_time, chunk, length, direction, in_half, MASKED, CHUNK) if HAS_Z else u_tile
        dout_tile = _read_tile(dout, dout_time, chunk, length, direction, in_half, MASKED, CHUNK)
        return u_tile, delta_tile, z_tile, dout_tile

    @triton.jit
    def _read_state(A, before, pairs, n, chunk, d_state, channels, in_half, CHUNK: tl.constexpr):
        """Of a state: A, the state before the chunk, B and C within; 0 if there is no such state."""
        there = in_half & (n < d_state)
        A_n = tl.load(A + n * channels, mask=there, other=0.0)
        h = tl.load(before + n * channels, mask=there & (chunk > 0), other=0.0)
        return A_n, h, tl.load(pairs + n * (2 * CHUNK), mask=n < d_state, other=0.0)

    @triton.jit
    def _step(u_i, raw, bias, there, SOFTPLUS: tl.constexpr, MASKED: tl.constexpr):
        """Of a step: delta log2 e and delta u, with delta after the softplus, 0 where nothing is."""
        delta_i = raw.to(tl.float32) + bias
        if SOFTPLUS:
            delta_i = _softplus(delta_i)
        if MASKED:
            delta_i = tl.where(there, delta_i, 0.0)
        # log2 e goes to the step sizes, because A with it would be off by the same at every step.
        return delta_i * LOG2_E, delta_i * u_i.to(tl.float32)

    @triton.jit
    def _spread(pair, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
        """B and C of a state at the steps of a chunk, from one number in each thread to all numbers in all threads."""
        rows = _rows_of(tl.broadcast_to(pair[:, None], (2 * CHUNK, COLUMNS)))
        return rows[:CHUNK], rows[CHUNK:]

    @triton.jit
    def _pack_kernel(
        B, C, pairs, length, chunks, d_state, B_batch, B_time, B_group, C_batch, C_time, C_group,
        BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        """B and C, in float32, of a state and a chunk side by side, in the order of a direction's steps."""
        chunk, direction, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        i, n = tl.arange(0, CHUNK)[:, None], tl.arange(0, BLOCK_N)[None, :]
        place, here = _place(chunk * CHUNK + i, length, direction), n < d_state
        to = pairs + (((batch * tl.num_programs(1) + direction) * chunks + chunk) * d_state + n) * (2 * CHUNK) + i
        B_t = tl.load(B + batch * B_batch + place * B_time + direction * B_group + n, mask=here)
        C_t = tl.load(C + batch * C_batch + place * C_time + direction * C_group + n, mask=here)
        tl.store(to, B_t.to(tl.float32), mask=here)
        tl.store(to + CHUNK, C_t.to(tl.float32), mask=here)

    @triton.jit
    def _unpack_kernel(
        dpairs, dBC, dBC_batch, dBC_time, length, chunks, d_state, blocks, block_stride,
        BLOCK_N: tl.constexpr, DIRECTIONS: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        """Add the blocks' sums for B and C, and put them where they belong in the sequence."""
        chunk, direction, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        lane, n = tl.arange(0, 2 * CHUNK)[:, None], tl.arange(0, BLOCK_N)[None, :]
        dpairs += ((batch * DIRECTIONS + direction) * chunks + chunk) * d_state * (2 * CHUNK) + n * (2 * CHUNK) + lane
        total = tl.zeros([2 * CHUNK, BLOCK_N], tl.float32)
        for block in range(blocks):
            total += tl.load(dpairs + block * block_stride, mask=n < d_state, other=0.0)
        step, which = chunk * CHUNK + lane % CHUNK, lane // CHUNK  # 0 for B, 1 for C
        dBC += batch * dBC_batch + _place(step, length, direction) * dBC_time
        mask = (step < length) & (n < d_state)
        tl.store(dBC + (which * DIRECTIONS + direction) * d_state + n, total.to(dBC.dtype.element_ty), mask=mask)

    @triton.jit
    def _sum_kernel(parts, total, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """Sum of (rows, columns) over its rows, in the same order at every run."""
        row, column = tl.arange(0, ROWS)[:, None], tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(0, rows, ROWS):
            mask = (first + row < rows) & (column < columns)[None, :]
            sums += tl.load(parts + (first + row) * columns + column[None, :], mask=mask, other=0.0)
        tl.store(total + column, tl.sum(sums, 0), mask=column < columns)

    @triton.jit(do_not_specialize=["length"])
    def _forward_kernel(
        u, delta, A, pairs, D, z, delta_bias, out, states, states_batch, slot, length, half, d_state,
        u_batch, u_time, delta_batch, delta_time, z_batch, z_time,
        HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
        MASKED: tl.constexpr, DIRECTIONS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
        BLOCK_N: tl.constexpr, AHEAD: tl.constexpr,
    ):  # fmt: skip
        direction, _block, d, in_half, skip, bias = _owned(half, D, delta_bias, HAS_D, HAS_BIAS, MASKED, COLUMNS)
        batch, lane = tl.program_id(1).to(tl.int64), tl.arange(0, COLUMNS)
        channels, chunks = DIRECTIONS * half, tl.cdiv(length, CHUNK)
        row = d[None, :]
        u, delta = u + batch * u_batch + row, delta + batch * delta_batch + row
        out += batch * length * channels + row
        if HAS_Z:
            z += batch * z_batch + row
        A += d
        states += batch * states_batch + d
        pairs += (batch * DIRECTIONS + direction) * chunks * d_state * (2 * CHUNK) + lane

        u_next = _read_tile(u, u_time, 0, length, direction, in_half, MASKED, CHUNK)
        delta_next = _read_tile(delta, delta_time, 0, length, direction, in_half, MASKED, CHUNK)
        for chunk in range(chunks):
            place, there = _places(chunk, length, direction, in_half, CHUNK)
            us, raws, deltas, writes = _rows_of(u_next), _rows_of(delta_next), (), ()
            for i in tl.static_range(CHUNK):
                delta_i, write_i = _step(us[i], raws[i], bias, chunk * CHUNK + i < length, SOFTPLUS, MASKED)
                deltas, writes = deltas + (delta_i,), writes + (write_i,)
            ys = _zeros_like(deltas)

            before, now = states + (chunk - 1) * slot, pairs + chunk * d_state * (2 * CHUNK)
            queue = ()  # what the next states need, read ahead
            for k in tl.static_range(AHEAD):
                queue = queue + (_read_state(A, before, now, k, chunk, d_state, channels, in_half, CHUNK),)
            for n in range(0, d_state, AHEAD):
                ahead = ()
                for k in tl.static_range(AHEAD):
                    n_next = n + AHEAD + k
                    ahead = ahead + (_read_state(A, before, now, n_next, chunk, d_state, channels, in_half, CHUNK),)
                for k in tl.static_range(AHEAD):
                    A_n, h, pair = queue[k]
                    Bs, Cs = _spread(pair, COLUMNS, CHUNK)
                    sums = ()
                    for i in tl.static_range(CHUNK):
                        h = tl.fma(tl.exp2(tl.fma(deltas[i], A_n, EXP2_SHORT)), h, writes[i] * Bs[i])
                        sums = sums + (ys[i] + h * Cs[i],)
                    ys = sums
                    tl.store(states + chunk * slot + (n + k) * channels, h, mask=in_half & (n + k < d_state))
                queue = ahead

            # What the states have in common; u is read once more rather than kept.
            u_tile = _read_tile(u, u_time, chunk, length, direction, in_half, MASKED, CHUNK)
            z_tile = _read_tile(z, z_time, chunk, length, direction, in_half, MASKED, CHUNK) if HAS_Z else u_tile
            u_next = _read_tile(u, u_time, chunk + 1, length, direction, in_half, MASKED, CHUNK)
            delta_next = _read_tile(delta, delta_time, chunk + 1, length, direction, in_half, MASKED, CHUNK)
            us, zs, outs = _rows_of(u_tile), _rows_of(z_tile), ()
            for i in tl.static_range(CHUNK):
                y = ys[i]
                if HAS_D:
                    y += skip * us[i].to(tl.float32)
                if HAS_Z:
                    z_i = zs[i].to(tl.float32)
                    y *= z_i * _sigmoid(z_i)
                outs = outs + (y.to(out.dtype.element_ty),)
            tl.store(out + place * channels, _tile_of(outs), mask=there)

    @triton.jit(do_not_specialize=["length", "batches"])
    def _backward_kernel(
        dout, u, delta, A, pairs, D, z, delta_bias, states, scratch, du, ddelta, dz, dA, dpairs, dvectors,
        batches, dout_batch, dout_time, dz_batch, dz_time, length, half, d_state,
        u_batch, u_time, delta_batch, delta_time, z_batch, z_time,
        HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
        MASKED: tl.constexpr, DIRECTIONS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        direction, block, d, in_half, skip, bias = _owned(half, D, delta_bias, HAS_D, HAS_BIAS, MASKED, COLUMNS)
        batch, lane = tl.program_id(1).to(tl.int64), tl.arange(0, COLUMNS)
        channels, chunks = DIRECTIONS * half, tl.cdiv(length, CHUNK)
        row, zero = d[None, :], tl.zeros([COLUMNS], tl.float32)
        u, delta, dout = u + batch * u_batch + row, delta + batch * delta_batch + row, dout + batch * dout_batch + row
        du, ddelta = du + batch * length * channels + row, ddelta + batch * length * channels + row
        if HAS_Z:
            z, dz = z + batch * z_batch + row, dz + batch * dz_batch + row
        A += d
        slot = d_state * channels
        states += batch * chunks * slot + row
        copy, carried, dA = scratch + batch * slot, scratch + (batches + batch) * slot + d, dA + batch * slot + d
        pairs += (batch * DIRECTIONS + direction) * chunks * d_state * (2 * CHUNK) + lane
        dpairs += ((block * batches + batch) * DIRECTIONS + direction) * chunks * d_state * (2 * CHUNK) + lane
        n_tile = tl.arange(0, BLOCK_N)[:, None]
        state_there = (n_tile < d_state) & in_half[None, :]

        dD_d, dD_lost, dbias_d, dbias_lost = zero, zero, zero, zero
        u_next, delta_next, z_next, dout_next = _read_inputs(
            u, delta, z, dout, chunks - 1, length, direction, in_half, u_time, delta_time, z_time, dout_time,
            HAS_Z, MASKED, CHUNK,
        )  # fmt: skip
        mask = state_there & (chunks > 1)
        before_next = tl.load(states + (chunks - 2) * slot + n_tile * channels, mask=mask, other=0.0)
        for back in range(chunks):
            chunk = chunks - 1 - back
            place, there = _places(chunk, length, direction, in_half, CHUNK)
            # The states before the chunk come from far away: all at once, to where they are near.
            tl.store(copy + n_tile * channels + row, before_next, mask=state_there)
            us, raws, zs, douts = _rows_of(u_next), _rows_of(delta_next), _rows_of(z_next), _rows_of(dout_next)
            deltas, writes, dys, skipped = (), (), (), ()
            for i in tl.static_range(CHUNK):
                dy, u_i, z_i = douts[i].to(tl.float32), us[i].to(tl.float32), zs[i].to(tl.float32)
                if HAS_Z:
                    dy *= z_i * _sigmoid(z_i)
                delta_i, write_i = _step(u_i, raws[i], bias, chunk * CHUNK + i < length, SOFTPLUS, MASKED)
                deltas, writes = deltas + (delta_i,), writes + (write_i,)
                dys, skipped = dys + (dy,), skipped + (dy * u_i,)
            if HAS_D:
                dD_d, dD_lost = _add(dD_d, dD_lost, _sum_of(skipped))
            ys, dwrites, dexponents = _zeros_like(deltas), _zeros_like(deltas), _zeros_like(deltas)
            tl.debug_barrier()  # what other threads have put there is read now

            later, now = in_half & (back > 0), pairs + chunk * d_state * (2 * CHUNK)
            A_next, pair_next, h_next = _load(A, 0, in_half, MASKED), tl.load(now), tl.load(copy + d, mask=in_half)
            dh_next, dA_next = tl.load(carried, mask=later, other=0.0), tl.load(dA, mask=later, other=0.0)
            for n in range(d_state):
                A_n, pair, h, dh, dA_n = A_next, pair_next, h_next, dh_next, dA_next
                # The next state's, read ahead.
                n_next = tl.minimum(n + 1, d_state - 1)
                A_next, pair_next = _load(A, n_next * channels, in_half, MASKED), tl.load(now + n_next * (2 * CHUNK))
                h_next = tl.load(copy + n_next * channels + d, mask=in_half)
                dh_next = tl.load(carried + n_next * channels, mask=later, other=0.0)
                dA_next = tl.load(dA + n_next * channels, mask=later, other=0.0)
                Bs, Cs = _spread(pair, COLUMNS, CHUNK)

                # Forwards through the chunk, as in the forward pass.
                left, decays, sums, dCs = (), (), (), ()
                for i in tl.static_range(CHUNK):
                    decays = decays + (tl.exp2(tl.fma(deltas[i], A_n, EXP2_SHORT)),)
                    left = left + (decays[i] * h,)
                    h = left[i] + writes[i] * Bs[i]
                    sums, dCs = sums + (ys[i] + h * Cs[i],), dCs + (h * dys[i],)
                ys = sums

                # And back; dh is the gradient of the state after a step.
                dBs, write_sums, exponent_sums, dA_even, dA_odd = (), (), (), zero, zero
                for i in tl.static_range(CHUNK - 1, -1, -1):
                    own = Cs[i] * dys[i]
                    dh = tl.fma(decays[i + 1], dh, own) if i + 1 < CHUNK else dh + own
                    write_sums = (dwrites[i] + dh * Bs[i],) + write_sums
                    dBs = (dh * writes[i],) + dBs
                    dexponent = dh * left[i]  # gradient of delta_t A
                    exponent_sums = (dexponents[i] + dexponent * A_n,) + exponent_sums
                    if i % 2:
                        dA_odd += dexponent * deltas[i]
                    else:
                        dA_even += dexponent * deltas[i]
                dwrites, dexponents = write_sums, exponent_sums
                tl.store(carried + n * channels, dh * decays[0], mask=in_half)
                tl.store(dA + n * channels, dA_n + (dA_even + dA_odd) * LN_2, mask=in_half)
                # A thread holds a channel of 2 CHUNK products; now it gets one product of all channels, and adds them.
                products = tl.trans(_tile_of(dBs + dCs))
                tl.store(dpairs + (chunk * d_state + n) * (2 * CHUNK), _sum_of(_rows_of(products)))

            # What the states have in common; the inputs are read once more rather than kept.
            u_tile, raw_tile, z_tile, dout_tile = _read_inputs(
                u, delta, z, dout, chunk, length, direction, in_half, u_time, delta_time, z_time, dout_time,
                HAS_Z, MASKED, CHUNK,
            )  # fmt: skip
            u_next, delta_next, z_next, dout_next = _read_inputs(
                u, delta, z, dout, chunk - 1, length, direction, in_half, u_time, delta_time, z_time, dout_time,
                HAS_Z, MASKED, CHUNK,
            )  # fmt: skip
            mask = state_there & (chunk > 1)
            before_next = tl.load(states + (chunk - 2) * slot + n_tile * channels, mask=mask, other=0.0)
            us, raws, zs, douts = _rows_of(u_tile), _rows_of(raw_tile), _rows_of(z_tile), _rows_of(dout_tile)
            dus, ddeltas, dzs, dbias = (), (), (), ()
            for i in tl.static_range(CHUNK):
                u_i, z_i = us[i].to(tl.float32), zs[i].to(tl.float32)
                ddelta_i, du_i = dwrites[i] * u_i + dexponents[i], dwrites[i] * (deltas[i] * LN_2)
                if SOFTPLUS:
                    ddelta_i *= _sigmoid(raws[i].to(tl.float32) + bias)  # the derivative of softplus
                if HAS_D:
                    du_i += skip * dys[i]
                if HAS_Z:
                    open_z = _sigmoid(z_i)
                    dz_i = douts[i].to(tl.float32) * (ys[i] + skip * u_i) * open_z * (1 + z_i * (1 - open_z))
                    dzs = dzs + (dz_i.to(dz.dtype.element_ty),)
                dus, ddeltas = dus + (du_i.to(du.dtype.element_ty),), ddeltas + (ddelta_i.to(ddelta.dtype.element_ty),)
                dbias = dbias + (tl.where(chunk * CHUNK + i < length, ddelta_i, 0.0) if MASKED else ddelta_i,)
            if HAS_BIAS:
                dbias_d, dbias_lost = _add(dbias_d, dbias_lost, _sum_of(dbias))
            if HAS_Z:
                tl.store(dz + place * dz_time, _tile_of(dzs), mask=there)
            tl.store(ddelta + place * channels, _tile_of(ddeltas), mask=there)
            tl.store(du + place * channels, _tile_of(dus), mask=there)
            tl.debug_barrier()

        # Sums over this image's time, of D and of delta_bias: (batch, 2, channels).
        dvectors += batch * 2 * channels + d
        tl.store(dvectors, dD_d, mask=in_half)
        tl.store(dvectors + channels, dbias_d, mask=in_half)

    # Channels of a program, one to a thread, and steps of a chunk: of B and C together as many as there are threads.
    SIZES = {"COLUMNS": 32, "CHUNK": 16}
    # States read ahead; registers of a thread, so that all warps of the training step find room at once.
    FORWARD = {"AHEAD": 2, "maxnreg": 128}

    def sum_rows(parts: Tensor) -> Tensor:
        """parts.sum(0) of a contiguous float32 tensor, where PyTorch's own takes three times as long."""
        total = parts.new_empty(parts.shape[1:])
        if total.numel():
            columns = 8 if total.numel() < 4096 else 16  # so that few columns, too, are shared by many programs
            grid = (triton.cdiv(total.numel(), columns),)
            _sum_kernel[grid](parts, total, len(parts), total.numel(), ROWS=128, COLUMNS=columns)
        return total

    def _blocks(A: Tensor, B: Tensor) -> int:
        """Programs that share the channels of a direction."""
        return triton.cdiv(A.shape[0] // B.shape[2], SIZES["COLUMNS"])

    def _chunks(u: Tensor) -> int:
        return triton.cdiv(u.shape[1], SIZES["CHUNK"])

    def _launch(kernel, before, inputs, after, strides, softplus, **flags):
        """Run a kernel with one warp for every image, direction and block of channels."""
        u, delta, A, B, C, D, z, delta_bias = inputs
        (batch, length, channels), directions, d_state = u.shape, B.shape[2], A.shape[1]
        half, walked = channels // directions, (u, delta, u if z is None else z)
        chunks, chunk, block_n = _chunks(u), SIZES["CHUNK"], triton.next_power_of_2(d_state)
        pairs = A.new_empty(batch, directions, chunks, d_state, 2 * chunk)
        _pack_kernel[chunks, directions, batch](
            B, C, pairs, length, chunks, d_state, *(s for t in (B, C) for s in t.stride()[:3]),
            BLOCK_N=block_n, CHUNK=chunk, num_warps=1,
        )  # fmt: skip
        strides = [*strides, length, half, d_state, *(stride for t in walked for stride in t.stride()[:2])]
        # A as (d_state, channels): neighbouring channels lie side by side.
        kernel[_blocks(A, B) * directions, batch](
            *before, u, delta, A.t().contiguous(), pairs, D, z, delta_bias, *after, *strides,
            HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=softplus,
            MASKED=half % SIZES["COLUMNS"] + length % chunk != 0, DIRECTIONS=directions, BLOCK_N=block_n,
            num_warps=1, **SIZES, **flags,
        )  # fmt: skip

    def _room_for(t: Tensor | None, like: Tensor) -> Tensor:
        """Room for the gradient of an input that may be missing (custom operators return tensors only)."""
        return like.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)

    def _kept_states(u: Tensor, A: Tensor, keep: bool) -> Tensor:
        """Room for the states after every chunk, if they are kept: (batch, chunks, d_state, channels)."""
        return A.new_empty(u.shape[0], _chunks(u) if keep else 0, A.shape[1], u.shape[2])

    def _scan_forward(inputs, softplus: bool, keep: bool) -> tuple[Tensor, Tensor]:
        """The output, and the states that ``_scan_backward`` wants if ``keep``."""
        u, _, A, *_ = inputs
        out, states = torch.empty_like(u, memory_format=torch.contiguous_format), _kept_states(u, A, keep)
        if u.numel():
            # Otherwise every chunk writes its states over those of the chunk before.
            room = states if keep else A.new_empty(u.shape[0], 1, A.shape[1], u.shape[2])
            strides = (room.stride(0), room.stride(1) if keep else 0)
            _launch(_forward_kernel, (), inputs, (out, room), strides, softplus, **FORWARD)
        return out, states

    def _scan_backward(
        dout: Tensor, states: Tensor, inputs, softplus: bool, dz: Tensor, dBC: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of u, delta (their dtype) and A, and of D and delta_bias in one (2, channels), float32.

        That of z goes to ``dz``; those of B and C go to ``dBC`` (batch, length, 2 · directions · d_state), B's first.
        """
        u, delta, A, B, *_ = inputs
        (batch, length, channels), directions, d_state = u.shape, B.shape[2], A.shape[1]
        du, ddelta = (_room_for(t, u) for t in (u, delta))
        empty = u.numel() == 0  # no kernel runs to fill what is summed up below
        new = A.new_zeros if empty else A.new_empty
        dA, dvectors = new(batch, d_state, channels), new(batch, 2, channels)
        if not empty:
            blocks, chunks, chunk = _blocks(A, B), _chunks(u), SIZES["CHUNK"]
            scratch = A.new_empty(2, batch, d_state, channels)
            dpairs = A.new_empty(blocks, batch, directions, chunks, d_state, 2 * chunk)
            strides = (batch, *dout.stride()[:2], *(dz.stride()[:2] if dz.numel() else (0, 0)))
            after, block_n = (states, scratch, du, ddelta, dz, dA, dpairs, dvectors), triton.next_power_of_2(d_state)
            _launch(_backward_kernel, (dout,), inputs, after, strides, softplus)
            _unpack_kernel[chunks, directions, batch](
                dpairs, dBC, *dBC.stride()[:2], length, chunks, d_state, blocks, dpairs.stride(0),
                BLOCK_N=block_n, DIRECTIONS=directions, CHUNK=chunk, num_warps=1,
            )  # fmt: skip
        return du, ddelta, sum_rows(dA).t().contiguous(), sum_rows(dvectors)

    INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias"

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
        schema=(
            f"(Tensor dout, Tensor states, {INPUTS}, bool softplus)"
            " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
        ),
    )
    def _triton_scan_backward(dout, states, u, delta, A, B, C, D, z, delta_bias, softplus):
        dz, inputs = _room_for(z, u), (u, delta, A, B, C, D, z, delta_bias)
        dBC = B.new_zeros(*B.shape[:2], 2 * B.shape[2] * B.shape[3], dtype=torch.float32)
        du, ddelta, dA, dvectors = _scan_backward(dout, states, inputs, softplus, dz, dBC)
        dB, dC = dBC.unflatten(-1, (2, *B.shape[2:])).unbind(2)
        return du, ddelta, dA, dB.to(B.dtype, copy=True), dC.to(C.dtype, copy=True), dz, dvectors

    @_triton_scan.register_fake
    def _(u, delta, A, B, C, D, z, delta_bias, softplus, keep):
        return torch.empty_like(u, memory_format=torch.contiguous_format), _kept_states(u, A, keep)

    @_triton_scan_backward.register_fake
    def _(dout, states, u, delta, A, B, C, D, z, delta_bias, softplus):
        return *(_room_for(t, u) for t in (u, delta, A, B, C, z)), A.new_empty(2, len(A))

    def _save_inputs(ctx, inputs, output) -> None:
        """For operators that take (tensors ..., a flag, keep) and return y and what their backward pass wants."""
        *tensors, ctx.flag, _keep = inputs
        ctx.save_for_backward(*output[1:], *tensors)
        ctx.set_materialize_grads(False)

    def _gradients(ctx, dout: Tensor, _dstates):
        states, *tensors = ctx.saved_tensors
        *of_tensors, dz, (dD, dbias) = _triton_scan_backward(_rows(dout), states, *tensors, ctx.flag)
        gradients = (*of_tensors, dD, dz, dbias)
        return *(None if t is None else g for t, g in zip(tensors, gradients)), None, None

    _triton_scan.register_autograd(_gradients, setup_context=_save_inputs)

    # ── The short convolution ───────────────────────────────────────────────────────────────────────────────────────
    #
    # One program owns COLUMNS channels of one image and one direction and walks through TOKENS steps, with the last
    # TAPS - 1 inputs in registers; AHEAD rows are asked for before the rows before them are written. Each value is read
    # once; the backward pass walks TAPS - 1 steps into the next program's part, because a token's gradient comes from
    # the tokens after it.

    @triton.jit
    def _conv_part(half, COLUMNS: tl.constexpr, TOKENS: tl.constexpr):
        """Direction, image, number of this part among all, channels and whether they are there, first step."""
        direction, _block, inner = _share(half, COLUMNS)
        batch = tl.program_id(2).to(tl.int64)
        part = batch * tl.num_programs(1) + tl.program_id(1)
        return direction, batch, part, direction * half + inner, inner < half, tl.program_id(1) * TOKENS

    @triton.jit
    def _read_rows(x, first, length, direction, x_time, d, in_half, COUNT: tl.constexpr):
        """Channels at COUNT steps of a direction from ``first`` on, as stored; 0 beyond the ends."""
        rows = ()
        for i in tl.static_range(COUNT):
            step = first + i
            inside = in_half & (step >= 0) & (step < length)
            rows = rows + (tl.load(x + _place(step, length, direction) * x_time + d, mask=inside, other=0.0),)
        return rows

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
        rows, window = _read_rows(x, first - (TAPS - 1), length, direction, x_time, d, in_half, TAPS - 1), ()
        for i in tl.static_range(TAPS - 1):
            window = (rows[i].to(tl.float32),) + window
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
        TAPS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, AHEAD: tl.constexpr,
    ):  # fmt: skip
        direction, batch, _part, d, in_half, first = _conv_part(half, COLUMNS, TOKENS)
        x, out = x + batch * x_batch, out + batch * length * channels
        taps, bias_d = _taps(weight, d, in_half, TAPS), tl.load(bias + d, mask=in_half, other=0.0)
        window = _window(x, first, length, direction, x_time, d, in_half, TAPS)
        end = tl.minimum(first + TOKENS, length)
        rows = _read_rows(x, first, length, direction, x_time, d, in_half, AHEAD)
        for start in range(first, end, AHEAD):
            ahead = _read_rows(x, start + AHEAD, length, direction, x_time, d, in_half, AHEAD)
            for i in tl.static_range(AHEAD):
                window = (rows[i].to(tl.float32),) + window
                total = _filter(taps, window, bias_d, TAPS)
                window = window[: TAPS - 1]
                y, mask = total * _sigmoid(total), in_half & (start + i < length)
                place = _place(start + i, length, direction)
                tl.store(out + place * channels + d, y.to(out.dtype.element_ty), mask=mask)
            rows = ahead

    @triton.jit
    def _conv_backward_kernel(
        dout, x, weight, bias, dx, parts, length, half, channels,
        dout_batch, dout_time, x_batch, x_time, dx_batch, dx_time,
        TAPS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, AHEAD: tl.constexpr,
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
        rows = _read_rows(x, first, length, direction, x_time, d, in_half, AHEAD)
        douts = _read_rows(dout, first, length, direction, dout_time, d, in_half, AHEAD)
        for start in range(first, end + TAPS - 1, AHEAD):
            ahead = _read_rows(x, start + AHEAD, length, direction, x_time, d, in_half, AHEAD)
            douts_ahead = _read_rows(dout, start + AHEAD, length, direction, dout_time, d, in_half, AHEAD)
            for i in tl.static_range(AHEAD):
                step = start + i
                window = (rows[i].to(tl.float32),) + window
                total = _filter(taps, window, bias_d, TAPS)
                gate = _sigmoid(total)
                dtotal = douts[i].to(tl.float32) * gate * (1 + total * (1 - gate))
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
                mask = in_half & (to >= first) & (to < end)
                tl.store(dx + _place(to, length, direction) * dx_time + d, dx_t.to(dx.dtype.element_ty), mask=mask)
            rows, douts = ahead, douts_ahead
        # Sums of this part: those of the taps (channels, TAPS), then those of the bias (channels,).
        parts += part * channels * (TAPS + 1)
        for back in tl.static_range(TAPS):
            tl.store(parts + d * TAPS + (TAPS - 1 - back), dtaps[back], mask=in_half)
        tl.store(parts + channels * TAPS + d, dbias_d, mask=in_half)

    CONV_FORWARD = {"COLUMNS": 64, "TOKENS": 128, "AHEAD": 4}
    CONV_BACKWARD = {"COLUMNS": 64, "TOKENS": 128, "AHEAD": 2}

    def _launch_conv(kernel, sizes, x, weight, bidirectional, tensors, *strided):
        (batch, length, channels), half = x.shape, x.shape[2] // (2 if bidirectional else 1)
        if x.numel():
            blocks, parts = triton.cdiv(half, sizes["COLUMNS"]), triton.cdiv(length, sizes["TOKENS"])
            strides = [stride for t in strided for stride in t.stride()[:2]]
            taps = weight.shape[1]
            kernel[blocks * (channels // half), parts, batch](
                *tensors, length, half, channels, *strides, TAPS=taps, num_warps=1, **sizes
            )

    def _conv_forward(x, weight, bias, both) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        _launch_conv(_conv_forward_kernel, CONV_FORWARD, x, weight, both, (x, weight, bias, out), x)
        return out

    def _conv_backward(dout, x, weight, bias, both, dx) -> Tensor:
        """Gradients of weight and bias one after the other, see ``_taps_and_bias``; that of x goes to ``dx``."""
        programs = x.shape[0] * triton.cdiv(x.shape[1], CONV_BACKWARD["TOKENS"])
        parts = weight.new_empty(programs, weight.numel() + bias.numel())
        tensors = (dout, x, weight, bias, dx, parts)
        _launch_conv(_conv_backward_kernel, CONV_BACKWARD, x, weight, both, tensors, dout, x, dx)
        return sum_rows(parts)

    def _taps_and_bias(sums: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        taps, bias = sums.split([weight.numel(), len(weight)])
        return taps.view_as(weight), bias

    @torch.library.custom_op(
        "mamba_ginr::causal_conv", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor bias, bool both) -> Tensor"
    )
    def _triton_conv(x, weight, bias, both):
        return _conv_forward(x, weight, bias, both)

    @torch.library.custom_op(
        "mamba_ginr::causal_conv_backward",
        mutates_args=(),
        schema="(Tensor dout, Tensor x, Tensor weight, Tensor bias, bool both) -> (Tensor, Tensor)",
    )
    def _triton_conv_backward(dout, x, weight, bias, both):
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        return dx, _conv_backward(dout, x, weight, bias, both, dx)

    @_triton_conv.register_fake
    def _(x, weight, bias, both):
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @_triton_conv_backward.register_fake
    def _(dout, x, weight, bias, both):
        return _room_for(x, x), weight.new_empty(weight.numel() + bias.numel())

    def _save_conv_inputs(ctx, inputs, output) -> None:
        *tensors, ctx.both = inputs
        ctx.save_for_backward(*tensors)

    def _conv_gradients(ctx, dout: Tensor):
        x, weight, bias = ctx.saved_tensors
        dx, sums = _triton_conv_backward(_rows(dout), x, weight, bias, ctx.both)
        return dx, *_taps_and_bias(sums, weight), None

    _triton_conv.register_autograd(_conv_gradients, setup_context=_save_conv_inputs)

    # ── All between in_proj and out_proj ────────────────────────────────────────────────────────────────────────────
    #
    # One operator, so that the backward pass can compute the step sizes again instead of keeping them, and write the
    # gradients of both halves of xz where in_proj's backward wants them.

    def _cut(small, dt_proj, A):
        """Step sizes, B and C from the small projection [step sizes | B | C]."""
        rank = dt_proj.shape[1]
        B, C = small[..., rank:].unflatten(-1, (2, -1, A.shape[1])).unbind(2)
        return small[..., :rank] @ dt_proj.t(), B, C

    WEIGHTS = (
        "Tensor conv_weight, Tensor conv_bias, Tensor x_proj, Tensor dt_proj, "
        "Tensor A, Tensor D, Tensor dt_bias, bool both"
    )

    @torch.library.custom_op(
        "mamba_ginr::inner",
        mutates_args=(),
        schema=f"(Tensor xz, {WEIGHTS}, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
    )
    def _triton_inner(xz, conv_weight, conv_bias, x_proj, dt_proj, A, D, dt_bias, both, keep):
        x, z = xz.chunk(2, dim=-1)
        u = _conv_forward(x, conv_weight, conv_bias, both)
        small = u @ x_proj.t()
        delta, B, C = _cut(small, dt_proj, A)
        return *_scan_forward((u, delta, A, B, C, D, z, dt_bias), True, keep), u, small

    @torch.library.custom_op(
        "mamba_ginr::inner_backward",
        mutates_args=(),
        schema=(
            f"(Tensor dy, Tensor states, Tensor u, Tensor small, Tensor xz, {WEIGHTS})"
            " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
        ),
    )
    def _triton_inner_backward(dy, states, u, small, xz, conv_weight, conv_bias, x_proj, dt_proj, A, D, dt_bias, both):
        """Gradients of xz, taps and bias of the convolution in one, x_proj, dt_proj, A, and D and dt_bias in one."""
        (x, z), (delta, B, C) = xz.chunk(2, dim=-1), _cut(small, dt_proj, A)
        dxz, dsmall, rank = torch.empty_like(xz), torch.empty_like(small), dt_proj.shape[1]
        dx, dz = dxz.chunk(2, dim=-1)
        scan = (u, delta, A, B, C, D, z, dt_bias)
        du, ddelta, dA, dvectors = _scan_backward(dy, states, scan, True, dz, dsmall[..., rank:])
        rows, wide = dsmall.flatten(0, 1), du.flatten(0, 1)
        torch.mm(ddelta.flatten(0, 1), dt_proj, out=rows[:, :rank])
        dx_proj = rows.t() @ u.flatten(0, 1)
        ddt_proj = ddelta.flatten(0, 1).t() @ small.flatten(0, 1)[:, :rank]
        wide.addmm_(rows, x_proj)
        dconv = _conv_backward(du, x, conv_weight, conv_bias, both, dx)
        return dxz, dconv, dx_proj, ddt_proj, dA, dvectors

    @_triton_inner.register_fake
    def _(xz, conv_weight, conv_bias, x_proj, dt_proj, A, D, dt_bias, both, keep):
        y = xz.new_empty(*xz.shape[:2], xz.shape[2] // 2)
        return y, _kept_states(y, A, keep), torch.empty_like(y), xz.new_empty(*xz.shape[:2], len(x_proj))

    @_triton_inner_backward.register_fake
    def _(dy, states, u, small, xz, conv_weight, conv_bias, x_proj, dt_proj, A, D, dt_bias, both):
        dxz, dx_proj, ddt_proj, dA = (torch.empty_like(t) for t in (xz, x_proj, dt_proj, A))
        dconv = conv_weight.new_empty(conv_weight.numel() + conv_bias.numel())
        return dxz, dconv, dx_proj, ddt_proj, dA, A.new_empty(2, len(A))

    def _inner_gradients(ctx, dy: Tensor, *_kept):
        _states, _u, _small, _xz, conv_weight, *_ = ctx.saved_tensors
        dxz, dconv, *others, (dD, dbias) = _triton_inner_backward(_rows(dy), *ctx.saved_tensors, ctx.flag)
        return dxz, *_taps_and_bias(dconv, conv_weight), *others, dD, dbias, None, None

    _triton_inner.register_autograd(_inner_gradients, setup_context=_save_inputs)
