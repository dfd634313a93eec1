"""What each part of a long sequence begins with, where it is cut into parts that run side by side.

A state is linear in the one before: after a part it is what the part gives from zero, and 2^(sum of its step sizes ·
log2 e · A) times the state before. ``forward_kernel`` with ENDS finds the first, for all parts at once, and
``join_kernel`` goes through the parts. Backwards ``carries_kernel`` finds what each part alone gives to the gradient of
the state before it, and ``join_kernel`` goes back.
"""

import triton
import triton.language as tl

from mamba_ginr.kernels.selective_scan.triton_kernels import EXP2_SHORT, _owned, _part_of, _read_inputs, _spread, _step
from mamba_ginr.kernels.triton_tiles import read, rows_of, sigmoid, sum_of


@triton.jit(do_not_specialize=["count"])
def join_kernel(
    values, totals, A, to, to_batch, to_part, count, d_state, channels,
    BACKWARD: tl.constexpr, COLUMNS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """From what each part gives alone, values (batch, parts, d_state, channels), what each begins with.

    Forwards x[p + 1] = values[p] + 2^(totals[p] A) x[p] goes to place p, backwards x[p − 1] = values[p] +
    2^(totals[p] A) x[p] to place p − 1, both from zero; totals are (batch, parts, channels).
    """
    d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    n, batch, there = tl.program_id(1), tl.program_id(2).to(tl.int64), d < channels
    A_n, x = tl.load(A + n * channels + d, mask=there, other=0.0), tl.zeros([COLUMNS], tl.float32)
    to += batch * to_batch + n * channels + d
    for i in range(0, count - 1, AHEAD):
        queue = ()  # of several parts at once, since a load waits for the store before it
        for k in tl.static_range(AHEAD):
            row = batch * count + (count - 1 - i - k if BACKWARD else i + k)
            here = there & (i + k < count - 1)
            total = tl.load(totals + row * channels + d, mask=here, other=0.0)
            value = tl.load(values + (row * d_state + n) * channels + d, mask=here, other=0.0)
            queue = queue + ((tl.exp2(total * A_n), value),)
        for k in tl.static_range(AHEAD):
            decay, value = queue[k]
            x = value + decay * x
            place = count - 2 - i - k if BACKWARD else i + k
            tl.store(to + place * to_part, x, mask=there & (i + k < count - 1))


@triton.jit(do_not_specialize=["length", "per_part"])
def carries_kernel(
    dout, u, delta, A, pairs, D, z, delta_bias, carries, totals, dout_batch, dout_time, length, half, d_state,
    u_batch, u_time, delta_batch, delta_time, z_batch, z_time, per_part,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    MASKED: tl.constexpr, DIRECTIONS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of each part the gradient of the states before it, of its own outputs alone (batch, parts, d_state, channels),
    and the sum of its step sizes times log2 e (batch, parts, channels)."""
    direction, _block, d, in_half, _skip, bias = _owned(half, D, delta_bias, HAS_D, HAS_BIAS, MASKED, COLUMNS)
    batch, lane = tl.program_id(1).to(tl.int64), tl.arange(0, COLUMNS)
    channels, chunks, row = DIRECTIONS * half, tl.cdiv(length, CHUNK), d[None, :]
    part, first, last = _part_of(chunks, per_part, True)
    u, delta, dout = u + batch * u_batch + row, delta + batch * delta_batch + row, dout + batch * dout_batch + row
    if HAS_Z:
        z += batch * z_batch + row
    A += d
    piece = batch * tl.num_programs(2) + part
    carries += piece * d_state * channels + d
    pairs += (batch * DIRECTIONS + direction) * chunks * d_state * (2 * CHUNK) + lane
    total = tl.zeros([COLUMNS], tl.float32)
    for back in range(last - first):
        chunk = last - 1 - back
        u_tile, raw_tile, z_tile, dout_tile = _read_inputs(
            u, delta, z, dout, chunk, length, direction, in_half, u_time, delta_time, z_time, dout_time,
            HAS_Z, MASKED, CHUNK,
        )  # fmt: skip
        us, raws, zs, douts = rows_of(u_tile), rows_of(raw_tile), rows_of(z_tile), rows_of(dout_tile)
        deltas, dys = (), ()
        for i in tl.static_range(CHUNK):
            dy, z_i = douts[i].to(tl.float32), zs[i].to(tl.float32)
            if HAS_Z:
                dy *= z_i * sigmoid(z_i)
            delta_i, _write = _step(us[i], raws[i], bias, chunk * CHUNK + i < length, SOFTPLUS, MASKED)
            deltas, dys = deltas + (delta_i,), dys + (dy,)
        total += sum_of(deltas)
        now = pairs + chunk * d_state * (2 * CHUNK)
        for n in range(d_state):
            A_n, pair = read(A, n * channels, in_half, MASKED), tl.load(now + n * (2 * CHUNK))
            dh = tl.load(carries + n * channels, mask=in_half & (back > 0), other=0.0)
            _Bs, Cs = _spread(pair, COLUMNS, CHUNK)
            for i in tl.static_range(CHUNK - 1, -1, -1):
                dh = tl.exp2(tl.fma(deltas[i], A_n, EXP2_SHORT)) * tl.fma(Cs[i], dys[i], dh)
            tl.store(carries + n * channels, dh, mask=in_half)
    tl.store(totals + piece * channels + d, total, mask=in_half)
