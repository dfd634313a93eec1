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
    name = backend or _chosen["backend"]
    if name == "auto":
        name = choose_backend(u.device)[0]
    if name not in BACKENDS:
        raise ValueError(f"unknown scan backend {name!r}; choose one of: auto, {', '.join(BACKENDS)}")
    # Autocast would turn the read-out of the state into a bfloat16 product.
    with torch.autocast(u.device.type, enabled=False):
        return BACKENDS[name](u, delta, A, B, C, D, z, delta_bias, delta_softplus, bidirectional)


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
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"selective_scan: {name} must have shape {shape}, got {tuple(tensor.shape)}")


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
    if fault := triton_fault(u.device):
        raise RuntimeError(f"scan backend triton: {fault}")
    if u.dtype == torch.float64:
        raise RuntimeError("scan backend triton: float64 is for the torch backend; the kernel's state is float32")
    if not bidirectional:
        B, C = B.unsqueeze(2), C.unsqueeze(2)
    # The kernels step through time and batch by strides, but read channels and states side by side.
    u, delta, z, B, C = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (u, delta, z, B, C))
    A, D, delta_bias = (None if t is None else t.float().contiguous() for t in (A, D, delta_bias))
    return _triton_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)


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
    if fault := backend_fault(name, device):
        raise RuntimeError(f"scan backend {name}: {fault}")
    _chosen["backend"] = name
    return choose_backend(device) if name == "auto" else (name, "as asked")


def choose_backend(device: torch.device | str) -> tuple[str, str]:
    """Return the fastest backend that runs on ``device`` and the reason in words."""
    if torch.device(device).type != "cuda":
        return "torch", "the CUDA kernel of mamba-ssm needs a GPU"
    fault = mamba_ssm_fault(device)
    if not fault:
        return "mamba_ssm", f"CUDA kernel, release {getattr(sys.modules.get('mamba_ssm'), '__version__', 'unknown')}"
    return "torch", f"SLOW, made of thousands of small kernels: {fault}"


def backend_fault(name: str, device: torch.device | str) -> str:
    """Say what keeps the backend ``name`` from running on ``device``; "" if it runs."""
    return {"mamba_ssm": mamba_ssm_fault, "triton": triton_fault}.get(name, lambda _: "")(device)


def triton_fault(device: torch.device | str) -> str:
    """Say what keeps the Triton kernels from running on ``device``; "" if they run."""
    if triton is None:
        return "Triton is not installed; PyTorch brings it on Linux"
    if torch.device(device).type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton kernels run on CUDA devices, not on {torch.device(device).type}"
    return ""


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


# ── Triton kernels ──────────────────────────────────────────────────────────────────────────────────────────────────
#
# One program owns one image of the batch and ROWS × COLUMNS channels of one direction, and walks through time one step
# after the other with their states, (ROWS, BLOCK_N, COLUMNS), in registers. Columns and some of the states lie across
# the threads of a warp, rows and the other states within a thread: sums over states and over channels then need few
# exchanges between threads, which are what the backward pass waits for.
#
# The forward pass keeps no states. The backward pass runs it again for the state before every chunk of CHUNK steps,
# repeats a chunk from there, its states going to a scratch of the program's own, and walks it in reverse.
#
# Nothing is accumulated with atomics: sums over channels (dB, dC) and over the batch (dA, dD, ddelta_bias) leave the
# kernel as partial sums and are added by PyTorch, so that gradients are the same at every run.

if triton is not None:
    LOG2_E = tl.constexpr(1.4426950408889634)

    @triton.jit
    def _softplus(x):
        """log(1 + eˣ), with log1p's series where eˣ is small, so that small step sizes keep their precision."""
        e = tl.exp(tl.minimum(x, 20.0))
        series = e * (1.0 - e * (0.5 - e * (0.33333333 - e * (0.25 - e * 0.2))))
        return tl.where(x > 20.0, x, tl.where(e < 0.03, series, tl.log(1.0 + e)))

    @triton.jit
    def _load(pointer, offsets, mask, MASKED: tl.constexpr):
        """Read as float32; 0 where masked."""
        if MASKED:
            value = tl.load(pointer + offsets, mask=mask, other=0.0)
        else:
            value = tl.load(pointer + offsets)
        return value.to(tl.float32)

    @triton.jit
    def _owned(half, d_state, DIRECTIONS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, N: tl.constexpr):
        """What this program owns: direction, block of channels, image, channels (ROWS, COLUMNS), states, and masks."""
        blocks = tl.cdiv(half, ROWS * COLUMNS)
        direction, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
        inner = block * ROWS * COLUMNS + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        n = tl.arange(0, N)
        in_half = inner < half
        in_states = (n < d_state)[None, :, None] & in_half[:, None, :]
        return direction, block, tl.program_id(1).to(tl.int64), direction * half + inner, n, in_half, in_states

    @triton.jit
    def _at(step, length, direction, in_half, n, d_state):
        """Place in the sequence of the direction's ``step``, and which channels and states are inside there."""
        return step + direction * (length - 1 - 2 * step), in_half & (step < length), (n < d_state) & (step < length)

    @triton.jit
    def _read_step(
        u, delta, B, bias, place, inside, inside_n, d, n, u_time, delta_time, B_time,
        SOFTPLUS: tl.constexpr, MASKED: tl.constexpr,
    ):  # fmt: skip
        """u, delta before and after its softplus, (ROWS, COLUMNS), and B, (BLOCK_N,), of one step; 0 outside."""
        raw = _load(delta, place * delta_time + d, inside, MASKED) + bias
        delta_t = _softplus(raw) if SOFTPLUS else raw
        if MASKED:
            delta_t = tl.where(inside, delta_t, 0.0)  # a step of no size keeps the state as it is
        u_t = _load(u, place * u_time + d, inside, MASKED)
        return u_t, raw, delta_t, _load(B, place * B_time + n, inside_n, MASKED)

    @triton.jit
    def _advance(h, u_t, delta_t, A_nd, B_t):
        """h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t"""
        decay = tl.exp2((delta_t * LOG2_E)[:, None, :] * A_nd)
        return decay * h + (delta_t * u_t)[:, None, :] * B_t[None, :, None]

    @triton.jit
    def _forward_kernel(
        u, delta, A, B, C, D, z, delta_bias, out, starts, length, half, d_state,
        u_batch, u_time, delta_batch, delta_time, z_batch, z_time, B_batch, B_time, B_group, C_batch, C_time, C_group,
        HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
        STATES_ONLY: tl.constexpr, MASKED: tl.constexpr, DIRECTIONS: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        direction, _block, batch, d, n, in_half, in_states = _owned(half, d_state, DIRECTIONS, ROWS, COLUMNS, BLOCK_N)
        channels, chunks = DIRECTIONS * half, tl.cdiv(length, CHUNK)
        A_nd = _load(A, d[:, None, :] * d_state + n[None, :, None], in_states, MASKED)
        if HAS_D:
            skip = _load(D, d, in_half, MASKED)
        bias = _load(delta_bias, d, in_half, MASKED) if HAS_BIAS else 0.0
        u, delta = u + batch * u_batch, delta + batch * delta_batch
        B, C = B + batch * B_batch + direction * B_group, C + batch * C_batch + direction * C_group
        if HAS_Z:
            z += batch * z_batch

        h = tl.zeros([ROWS, BLOCK_N, COLUMNS], tl.float32)
        for chunk in range(chunks):
            if STATES_ONLY:
                start = (batch * chunks + chunk) * d_state * channels
                tl.store(starts + start + n[None, :, None] * channels + d[:, None, :], h, mask=in_states)
            for i in tl.static_range(CHUNK):
                place, inside, inside_n = _at(chunk * CHUNK + i, length, direction, in_half, n, d_state)
                u_t, _raw, delta_t, B_t = _read_step(
                    u, delta, B, bias, place, inside, inside_n, d, n, u_time, delta_time, B_time, SOFTPLUS, MASKED
                )
                h = _advance(h, u_t, delta_t, A_nd, B_t)
                if not STATES_ONLY:
                    C_t = _load(C, place * C_time + n, inside_n, MASKED)
                    y = tl.sum(h * C_t[None, :, None], 1)
                    if HAS_D:
                        y += skip * u_t
                    if HAS_Z:
                        z_t = _load(z, place * z_time + d, inside, MASKED)
                        y *= z_t * tl.sigmoid(z_t)
                    tl.store(out + (batch * length + place) * channels + d, y.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _backward_kernel(
        dout, u, delta, A, B, C, D, z, delta_bias, starts, scratch, du, ddelta, dz, dA, dB, dC, dD, ddelta_bias,
        batches, dout_batch, dout_time, length, half, d_state,
        u_batch, u_time, delta_batch, delta_time, z_batch, z_time, B_batch, B_time, B_group, C_batch, C_time, C_group,
        HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
        MASKED: tl.constexpr, DIRECTIONS: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        direction, block, batch, d, n, in_half, in_states = _owned(half, d_state, DIRECTIONS, ROWS, COLUMNS, BLOCK_N)
        channels, chunks = DIRECTIONS * half, tl.cdiv(length, CHUNK)
        A_nd = _load(A, d[:, None, :] * d_state + n[None, :, None], in_states, MASKED)
        if HAS_D:
            skip = _load(D, d, in_half, MASKED)
        bias = _load(delta_bias, d, in_half, MASKED) if HAS_BIAS else 0.0
        u, delta = u + batch * u_batch, delta + batch * delta_batch
        B, C = B + batch * B_batch + direction * B_group, C + batch * C_batch + direction * C_group
        if HAS_Z:
            z += batch * z_batch

        SLOT: tl.constexpr = ROWS * BLOCK_N * COLUMNS
        own = (tl.arange(0, ROWS)[:, None, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :, None]) * COLUMNS
        own += tl.arange(0, COLUMNS)[None, None, :]
        scratch += (batch * tl.num_programs(0) + tl.program_id(0)) * CHUNK * SLOT

        dA_nd = tl.zeros([ROWS, BLOCK_N, COLUMNS], tl.float32)
        dh = tl.zeros([ROWS, BLOCK_N, COLUMNS], tl.float32)  # what later steps send back to the state
        dD_d = tl.zeros([ROWS, COLUMNS], tl.float32)
        dbias_d = tl.zeros([ROWS, COLUMNS], tl.float32)
        for back in range(chunks):
            chunk = chunks - 1 - back
            start = (batch * chunks + chunk) * d_state * channels
            h = _load(starts, start + n[None, :, None] * channels + d[:, None, :], in_states, MASKED)

            # The chunk once more, as in the forward pass; this time its states go to the program's own scratch, which
            # every chunk uses again, so that it stays in the cache.
            for i in range(CHUNK):
                place, inside, inside_n = _at(chunk * CHUNK + i, length, direction, in_half, n, d_state)
                u_t, _raw, delta_t, B_t = _read_step(
                    u, delta, B, bias, place, inside, inside_n, d, n, u_time, delta_time, B_time, SOFTPLUS, MASKED
                )
                tl.store(scratch + i * SLOT + own, h)
                h = _advance(h, u_t, delta_t, A_nd, B_t)
            tl.debug_barrier()

            for back_step in range(CHUNK):
                i = CHUNK - 1 - back_step
                place, inside, inside_n = _at(chunk * CHUNK + i, length, direction, in_half, n, d_state)
                u_t, raw, delta_t, B_t = _read_step(
                    u, delta, B, bias, place, inside, inside_n, d, n, u_time, delta_time, B_time, SOFTPLUS, MASKED
                )
                C_t = _load(C, place * C_time + n, inside_n, MASKED)
                dy = _load(dout, batch * dout_batch + place * dout_time + d, inside, MASKED)
                earlier_h = tl.load(scratch + i * SLOT + own)
                row = (batch * length + place) * channels + d

                # Through the gate and the skip.
                if HAS_Z:
                    y = tl.sum(h * C_t[None, :, None], 1)
                    if HAS_D:
                        y += skip * u_t
                    z_t = _load(z, place * z_time + d, inside, MASKED)
                    gate = tl.sigmoid(z_t)
                    tl.store(dz + row, (dy * y * gate * (1 + z_t * (1 - gate))).to(dz.dtype.element_ty), mask=inside)
                    dy *= z_t * gate
                if HAS_D:
                    dD_d += dy * u_t

                # Through the state: h_t = decay_t h_{t-1} + delta_t u_t B_t, y_t = C_t h_t.
                dh += C_t[None, :, None] * dy[:, None, :]
                dwritten = tl.sum(dh * B_t[None, :, None], 1)  # gradient of delta_t u_t
                sums = (((block * batches + batch) * length + place) * DIRECTIONS + direction) * d_state + n
                dB_t = tl.sum(tl.sum(dh * (delta_t * u_t)[:, None, :], 0), 1)
                dC_t = tl.sum(tl.sum(h * dy[:, None, :], 0), 1)
                tl.store(dB + sums, dB_t, mask=inside_n)
                tl.store(dC + sums, dC_t, mask=inside_n)
                dh *= tl.exp2((delta_t * LOG2_E)[:, None, :] * A_nd)
                dexponent = dh * earlier_h  # gradient of delta_t A
                ddelta_t = dwritten * u_t + tl.sum(dexponent * A_nd, 1)
                dA_nd += dexponent * delta_t[:, None, :]
                if SOFTPLUS:
                    ddelta_t *= tl.sigmoid(raw)
                if HAS_BIAS:
                    dbias_d += tl.where(inside, ddelta_t, 0.0) if MASKED else ddelta_t
                tl.store(ddelta + row, ddelta_t.to(ddelta.dtype.element_ty), mask=inside)
                du_t = dwritten * delta_t
                if HAS_D:
                    du_t += skip * dy
                tl.store(du + row, du_t.to(du.dtype.element_ty), mask=inside)
                h = earlier_h
            tl.debug_barrier()

        # Sums over this image's time; (batch, ...).
        tl.store(dA + (batch * channels + d[:, None, :]) * d_state + n[None, :, None], dA_nd, mask=in_states)
        if HAS_D:
            tl.store(dD + batch * channels + d, dD_d, mask=in_half)
        if HAS_BIAS:
            tl.store(ddelta_bias + batch * channels + d, dbias_d, mask=in_half)

    # Channels within a thread, channels across threads, and steps of a chunk.
    FORWARD = {"ROWS": 1, "COLUMNS": 32, "CHUNK": 8}
    BACKWARD = {"ROWS": 1, "COLUMNS": 32, "CHUNK": 16}

    def _sizes(u: Tensor, A: Tensor, B: Tensor, sizes: dict) -> tuple[int, int, int]:
        """Channels of a direction, blocks of them, and the states padded to a power of two."""
        half = u.shape[2] // B.shape[2]
        return half, triton.cdiv(half, sizes["ROWS"] * sizes["COLUMNS"]), triton.next_power_of_2(A.shape[1])

    def _launch(kernel, tensors, u, delta, A, B, C, D, z, delta_bias, softplus, sizes, before=(), **flags):
        """Run a kernel with one warp for every image, direction and block of channels."""
        if not u.numel():
            return
        (batch, length, _), directions, d_state = u.shape, B.shape[2], A.shape[1]
        half, blocks, block_n = _sizes(u, A, B, sizes)
        even = half % (sizes["ROWS"] * sizes["COLUMNS"]) == 0 and length % sizes["CHUNK"] == 0
        strides = [s for t in (u, delta, u if z is None else z) for s in t.stride()[:2]]
        strides += [s for t in (B, C) for s in t.stride()[:3]]
        kernel[blocks * directions, batch](
            *tensors, *before, length, half, d_state, *strides,
            HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=softplus,
            MASKED=not even or block_n != d_state, DIRECTIONS=directions, BLOCK_N=block_n, num_warps=1,
            **sizes, **flags,
        )  # fmt: skip

    def _room_for(t: Tensor | None, like: Tensor) -> Tensor:
        """Room for the gradient of an input that may be missing (custom operators return tensors only)."""
        return like.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)

    INPUTS = (
        "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, bool softplus"
    )
    GRADIENTS = ", ".join(["Tensor"] * 8)

    @torch.library.custom_op("mamba_ginr::selective_scan", mutates_args=(), schema=f"({INPUTS}) -> Tensor")
    def _triton_scan(u, delta, A, B, C, D, z, delta_bias, softplus):
        out = torch.empty_like(u, memory_format=torch.contiguous_format)
        inputs = (u, delta, A, B, C, D, z, delta_bias)
        _launch(_forward_kernel, (*inputs, out, None), *inputs, softplus, FORWARD, STATES_ONLY=False)
        return out

    @torch.library.custom_op(
        "mamba_ginr::selective_scan_backward", mutates_args=(), schema=f"(Tensor dout, {INPUTS}) -> ({GRADIENTS})"
    )
    def _triton_scan_backward(dout, u, delta, A, B, C, D, z, delta_bias, softplus):
        inputs, (batch, length, channels) = (u, delta, A, B, C, D, z, delta_bias), u.shape
        chunks = triton.cdiv(length, BACKWARD["CHUNK"])
        starts = A.new_empty(batch, chunks, A.shape[1], channels)
        sizes = {**FORWARD, "CHUNK": BACKWARD["CHUNK"]}
        _launch(_forward_kernel, (*inputs, None, starts), *inputs, softplus, sizes, STATES_ONLY=True)

        du, ddelta, dz = (_room_for(t, u) for t in (u, delta, z))
        _, blocks, block_n = _sizes(u, A, B, BACKWARD)
        new = A.new_empty if u.numel() else A.new_zeros  # without input no kernel runs to fill them
        dA, dB, dC = new(batch, *A.shape), new(blocks, *B.shape), new(blocks, *B.shape)
        dD, dbias = (new(batch, 0 if t is None else channels) for t in (D, delta_bias))
        program = BACKWARD["CHUNK"] * BACKWARD["ROWS"] * BACKWARD["COLUMNS"] * block_n
        scratch = A.new_empty(batch * blocks * B.shape[2] * program)
        tensors = (dout, *inputs, starts, scratch, du, ddelta, dz, dA, dB, dC, dD, dbias)
        before = (batch, *dout.stride()[:2])
        _launch(_backward_kernel, tensors, *inputs, softplus, BACKWARD, before)
        return du, ddelta, dA.sum(0), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype), dD.sum(0), dz, dbias.sum(0)

    @_triton_scan.register_fake
    def _(u, delta, A, B, C, D, z, delta_bias, softplus):
        return torch.empty_like(u, memory_format=torch.contiguous_format)

    @_triton_scan_backward.register_fake
    def _(dout, u, delta, A, B, C, D, z, delta_bias, softplus):
        return tuple(_room_for(t, u) for t in (u, delta, A, B, C, D, z, delta_bias))

    def _save_inputs(ctx, inputs, output) -> None:
        *tensors, ctx.softplus = inputs
        ctx.save_for_backward(*tensors)

    def _gradients(ctx, dout: Tensor):
        tensors = ctx.saved_tensors
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        gradients = _triton_scan_backward(dout, *tensors, ctx.softplus)
        return *(None if t is None else g for t, g in zip(tensors, gradients)), None

    _triton_scan.register_autograd(_gradients, setup_context=_save_inputs)
