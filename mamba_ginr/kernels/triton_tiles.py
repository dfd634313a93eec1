"""What several of the Triton kernels share, on the GPU and around a launch; imported only where Triton is there."""

from collections.abc import Callable
from functools import wraps

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import forward_ad

from mamba_ginr.kernels.backends import INSTEAD, REFUSED

LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


@triton.jit
def sigmoid(x):
    """1 / (1 + e⁻ˣ) without tl.sigmoid's care for subnormal numbers; a root takes fewer instructions than 1 / x."""
    root = tl.rsqrt(1 + tl.exp2(x * -LOG2_E))
    return root * root


@triton.jit
def read(pointer, offsets, mask, MASKED: tl.constexpr):
    """Read; 0 where masked."""
    if MASKED:
        return tl.load(pointer + offsets, mask=mask, other=0.0)
    else:
        return tl.load(pointer + offsets)


@triton.jit
def share_of_grid(half, COLUMNS: tl.constexpr):
    """Of the first axis of the grid: direction, block of channels, and the channels within the direction."""
    blocks = tl.cdiv(half, COLUMNS)
    block = tl.program_id(0) % blocks
    return tl.program_id(0) // blocks, block, block * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def place_of(step, length, direction):
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
def rows_of(tile):
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
def tile_of(rows):
    """Undo ``rows_of``."""
    columns = ()
    for i in tl.static_range(len(rows)):
        columns = columns + (tl.reshape(rows[i], (rows[i].shape[0], 1)),)
    columns = _pairs_of(_pairs_of(_pairs_of(_pairs_of(columns))))
    if len(rows) == 32:
        columns = _pairs_of(columns)
    return tl.trans(columns[0])


@triton.jit
def sum_of(rows):
    """Sum of 16 or 32 tensors, two and two."""
    for _level in tl.static_range(4 if len(rows) == 16 else 5):
        sums = ()
        for i in tl.static_range(len(rows) // 2):
            sums = sums + (rows[2 * i] + rows[2 * i + 1],)
        rows = sums
    return rows[0]


@triton.jit
def zeros_like(rows):
    zeros = ()
    for i in tl.static_range(len(rows)):
        zeros = zeros + (tl.zeros_like(rows[i]),)
    return zeros


@triton.jit
def _sum_kernel(parts, total, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum of (rows, columns) over its rows, in the same order at every run."""
    row, column = tl.arange(0, ROWS)[:, None], tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    parts += row.to(tl.int64) * columns + column[None, :]
    step = tl.full([], ROWS, tl.int64) * columns  # a place counted from the start might need more than 32 bits
    for first in range(0, rows, ROWS):
        mask = (first + row < rows) & (column < columns)[None, :]
        sums += tl.load(parts, mask=mask, other=0.0)
        parts += step
    tl.store(total + column, tl.sum(sums, 0), mask=column < columns)


def sum_rows(parts: Tensor) -> Tensor:
    """parts.sum(0) of a contiguous float32 tensor, where PyTorch's own takes three times as long."""
    total = parts.new_empty(parts.shape[1:])
    if total.numel():
        columns = 8 if total.numel() < 4096 else 16  # so that few columns, too, are shared by many programs
        grid = (triton.cdiv(total.numel(), columns),)
        _sum_kernel[grid](parts, total, len(parts), total.numel(), ROWS=128, COLUMNS=columns)
    return total


GRID = 65_535  # CUDA's limit of a grid's second and third axis
INT32 = 2**31  # the kernels count the places within one sequence in 32 bits; from image to image in 64


def on_its_gpu(run: Callable) -> Callable:
    """Make the GPU of an operator's first tensor the current one, on which Triton launches wherever the tensors are."""

    @wraps(run)
    def there(*inputs):
        tensor = inputs[0] if inputs[0] is not None else inputs[1]
        with torch.cuda.device_of(tensor):
            return run(*inputs)

    return there


def by_images(run: Callable, *sequences: Tensor | None) -> Tensor:
    """``run(*sequences)`` for so many images at once as a grid takes, which nearly always is all."""
    images = len(sequences[0])
    if images <= GRID:
        return run(*sequences)
    firsts = range(0, images, GRID)
    return torch.cat([run(*(None if t is None else t[i : i + GRID] for t in sequences)) for i in firsts])


def expect_countable(name: str, length: int, width: int) -> None:
    """ValueError for a sequence whose places 32 bits cannot count; ``width`` is of the widest row of numbers."""
    if (length + 64) * width >= INT32:  # a kernel may look some steps ahead
        raise ValueError(
            f"{name}: a sequence of {length:,} steps of up to {width:,} numbers; the backend triton counts to 2**31 "
            f'= {INT32:,} within a sequence. Cut it in shorter ones, or use_backend("torch", device)'
        )


@torch.compiler.assume_constant_result
def _differentiated_otherwise() -> bool:
    """Whether forward mode, or a transform of torch.func that differentiates, is at work."""
    functorch = torch._C._functorch
    kinds = functorch.TransformType.Grad, functorch.TransformType.Jvp
    return forward_ad._current_level >= 0 or any(i.key() in kinds for i in functorch.get_interpreter_stack() or ())


def expect_plain_gradients(name: str) -> None:
    """RuntimeError where an operator's derivative would be lost, or end in an error about PyTorch's insides."""
    if _differentiated_otherwise():
        raise RuntimeError(f"{name}: the backend triton {REFUSED}. {INSTEAD}.")


def contiguous_rows(t: Tensor) -> Tensor:
    """The kernels step through time and batch by strides, but read channels and states side by side."""
    return t if t.stride(-1) == 1 and (t.shape[1] + 64) * t.stride(1) < INT32 else t.contiguous()


def gradients_wanted(inputs: tuple) -> bool:
    """Whether what a backward pass wants is to be kept."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def room_for(t: Tensor | None, like: Tensor) -> Tensor:
    """Room for the gradient of an input that may be missing (custom operators return tensors only)."""
    return like.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
