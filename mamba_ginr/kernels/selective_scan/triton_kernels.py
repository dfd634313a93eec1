"""The Triton kernels of the selective scan; ``triton_ops`` launches them.

One program, one warp, owns one image of the batch and COLUMNS channels of one direction, one to a thread. It takes
time in chunks of CHUNK steps and, within a chunk, one state after the other: all that a state needs for the steps of
a chunk then lies in registers, and only the state itself goes to memory between chunks. Inputs are read as tiles
(steps, channels) and cut into one tensor (channels,) for each step, which is free where a thread holds a channel.

The forward pass keeps the states after every chunk, if there will be a backward pass. That starts from them: it walks
through a chunk once more, its states and decays now in registers, and back.

Where the images are few and long, a sequence is cut into parts of ``per_part`` chunks, each with programs of its own.
What a part begins with is found first: by ``forward_kernel`` with ENDS and the kernels of ``triton_parts``.

A warp waits longer for memory than it computes, and a load does not pass a store: what comes next, state or chunk,
is asked for before the present one is worked on.

Nothing is accumulated with atomics: sums over channels (dB, dC) and over the batch (dA, dD, ddelta_bias) leave the
kernel as partial sums and are added afterwards, so that gradients are the same at every run.
"""

import triton
import triton.language as tl

from mamba_ginr.kernels.triton_tiles import (
    LN_2,
    LOG2_E,
    place_of,
    read,
    rows_of,
    share_of_grid,
    sigmoid,
    sum_of,
    tile_of,
    zeros_like,
)

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
def _owned(
    half, D, delta_bias,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, MASKED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What a program of the scan owns: direction, block, channels and whether they are there, their D and bias."""
    direction, block, inner = share_of_grid(half, COLUMNS)
    in_half, d = inner < half, direction * half + inner
    zero = tl.zeros([COLUMNS], tl.float32)
    skip = read(D, d, in_half, MASKED) if HAS_D else zero
    bias = read(delta_bias, d, in_half, MASKED) if HAS_BIAS else zero
    return direction, block, d, in_half, skip, bias


@triton.jit
def _add(total, lost, term):
    """Add to a long sum, with what the last addition lost (Kahan): the sum, and what is lost now."""
    term -= lost
    larger = total + term
    return larger, (larger - total) - term


@triton.jit
def _places(chunk, length, direction, in_half, CHUNK: tl.constexpr):
    """Of a chunk: places of its steps in the sequence (CHUNK, 1); which channels of which steps are there."""
    step = chunk * CHUNK + tl.arange(0, CHUNK)[:, None]
    return place_of(step, length, direction), (step < length) & in_half[None, :]


@triton.jit
def _part_of(chunks, per_part, PARTS: tl.constexpr):
    """The program's part of the sequence, its first chunk and that after its last; without PARTS all of it."""
    if PARTS:
        part = tl.program_id(2)
        return part, part * per_part, tl.minimum((part + 1) * per_part, chunks)
    else:
        return 0, 0, chunks


@triton.jit
def _read_tile(rows, row_time, chunk, length, direction, in_half, MASKED: tl.constexpr, CHUNK: tl.constexpr):
    """The program's channels at the steps of a chunk, as they are stored (CHUNK, COLUMNS); nothing of use before
    the first chunk and after the last."""
    place, there = _places(chunk, length, direction, in_half, CHUNK)
    return read(rows, place * row_time, there, MASKED)


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
    """Of a state: A, the state before the chunk (chunk 0: zero), B and C within; 0 if there is no such state."""
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
    rows = rows_of(tl.broadcast_to(pair[:, None], (2 * CHUNK, COLUMNS)))
    return rows[:CHUNK], rows[CHUNK:]


@triton.jit
def pack_kernel(
    B, C, pairs, length, chunks, d_state, B_batch, B_time, B_group, C_batch, C_time, C_group,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """B and C, in float32, of a state and a chunk side by side, in the order of a direction's steps."""
    chunk, direction, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i, n = tl.arange(0, CHUNK)[:, None], tl.arange(0, BLOCK_N)[None, :]
    place, here = place_of(chunk * CHUNK + i, length, direction), n < d_state
    to = pairs + (((batch * tl.num_programs(1) + direction) * chunks + chunk) * d_state + n) * (2 * CHUNK) + i
    B_t = tl.load(B + batch * B_batch + place * B_time + direction * B_group + n, mask=here)
    C_t = tl.load(C + batch * C_batch + place * C_time + direction * C_group + n, mask=here)
    tl.store(to, B_t.to(tl.float32), mask=here)
    tl.store(to + CHUNK, C_t.to(tl.float32), mask=here)


@triton.jit
def unpack_kernel(
    dpairs, dBC, dBC_batch, dBC_time, length, chunks, d_state, blocks, block_stride,
    BLOCK_N: tl.constexpr, DIRECTIONS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Add the blocks' sums for B and C, and put them where they belong in the sequence."""
    chunk, direction, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    lane, n = tl.arange(0, 2 * CHUNK)[:, None], tl.arange(0, BLOCK_N)[None, :]
    dpairs += ((batch * DIRECTIONS + direction) * chunks + chunk) * d_state * (2 * CHUNK) + n * (2 * CHUNK) + lane
    total = tl.zeros([2 * CHUNK, BLOCK_N], tl.float32)
    for _block in range(blocks):
        total += tl.load(dpairs, mask=n < d_state, other=0.0)
        dpairs += block_stride  # a place counted from the first block might need more than 32 bits
    step, which = chunk * CHUNK + lane % CHUNK, lane // CHUNK  # 0 for B, 1 for C
    dBC += batch * dBC_batch + place_of(step, length, direction) * dBC_time
    mask = (step < length) & (n < d_state)
    tl.store(dBC + (which * DIRECTIONS + direction) * d_state + n, total.to(dBC.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["length", "per_part"])
def forward_kernel(
    u, delta, A, pairs, D, z, delta_bias, out, states, states_batch, slot, length, half, d_state,
    u_batch, u_time, delta_batch, delta_time, z_batch, z_time, per_part, states_part,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    MASKED: tl.constexpr, DIRECTIONS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, PARTS: tl.constexpr, ENDS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """The output and the states after the chunks. With ENDS of each part, as if it were the first, the state after it
    alone, and in place of the output the sum of its step sizes times log2 e (batch, parts, channels)."""
    direction, _block, d, in_half, skip, bias = _owned(half, D, delta_bias, HAS_D, HAS_BIAS, MASKED, COLUMNS)
    batch, lane = tl.program_id(1).to(tl.int64), tl.arange(0, COLUMNS)
    channels, chunks = DIRECTIONS * half, tl.cdiv(length, CHUNK)
    row = d[None, :]
    u, delta = u + batch * u_batch + row, delta + batch * delta_batch + row
    part, first, last = _part_of(chunks, per_part, PARTS)
    begin = first if ENDS else 0  # the chunk before which all states are zero
    if HAS_Z:
        z += batch * z_batch + row
    A += d
    states += batch * states_batch + d
    if PARTS:
        states += part * states_part
    pairs += (batch * DIRECTIONS + direction) * chunks * d_state * (2 * CHUNK) + lane
    total = tl.zeros([COLUMNS], tl.float32)

    u_next = _read_tile(u, u_time, first, length, direction, in_half, MASKED, CHUNK)
    delta_next = _read_tile(delta, delta_time, first, length, direction, in_half, MASKED, CHUNK)
    for chunk in range(first, last):
        place, there = _places(chunk, length, direction, in_half, CHUNK)
        us, raws, deltas, writes = rows_of(u_next), rows_of(delta_next), (), ()
        for i in tl.static_range(CHUNK):
            delta_i, write_i = _step(us[i], raws[i], bias, chunk * CHUNK + i < length, SOFTPLUS, MASKED)
            deltas, writes = deltas + (delta_i,), writes + (write_i,)
        if ENDS:
            total += sum_of(deltas)
        ys = zeros_like(deltas)
        kept = in_half
        if PARTS and not ENDS:  # the next part begins with what was put there before
            kept = in_half & ((chunk + 1 < last) | (last == chunks))

        before, now = states + (chunk - 1) * slot, pairs + chunk * d_state * (2 * CHUNK)
        queue = ()  # what the next states need, read ahead
        for k in tl.static_range(AHEAD):
            queue = queue + (_read_state(A, before, now, k, chunk - begin, d_state, channels, in_half, CHUNK),)
        for n in range(0, d_state, AHEAD):
            ahead = ()
            for k in tl.static_range(AHEAD):
                n_next = n + AHEAD + k
                of_next = _read_state(A, before, now, n_next, chunk - begin, d_state, channels, in_half, CHUNK)
                ahead = ahead + (of_next,)
            for k in tl.static_range(AHEAD):
                A_n, h, pair = queue[k]
                Bs, Cs = _spread(pair, COLUMNS, CHUNK)
                sums = ()
                for i in tl.static_range(CHUNK):
                    h = tl.fma(tl.exp2(tl.fma(deltas[i], A_n, EXP2_SHORT)), h, writes[i] * Bs[i])
                    if not ENDS:
                        sums = sums + (ys[i] + h * Cs[i],)
                if not ENDS:
                    ys = sums
                tl.store(states + chunk * slot + (n + k) * channels, h, mask=kept & (n + k < d_state))
            queue = ahead

        # What the states have in common; u is read once more rather than kept.
        u_tile = _read_tile(u, u_time, chunk, length, direction, in_half, MASKED, CHUNK)
        z_tile = _read_tile(z, z_time, chunk, length, direction, in_half, MASKED, CHUNK) if HAS_Z else u_tile
        u_next = _read_tile(u, u_time, chunk + 1, length, direction, in_half, MASKED, CHUNK)
        delta_next = _read_tile(delta, delta_time, chunk + 1, length, direction, in_half, MASKED, CHUNK)
        if not ENDS:
            us, zs, outs = rows_of(u_tile), rows_of(z_tile), ()
            for i in tl.static_range(CHUNK):
                y = ys[i]
                if HAS_D:
                    y += skip * us[i].to(tl.float32)
                if HAS_Z:
                    z_i = zs[i].to(tl.float32)
                    y *= z_i * sigmoid(z_i)
                outs = outs + (y.to(out.dtype.element_ty),)
            tl.store(out + batch * length * channels + row + place * channels, tile_of(outs), mask=there)
    if ENDS:
        tl.store(out + (batch * tl.num_programs(2) + part) * channels + d, total, mask=in_half)


@triton.jit(do_not_specialize=["length", "batches", "per_part"])
def backward_kernel(
    dout, u, delta, A, pairs, D, z, delta_bias, states, scratch, du, ddelta, dz, dA, dpairs, dvectors,
    batches, dout_batch, dout_time, dz_batch, dz_time, length, half, d_state,
    u_batch, u_time, delta_batch, delta_time, z_batch, z_time, per_part,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    MASKED: tl.constexpr, DIRECTIONS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
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
    part, first, last = _part_of(chunks, per_part, PARTS)
    states += batch * chunks * slot + row
    piece, pieces = batch, batches
    if PARTS:
        piece, pieces = batch * tl.num_programs(2) + part, batches * tl.num_programs(2)
    copy, carried, dA = scratch + piece * slot, scratch + (pieces + piece) * slot + d, dA + piece * slot + d
    pairs += (batch * DIRECTIONS + direction) * chunks * d_state * (2 * CHUNK) + lane
    dpairs += ((block * batches + batch) * DIRECTIONS + direction) * chunks * d_state * (2 * CHUNK) + lane
    n_tile = tl.arange(0, BLOCK_N)[:, None]
    state_there = (n_tile < d_state) & in_half[None, :]

    dD_d, dD_lost, dbias_d, dbias_lost = zero, zero, zero, zero
    u_next, delta_next, z_next, dout_next = _read_inputs(
        u, delta, z, dout, last - 1, length, direction, in_half, u_time, delta_time, z_time, dout_time,
        HAS_Z, MASKED, CHUNK,
    )  # fmt: skip
    mask = state_there & (last > 1)
    before_next = tl.load(states + (last - 2) * slot + n_tile * channels, mask=mask, other=0.0)
    for back in range(last - first):
        chunk = last - 1 - back
        place, there = _places(chunk, length, direction, in_half, CHUNK)
        # The states before the chunk come from far away: all at once, to where they are near.
        tl.store(copy + n_tile * channels + row, before_next, mask=state_there)
        us, raws, zs, douts = rows_of(u_next), rows_of(delta_next), rows_of(z_next), rows_of(dout_next)
        deltas, writes, dys, skipped = (), (), (), ()
        for i in tl.static_range(CHUNK):
            dy, u_i, z_i = douts[i].to(tl.float32), us[i].to(tl.float32), zs[i].to(tl.float32)
            if HAS_Z:
                dy *= z_i * sigmoid(z_i)
            delta_i, write_i = _step(u_i, raws[i], bias, chunk * CHUNK + i < length, SOFTPLUS, MASKED)
            deltas, writes = deltas + (delta_i,), writes + (write_i,)
            dys, skipped = dys + (dy,), skipped + (dy * u_i,)
        if HAS_D:
            dD_d, dD_lost = _add(dD_d, dD_lost, sum_of(skipped))
        ys, dwrites, dexponents = zeros_like(deltas), zeros_like(deltas), zeros_like(deltas)
        tl.debug_barrier()  # what other threads have put there is read now

        later, now = in_half & (back > 0), pairs + chunk * d_state * (2 * CHUNK)
        carries = later
        if PARTS:
            carries = in_half & ((back > 0) | (last < chunks))  # from a later part, too
        A_next, pair_next, h_next = read(A, 0, in_half, MASKED), tl.load(now), tl.load(copy + d, mask=in_half)
        dh_next, dA_next = tl.load(carried, mask=carries, other=0.0), tl.load(dA, mask=later, other=0.0)
        for n in range(d_state):
            A_n, pair, h, dh, dA_n = A_next, pair_next, h_next, dh_next, dA_next
            # The next state's, read ahead.
            n_next = tl.minimum(n + 1, d_state - 1)
            A_next, pair_next = read(A, n_next * channels, in_half, MASKED), tl.load(now + n_next * (2 * CHUNK))
            h_next = tl.load(copy + n_next * channels + d, mask=in_half)
            dh_next = tl.load(carried + n_next * channels, mask=carries, other=0.0)
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
            products = tl.trans(tile_of(dBs + dCs))
            tl.store(dpairs + (chunk * d_state + n) * (2 * CHUNK), sum_of(rows_of(products)))

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
        us, raws, zs, douts = rows_of(u_tile), rows_of(raw_tile), rows_of(z_tile), rows_of(dout_tile)
        dus, ddeltas, dzs, dbias = (), (), (), ()
        for i in tl.static_range(CHUNK):
            u_i, z_i = us[i].to(tl.float32), zs[i].to(tl.float32)
            ddelta_i, du_i = dwrites[i] * u_i + dexponents[i], dwrites[i] * (deltas[i] * LN_2)
            if SOFTPLUS:
                ddelta_i *= sigmoid(raws[i].to(tl.float32) + bias)  # the derivative of softplus
            if HAS_D:
                du_i += skip * dys[i]
            if HAS_Z:
                open_z = sigmoid(z_i)
                dz_i = douts[i].to(tl.float32) * (ys[i] + skip * u_i) * open_z * (1 + z_i * (1 - open_z))
                dzs = dzs + (dz_i.to(dz.dtype.element_ty),)
            dus, ddeltas = dus + (du_i.to(du.dtype.element_ty),), ddeltas + (ddelta_i.to(ddelta.dtype.element_ty),)
            dbias = dbias + (tl.where(chunk * CHUNK + i < length, ddelta_i, 0.0) if MASKED else ddelta_i,)
        if HAS_BIAS:
            dbias_d, dbias_lost = _add(dbias_d, dbias_lost, sum_of(dbias))
        if HAS_Z:
            tl.store(dz + place * dz_time, tile_of(dzs), mask=there)
        tl.store(ddelta + place * channels, tile_of(ddeltas), mask=there)
        tl.store(du + place * channels, tile_of(dus), mask=there)
        tl.debug_barrier()

    # Sums over this part of the image's time, of D and of delta_bias: (batch, parts, 2, channels).
    dvectors += piece * 2 * channels + d
    tl.store(dvectors, dD_d, mask=in_half)
    tl.store(dvectors + channels, dbias_d, mask=in_half)
