"""All Triton kernels compile for a GPU that need not be here, which the interpreter of the other tests cannot tell."""

from kernel_checks import needs_triton

OF_MAMBA = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mamba_ginr.kernels import causal_conv_triton as conv
from mamba_ginr.kernels import triton_tiles as tiles
from mamba_ginr.kernels.selective_scan import triton_kernels as scan
from mamba_ginr.kernels.selective_scan import triton_parts
from mamba_ginr.kernels.selective_scan.triton_ops import FORWARD, SIZES

flags = dict(HAS_D=True, HAS_Z=True, HAS_BIAS=True, SOFTPLUS=True, MASKED=True)
sizes = dict(DIRECTIONS=2, BLOCK_N=16, **SIZES)
cuts = [dict(PARTS=parts, ENDS=ends) for parts, ends in ((False, False), (True, True), (True, False))]
packing = dict(BLOCK_N=16, CHUNK=SIZES["CHUNK"])
float32 = "A D delta_bias pairs states scratch dA dpairs dvectors weight bias parts total carries totals values to"
bfloat16 = "dout u delta B C z out du ddelta dz dBC x dx"
kernels = [
    (scan.pack_kernel, packing),
    *((scan.forward_kernel, {**flags, **sizes, "AHEAD": FORWARD["AHEAD"], **cut}) for cut in cuts),
    *((scan.backward_kernel, {**flags, **sizes, "PARTS": parts}) for parts in (False, True)),
    (triton_parts.carries_kernel, {**flags, **sizes}),
    (triton_parts.join_kernel, {"BACKWARD": True, "COLUMNS": 32, "AHEAD": 8}),
    (scan.unpack_kernel, {**packing, "DIRECTIONS": 2}),
    (tiles._sum_kernel, {"ROWS": 16, "COLUMNS": 32}),
    (conv._conv_forward_kernel, {**conv.CONV_FORWARD, "TAPS": 4}),
    (conv._conv_backward_kernel, {**conv.CONV_BACKWARD, "TAPS": 4}),
]
for kernel, constants in kernels:
    kinds = dict.fromkeys(float32.split(), "*fp32") | dict.fromkeys(bfloat16.split(), "*bf16")
    kinds |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, {name: kinds.get(name, "i32") for name in kernel.arg_names}, constants)
    print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1}).asm["cubin"]))
"""


@needs_triton
def test_triton_kernels_compile_for_a_gpu_that_is_not_here(compiled_sizes):
    assert [size > 1000 for size in compiled_sizes(OF_MAMBA)] == [True] * 12


OF_THE_LAYERS = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mamba_ginr.kernels import add_norm_triton as norm
from mamba_ginr.kernels import mlp_triton as mlp

KINDS = dict(x="*fp32", total="*fp32", bias="*fp32", branch_bias="*fp32", sums="*fp32")
KINDS |= dict(dbias="*fp32", eps="fp32", rows="i32", inner="i32", columns="i32", dim="i32")


def size(kernel, constants, **options):
    signature = {n: "constexpr" if n in constants else KINDS.get(n, "*fp16") for n in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    return len(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"])


for gelu in (True, False):
    for backward, sizes in ((False, mlp.FORWARD[gelu]), (True, mlp.BACKWARD[gelu])):
        tile = {n: sizes[n] for n in ("ROWS", "COLUMNS", "INNER")}
        absent = dict(bias=None) if backward else dict(dhidden=None, dbias=None)
        absent |= {} if backward or gelu else dict(kept=None)
        strides = dict(weight_k=512, weight_n=1) if backward else dict(weight_k=1, weight_n=512)
        flags = dict(GELU=gelu, BACKWARD=backward)
        options = dict(num_warps=sizes["num_warps"], num_stages=sizes["num_stages"])
        print(size(mlp._product_kernel, {**tile, **absent, **strides, **flags}, **options))
for branch in (True, False):
    KINDS["weight"] = "*fp32"
    forward, backward = norm.NORM_FORWARD, norm.NORM_BACKWARD
    absent = {} if branch else dict(branch=None, branch_bias=None)
    flags = dict(BRANCH=branch, ROWS=forward["ROWS"], DIM=256)
    print(size(norm._norm_forward_kernel, {**flags, **absent}, num_warps=forward["num_warps"]))
    flags = dict(STREAM=branch, ROWS=backward["ROWS"], DIM=256)
    print(size(norm._norm_backward_kernel, flags, num_warps=backward["num_warps"]))
"""


@needs_triton
def test_kernels_compile_for_a_gpu_that_is_not_here(compiled_sizes):
    assert [size > 1000 for size in compiled_sizes(OF_THE_LAYERS)] == [True] * 8
