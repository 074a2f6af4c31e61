"""The read of a memory on a GPU, in Triton: o + s·limit((φ(q) − μ)ᵀAB) in one pass, and its gradients in two.

    h = (φ(q) − μ)ᵀA,  a = hᵀB           (a full M is A, and a = h)
    w = |o|² + V·TINY·t,  t = 1/c²       (t = 0: no limit)
    f = √(w / (w + t·|a|²))
    o' = o + s·f·a

With p = s·∂/∂o' and d = Σ_v p·a:

    ∂a = f·p − k·a,  k = d·f·t / (w + t·|a|²)
    ∂o = ∂o' + k·|a|²/w·o
    ∂h = ∂a·Bᵀ,  ∂B = h·∂a,  ∂φ = ∂h·Aᵀ,  ∂A = (φ − μ)·∂h

Nothing is kept from forward to backward but the arguments: φ, h and a are computed again; :func:`rows_backward` hands
f·s and k of each token and head, two numbers, to :func:`factors_backward`.

A program has a tile of rows, the tokens and query heads of one memory: row n of its block is token ``n // REPEAT`` and
the head ``n % REPEAT`` of those that share the memory. Sizes are padded to powers of two, and what lies behind them is
neither read nor written. In a ``BANK`` of memories each token has a slot, -1: none; a program reads the slots that
occur among its tokens, one after the other. All arithmetic is in float32 but for products, whose factors have the
dtype ``DOT`` and whose sums are float32.
"""

from typing import no_type_check  # else the tests' shape checks would wrap what Triton compiles

import triton
import triton.language as tl

from prefixmemory.kernels import impl

EPS = tl.constexpr(1e-6)  # of memories/matrix.py
TINY = tl.constexpr(1e-12)  # of limit.py
INTERPRETED = tl.constexpr(impl.INTERPRETED)
NO_SLOT = tl.constexpr(2**30)

# KINDS and NORMS of impl.py, as they count; a form is kind·3 + norm.
ELU, GELU, RELU, SILU, IDENTITY, SOFTMAX = (tl.constexpr(n) for n in range(6))
QUERY_RMS, FEATURE_L2 = tl.constexpr(1), tl.constexpr(2)
# What is subtracted: nothing, μ from the features, or μᵀA from h.
OF_FEATURES, OF_HIDDEN = tl.constexpr(1), tl.constexpr(2)


@no_type_check
@triton.jit
def _dot(x, y, DOT: tl.constexpr):
    x, y = x.to(DOT), y.to(DOT)
    if INTERPRETED:  # Triton 3.7's interpreter takes the bits of bfloat16 for whole numbers
        x, y = x.to(tl.float32), y.to(tl.float32)
    # tf32x3: three products of tensor cores, which lose next to nothing of float32
    return tl.dot(x, y, input_precision="tf32x3")


@no_type_check
@triton.jit
def _cdf(x):
    """Of the normal distribution."""
    return 0.5 * (1 + tl.erf(x * 0.7071067811865476))


@no_type_check
@triton.jit
def _map(x, within, kind):
    """The feature map of this kind; ``within``: the columns that are there."""
    y = x
    if kind == ELU:
        y = tl.where(x > 0, x, tl.exp(tl.minimum(x, 0)) - 1)
    elif kind == GELU:
        y = x * _cdf(x)
    elif kind == RELU:
        y = tl.where(x > 0, x, 0.0)
    elif kind == SILU:
        y = x / (1 + tl.exp(-x))
    elif kind == SOFTMAX:
        power = tl.where(within, tl.exp(x - tl.max(tl.where(within, x, -float("inf")), axis=1)[:, None]), 0.0)
        y = power / tl.sum(power, axis=1)[:, None]
    return y


@no_type_check
@triton.jit
def _map_backward(x, dy, within, kind):
    dx = dy
    if kind == ELU:
        dx = tl.where(x > 0, dy, dy * tl.exp(tl.minimum(x, 0)))
    elif kind == GELU:
        dx = dy * (_cdf(x) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327)
    elif kind == RELU:
        dx = tl.where(x > 0, dy, 0.0)
    elif kind == SILU:
        share = 1 / (1 + tl.exp(-x))
        dx = dy * share * (1 + x * (1 - share))
    elif kind == SOFTMAX:
        y = _map(x, within, kind)
        dx = y * (dy - tl.sum(dy * y, axis=1)[:, None])
    return dx


@no_type_check
@triton.jit
def _features(q, within, kind, norm, D: tl.constexpr):
    """φ(q), normalised; zero in columns that are not there."""
    if norm == QUERY_RMS:
        q = q * tl.rsqrt(tl.sum(q * q, axis=1) / D + EPS)[:, None]
    y = _map(q, within, kind)
    if norm == FEATURE_L2:
        y = y * tl.rsqrt(tl.sum(y * y, axis=1) + EPS)[:, None]
    return y


@no_type_check
@triton.jit
def _features_backward(q, dy, within, kind, norm, D: tl.constexpr):
    x = q
    inverse = tl.rsqrt(tl.sum(q * q, axis=1) / D + EPS)[:, None]
    if norm == QUERY_RMS:
        x = q * inverse
    if norm == FEATURE_L2:
        y = _map(x, within, kind)
        length = tl.rsqrt(tl.sum(y * y, axis=1) + EPS)[:, None]
        dy = length * (dy - y * length * length * tl.sum(dy * y, axis=1)[:, None])
    dx = _map_backward(x, dy, within, kind)
    if norm == QUERY_RMS:
        dx = inverse * (dx - q * inverse * inverse / D * tl.sum(dx * q, axis=1)[:, None])
    return dx


@no_type_check
@triton.jit
def _matrix(pointer, rows, columns, row_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A matrix from ``pointer`` on, zero outside of ``ROWS`` × ``COLUMNS``."""
    inside = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    return tl.load(pointer + rows[:, None] * row_stride + columns[None, :], mask=inside, other=0.0)


@no_type_check
@triton.jit
def _block(block, memory, tokens, ROWS: tl.constexpr, TOKENS: tl.constexpr, REPEAT: tl.constexpr):
    """The token and the query head of each row of a block, and whether there is such a row."""
    row = tl.arange(0, ROWS)
    token = block * TOKENS + row // REPEAT
    return token, memory * REPEAT + row % REPEAT, (row < TOKENS * REPEAT) & (token < tokens)


@no_type_check
@triton.jit
def _at(token, head, columns, length, of_batch, of_token, of_head, of_column):
    """Where the rows of ``[batch, length, heads, size]`` lie, by the strides of its axes."""
    start = (token // length).to(tl.int64) * of_batch + (token % length).to(tl.int64) * of_token + head * of_head
    return start[:, None] + columns[None, :] * of_column


@no_type_check
@triton.jit
def _hidden(
    features, here, memory, slot, A, a_slot, a_memory, a_row, centre, c_slot, c_memory, d, r,
    D: tl.constexpr, R: tl.constexpr, CENTRE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """φ − μ, zero in rows that are not ``here``; A; and h."""
    if CENTRE == OF_FEATURES:
        mean = tl.load(centre + slot * c_slot + memory * c_memory + d, mask=d < D, other=0.0).to(tl.float32)
        features = features - mean[None, :]
    features = tl.where(here[:, None], features, 0.0)
    first = _matrix(A + slot * a_slot + memory * a_memory, d, r, a_row, D, R)
    hidden = _dot(features, first, DOT)
    if CENTRE == OF_HIDDEN:
        constant = tl.load(centre + slot * c_slot + memory * c_memory + r, mask=r < R, other=0.0).to(tl.float32)
        hidden = hidden - constant[None, :]
    return features, first, hidden


@no_type_check
@triton.jit(do_not_specialize=("tokens", "length"))
def forward(
    query, q0, q1, q2, q3, content, c0, c1, c2, c3, outputs, o0, o1, o2, o3, onto, n0, n1, n2, n3, out, y0, y1, y2, y3,
    A, a_slot, a_memory, a_row, B, b_slot, b_memory, b_row, centre, m_slot, m_memory,
    slots, s0, s1, tightness, scales, forms, rotary, asked, tokens, length, tight, scale,
    D: tl.constexpr, V: tl.constexpr, R: tl.constexpr, D_: tl.constexpr, V_: tl.constexpr, R_: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, REPEAT: tl.constexpr, KIND: tl.constexpr, NORM: tl.constexpr,
    CENTRE: tl.constexpr, FULL: tl.constexpr, LIMIT: tl.constexpr, ONTO: tl.constexpr, BANK: tl.constexpr,
    SERVED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """o' of a block of tokens and the heads of one memory.

    ``ONTO``: what is added to is ``onto``, not ``outputs``. ``SERVED``: ``rotary`` says of each slot whether it reads
    ``query`` rather than ``content``, ``asked`` is the scale of each token, NaN: its slot's, and ``out`` holds already
    what tokens without a slot have.
    """
    memory = tl.program_id(1)
    token, head, here = _block(tl.program_id(0), memory, tokens, ROWS, TOKENS, REPEAT)
    d, v, r = tl.arange(0, D_), tl.arange(0, V_), tl.arange(0, R_)
    slot = tl.where(here, 0, NO_SLOT)
    if BANK:
        slot = tl.load(slots + token // length * s0 + token % length * s1, mask=here, other=-1).to(tl.int32)
        if SERVED:
            here = here & (slot >= 0)
        slot = tl.where(slot >= 0, slot, NO_SLOT)
    in_q, in_o = here[:, None] & (d < D)[None, :], here[:, None] & (v < V)[None, :]
    own = tl.load(outputs + _at(token, head, v, length, o0, o1, o2, o3), mask=in_o, other=0.0).to(tl.float32)
    base = own
    if ONTO:
        base = tl.load(onto + _at(token, head, v, length, n0, n1, n2, n3), mask=in_o, other=0.0).to(tl.float32)
    new = base
    left = slot
    now = tl.min(left)
    while now < NO_SLOT:
        mine = slot == now
        if BANK:
            form = tl.load(forms + now).to(tl.int32)
            kind, norm = form // 3, form % 3
            tight, scale = tl.load(tightness + now), tl.load(scales + now)
        else:
            kind, norm = KIND, NORM
        shown = mine
        if SERVED:
            shown = tl.where(mine, tl.load(rotary + now).to(tl.int32), 0) != 0
            unrotated = in_q & mine[:, None] & (shown == 0)[:, None]
            at = _at(token, head, d, length, c0, c1, c2, c3)
            other = tl.load(content + at, mask=unrotated, other=0.0).to(tl.float32)
        at = _at(token, head, d, length, q0, q1, q2, q3)
        q = tl.load(query + at, mask=in_q & shown[:, None], other=0.0).to(tl.float32)
        if SERVED:
            q += other
        features = _features(q, (d < D)[None, :], kind, norm, D)
        _, _, answer = _hidden(
            features, mine, memory, now.to(tl.int64), A, a_slot, a_memory, a_row, centre, m_slot, m_memory, d, r,
            D, R, CENTRE, DOT,
        )  # fmt: skip
        if not FULL:
            second = _matrix(B + now.to(tl.int64) * b_slot + memory * b_memory, r, v, b_row, R, V)
            answer = _dot(answer, second, DOT)
        if LIMIT:
            width = tl.sum(own * own, axis=1) + V * TINY * tl.where(tight > 0, tight, 1.0)
            factor = tl.sqrt(width / (width + tight * tl.sum(answer * answer, axis=1)))
            answer = answer * factor[:, None]
        if SERVED:
            own_scale = tl.load(asked + token, mask=mine, other=0.0)
            answer = answer * tl.where(own_scale == own_scale, own_scale, scale)[:, None]
        else:
            answer = answer * scale
        new = tl.where(mine[:, None], base + answer, new)
        left = tl.where(mine, NO_SLOT, left)
        now = tl.min(left)
    tl.store(out + _at(token, head, v, length, y0, y1, y2, y3), new.to(out.dtype.element_ty), mask=in_o)


@no_type_check
@triton.jit(do_not_specialize=("tokens", "length"))
def rows_backward(
    query, q0, q1, q2, q3, outputs, o0, o1, o2, o3, gradient, g0, g1, g2, g3, dq, e0, e1, e2, e3, do, f0, f1, f2, f3,
    factors, A, a_slot, a_memory, a_row, B, b_slot, b_memory, b_row, centre, m_slot, m_memory,
    slots, s0, s1, tightness, scales, forms, tokens, length, heads, tight, scale,
    D: tl.constexpr, V: tl.constexpr, R: tl.constexpr, D_: tl.constexpr, V_: tl.constexpr, R_: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, REPEAT: tl.constexpr, KIND: tl.constexpr, NORM: tl.constexpr,
    CENTRE: tl.constexpr, FULL: tl.constexpr, LIMIT: tl.constexpr, ONTO: tl.constexpr, BANK: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """∂q, ∂o (with ∂o' in it unless ``ONTO``), and f·s and k in ``factors`` ``[tokens, heads, 2]``."""
    memory = tl.program_id(1)
    token, head, here = _block(tl.program_id(0), memory, tokens, ROWS, TOKENS, REPEAT)
    d, v, r = tl.arange(0, D_), tl.arange(0, V_), tl.arange(0, R_)
    slot = tl.where(here, 0, NO_SLOT)
    if BANK:
        slot = tl.load(slots + token // length * s0 + token % length * s1, mask=here, other=-1).to(tl.int32)
        slot = tl.where(slot >= 0, slot, NO_SLOT)
    in_q, in_o = here[:, None] & (d < D)[None, :], here[:, None] & (v < V)[None, :]
    given = tl.load(gradient + _at(token, head, v, length, g0, g1, g2, g3), mask=in_o, other=0.0).to(tl.float32)
    own = tl.load(outputs + _at(token, head, v, length, o0, o1, o2, o3), mask=in_o, other=0.0).to(tl.float32)
    to_q = tl.zeros([ROWS, D_], tl.float32)
    to_own = tl.zeros([ROWS, V_], tl.float32) if ONTO else given
    scaled, slope = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    left = slot
    now = tl.min(left)
    while now < NO_SLOT:
        mine = slot == now
        if BANK:
            form = tl.load(forms + now).to(tl.int32)
            kind, norm = form // 3, form % 3
            tight, scale = tl.load(tightness + now), tl.load(scales + now)
        else:
            kind, norm = KIND, NORM
        at = _at(token, head, d, length, q0, q1, q2, q3)
        q = tl.load(query + at, mask=in_q & mine[:, None], other=0.0).to(tl.float32)
        features = _features(q, (d < D)[None, :], kind, norm, D)
        _, first, answer = _hidden(
            features, mine, memory, now.to(tl.int64), A, a_slot, a_memory, a_row, centre, m_slot, m_memory, d, r,
            D, R, CENTRE, DOT,
        )  # fmt: skip
        if not FULL:
            second = _matrix(B + now.to(tl.int64) * b_slot + memory * b_memory, r, v, b_row, R, V)
            answer = _dot(answer, second, DOT)
        to_answer = scale * given
        scaled = tl.where(mine, scale, scaled)
        if LIMIT:
            size = tl.sum(answer * answer, axis=1)
            width = tl.sum(own * own, axis=1) + V * TINY * tl.where(tight > 0, tight, 1.0)
            factor = tl.sqrt(width / (width + tight * size))
            k = tl.sum(to_answer * answer, axis=1) * factor * tight / (width + tight * size)
            to_own = tl.where(mine[:, None], to_own + (k * size / width)[:, None] * own, to_own)
            to_answer = factor[:, None] * to_answer - k[:, None] * answer
            scaled, slope = tl.where(mine, factor * scale, scaled), tl.where(mine, k, slope)
        to_answer = tl.where(mine[:, None], to_answer, 0.0)
        if not FULL:
            to_answer = _dot(to_answer, tl.trans(second), DOT)
        to_features = _dot(to_answer, tl.trans(first), DOT)
        to_q += _features_backward(q, to_features, (d < D)[None, :], kind, norm, D)
        left = tl.where(mine, NO_SLOT, left)
        now = tl.min(left)
    tl.store(dq + _at(token, head, d, length, e0, e1, e2, e3), to_q.to(dq.dtype.element_ty), mask=in_q)
    tl.store(do + _at(token, head, v, length, f0, f1, f2, f3), to_own.to(do.dtype.element_ty), mask=in_o)
    pair = factors + (token.to(tl.int64) * heads + head) * 2
    tl.store(pair, scaled, mask=here)
    tl.store(pair + 1, slope, mask=here)


@no_type_check
@triton.jit(do_not_specialize=("tokens", "length", "blocks"))
def factors_backward(
    query, q0, q1, q2, q3, gradient, g0, g1, g2, g3, factors, dA, dB,
    A, a_slot, a_memory, a_row, B, b_slot, b_memory, b_row, centre, m_slot, m_memory,
    slots, s0, s1, forms, tokens, length, heads, blocks,
    D: tl.constexpr, V: tl.constexpr, R: tl.constexpr, D_: tl.constexpr, V_: tl.constexpr, R_: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, REPEAT: tl.constexpr, KIND: tl.constexpr, NORM: tl.constexpr,
    CENTRE: tl.constexpr, FULL: tl.constexpr, BANK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """∂A and ∂B of one slot's memory, over every n-th block of tokens: parts ``[n, slots, memories, ...]`` of sums."""
    part, memory, now = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    parts, memories = tl.num_programs(0), tl.num_programs(1)
    d, v, r = tl.arange(0, D_), tl.arange(0, V_), tl.arange(0, R_)
    place = (part * tl.num_programs(2) + now).to(tl.int64) * memories + memory
    kind, norm = KIND, NORM
    if BANK:
        form = tl.load(forms + now).to(tl.int32)
        kind, norm = form // 3, form % 3
    to_first = tl.zeros([D_, R_], tl.float32)
    to_second = tl.zeros([R_, V_], tl.float32)
    for block in range(part, blocks, parts):
        token, head, here = _block(block, memory, tokens, ROWS, TOKENS, REPEAT)
        if BANK:
            slot = tl.load(slots + token // length * s0 + token % length * s1, mask=here, other=-1)
            here = here & (slot == now)
        if tl.max(here.to(tl.int32)) > 0:
            in_q, in_o = here[:, None] & (d < D)[None, :], here[:, None] & (v < V)[None, :]
            q = tl.load(query + _at(token, head, d, length, q0, q1, q2, q3), mask=in_q, other=0.0).to(tl.float32)
            features = _features(q, (d < D)[None, :], kind, norm, D)
            features, _, hidden = _hidden(
                features, here, memory, now.to(tl.int64), A, a_slot, a_memory, a_row, centre, m_slot, m_memory, d, r,
                D, R, CENTRE, DOT,
            )  # fmt: skip
            pair = factors + (token.to(tl.int64) * heads + head) * 2
            scaled, slope = tl.load(pair, mask=here, other=0.0), tl.load(pair + 1, mask=here, other=0.0)
            given = tl.load(gradient + _at(token, head, v, length, g0, g1, g2, g3), mask=in_o, other=0.0)
            given = scaled[:, None] * given.to(tl.float32)
            if FULL:
                to_first += _dot(tl.trans(features), given - slope[:, None] * hidden, DOT)
            else:
                second = _matrix(B + now.to(tl.int64) * b_slot + memory * b_memory, r, v, b_row, R, V)
                to_answer = given - slope[:, None] * _dot(hidden, second, DOT)
                to_second += _dot(tl.trans(hidden), to_answer, DOT)
                to_first += _dot(tl.trans(features), _dot(to_answer, tl.trans(second), DOT), DOT)
    in_first = (d < D)[:, None] & (r < R)[None, :]
    tl.store(dA + place * D * R + d[:, None] * R + r[None, :], to_first, mask=in_first)
    if not FULL:
        in_second = (r < R)[:, None] & (v < V)[None, :]
        tl.store(dB + place * R * V + r[:, None] * V + v[None, :], to_second, mask=in_second)
