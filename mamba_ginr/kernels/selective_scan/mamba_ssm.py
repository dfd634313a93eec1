"""The selective scan of the package mamba-ssm, a CUDA kernel: the backend "mamba_ssm"."""

import importlib
import importlib.util

import torch
from torch import Tensor

from mamba_ginr.kernels.backends import first_line, lacks_memory, register
from mamba_ginr.kernels.selective_scan.directions import one_direction_at_a_time

# Without these flags pip may reuse a build without the kernel, or give up where no ready wheel can be looked up.
INSTALL = (
    "MAMBA_FORCE_BUILD=TRUE MAMBA_KEEP_CUDA_BUILD=TRUE "
    "pip install --no-build-isolation --no-cache-dir -r requirements-cuda.txt"
)
REBUILD = f"{INSTALL} --force-reinstall --no-deps"


@one_direction_at_a_time
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


def _try_mamba_ssm(device: torch.device) -> str:
    if importlib.util.find_spec("mamba_ssm") is None:
        return f"mamba-ssm is not installed, as nothing needs it; where nvcc is: make mamba-ssm, or {INSTALL}"
    try:
        scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    except ModuleNotFoundError as error:
        if error.name == "selective_scan_cuda":
            return f"mamba-ssm is installed without its CUDA kernel; rebuild it: {REBUILD}"
        return f"mamba-ssm lacks the package {error.name}; install it: pip install {error.name}"
    except Exception as error:
        # A clash with transformers, or a kernel built for another torch (undefined symbol).
        return f"mamba-ssm does not import ({first_line(error)}); rebuild its newest release: {REBUILD}"
    try:
        # Some releases import without the kernel and fail at the first call only.
        x = torch.ones(1, 1, 8, device=device)
        scan(x, x, torch.full((1, 1), -1.0, device=device), x, x).sum().item()
    except Exception as error:
        if lacks_memory(error):
            raise
        return f"mamba-ssm's CUDA kernel does not run ({first_line(error)}); rebuild it: {REBUILD}"
    return ""


register("selective_scan", "mamba_ssm", _scan_mamba_ssm, _try_mamba_ssm)
