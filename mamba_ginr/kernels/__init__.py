"""How MAMBA-GINR runs fast: the operations of its layers, each in plain PyTorch and, where it can run, in Triton.

    from mamba_ginr.kernels import selective_scan, use_backend

    backend, why = use_backend("auto", device)
    y = selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus=True)

Imports go one way: the public functions ask ``backends`` what to run, the implementations register there, and kernels
import nothing above them.
"""

from mamba_ginr.kernels import backends
from mamba_ginr.kernels.add_norm import add_norm
from mamba_ginr.kernels.backends import (
    BACKENDS,
    backend_fault,
    backend_for,
    choose_backend,
    mamba_ssm_fault,
    triton_fault,
    use_backend,
)
from mamba_ginr.kernels.causal_conv import causal_conv
from mamba_ginr.kernels.compile_ahead import compile_ahead
from mamba_ginr.kernels.mamba_inner import mamba_inner
from mamba_ginr.kernels.mlp import mlp
from mamba_ginr.kernels.reorder import reorder
from mamba_ginr.kernels.selective_scan import selective_scan

if backends.triton is not None:  # the only place that decides so; each of these registers what it can run
    from mamba_ginr.kernels import add_norm_triton, causal_conv_triton, mamba_inner_triton, mlp_triton  # noqa: F401
    from mamba_ginr.kernels.selective_scan import triton_ops  # noqa: F401

# A name that a module and its function share is the function here; from a module itself, import by its full path.
__all__ = [
    "BACKENDS",
    "add_norm",
    "backend_fault",
    "backend_for",
    "causal_conv",
    "choose_backend",
    "compile_ahead",
    "mamba_inner",
    "mamba_ssm_fault",
    "mlp",
    "reorder",
    "selective_scan",
    "triton_fault",
    "use_backend",
]
