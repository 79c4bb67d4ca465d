"""Adaptive-span attention on CUDA: Triton kernels whose work is proportional to the spans of the heads.

Every program reads the span of its head (or of its rows) and visits only keys with a nonzero weight. No mask
is stored in memory, and the host reads no tensor value. Tiles where every key has weight 1 skip the mask.
Programs of the heads with the longest spans start first. If there are few queries, several programs share the
keys of one query, and their results are joined in a fixed order. Each output element is written by one
program, so repeated calls return the same bits.
"""

import torch
import triton
import triton.language as tl
from sukhops.triton_kernels._parts import add_product, dot, load_rows, parts, scaled, store_rows, zeros
from torch import Tensor

MAX_WIDTH = 256
PROGRAMS = 264  # target number of programs per launch: two per SM on a 132-SM GPU
WIDTHS = (64, 96, 128)  # largest head widths of the first three configurations; the fourth is for wider heads
# A configuration is (queries per tile, keys per tile, warps, stages). "half": float16 and bfloat16 on Hopper
# or later, and on Ampere if there is no "ampere" entry. "float": float32. Without an entry: SMALL_TILES.
FORWARD_TILES = {
    "half": ((64, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
    "ampere": ((64, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 3), (64, 32, 8, 2)),
    "float": ((32, 32, 8, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
}
# forward of at most 16 rows, counting the rows of all query heads that share a key head
FEW_ROWS_TILES = {"half": ((16, 64, 4, 3), (16, 64, 4, 3), (16, 64, 8, 3), (16, 32, 8, 2))}
DQ_TILES = {  # gradients of q and span
    "half": ((64, 32, 4, 2), (64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
    "ampere": ((64, 32, 4, 2), (64, 32, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
    "float": ((32, 32, 8, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
}
DKV_TILES = {  # gradients of k and v, one query head per key head
    "half": ((32, 64, 4, 2), (64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
    "ampere": ((32, 64, 4, 2), (16, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
    "float": ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1), (16, 16, 4, 1)),
}
GROUPED_DKV_TILES = {  # gradients of k and v, several query heads per key head
    "half": ((32, 64, 8, 2), (64, 64, 8, 1), (64, 64, 8, 1), (32, 32, 8, 1)),
    "ampere": ((32, 32, 4, 2), (16, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 1)),
    "float": ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1), (16, 16, 4, 1)),
}
GROUPED_DKV_BY_ROW_TILES = {  # the same, for queries of a head that differ in their span or first key
    "half": ((32, 64, 8, 1), (16, 32, 4, 1), (32, 32, 4, 2), (32, 32, 8, 1)),
    "float": ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1), (16, 16, 4, 1)),
}
REL_FORWARD_TILES = {  # with rel_pos, tiles must be square
    "half": ((64, 64, 8, 2), (64, 64, 8, 1), (64, 64, 8, 1), (16, 16, 8, 2)),
    "ampere": ((32, 32, 4, 1), (32, 32, 8, 1), (32, 32, 8, 2), (16, 16, 8, 1)),
}
REL_DQ_TILES = {"half": ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 4, 1), (16, 16, 8, 2))}
REL_DKV_TILES = {"half": ((16, 16, 4, 1), (16, 16, 4, 1), (32, 32, 8, 1), (16, 16, 4, 1))}
DREL_TILES = {  # gradient of rel_pos
    "half": ((64, 64, 8, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 8, 1)),
    "ampere": ((32, 32, 8, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 8, 1)),
}
SMALL_TILES = (16, 16, 4, 1)


@triton.jit
def _distances(rel_ptr, x, limit, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Rows of rel_pos at distances x, clamped to [0, limit); scores of other distances are masked later."""
    x = tl.minimum(tl.maximum(x, 0), limit - 1)
    return load_rows(rel_ptr, x.to(tl.int64) * D, D, D1, D2)


@triton.jit
def _query_start(query_ptr, b, m, n):
    """Position of a sequence's first query among the keys, and whether all its queries have a position."""
    if query_ptr is None:
        return n - m, True
    else:
        start = tl.load(query_ptr + b)
        return tl.minimum(tl.maximum(start, 0), n - m).to(tl.int32), (start >= 0) & (start <= n - m)


@triton.jit
def _window(p, span_at, start_ptr, row, ramp, limit, n, CLOSED: tl.constexpr):
    """For rows at positions p: the span, the first visible key, and the first key from which all weigh 1.

    With a NaN span every key is visible and none weighs 1. CLOSED: the key at the very end of the ramp, whose
    weight is 0, counts as visible, because the gradient of the span includes it.
    """
    span = tl.load(span_at)
    span = tl.where(span < -ramp - 1.0, -ramp - 1.0, span)  # all weights are 0 at spans of at most -ramp
    zero_at = ramp + span  # distance from which the weight is 0
    if CLOSED:
        end = tl.floor(zero_at)
    else:
        end = tl.ceil(zero_at) - 1.0
    first = p - tl.where(zero_at < limit, end, limit - 1.0).to(tl.int32)
    one_until = tl.where(span == span, span, 0.0)  # distance up to which the weight is 1
    full = p - tl.where(one_until < limit, one_until, limit * 1.0).to(tl.int32) + 1
    if start_ptr is not None:
        start = tl.minimum(tl.maximum(tl.load(start_ptr + row), 0), n).to(tl.int32)
        first, full = tl.maximum(first, start), tl.maximum(full, start)
    return span, first, full


@triton.jit
def _weight(margin, ramp, per_token):
    """Weight of a key at distance x, margin = span - x >= -ramp; exact at both ends of the ramp."""
    return tl.minimum((ramp + margin) * per_token, 1.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def forward_tiles(
    q_ptr, k_ptr, v_ptr,  # [B, H, M, D], [B, Hkv, N, D], [B, Hkv, N, D]
    span_ptr,  # [B, H, M]; strides are 0 where the span is shared
    rel_ptr,  # [L, D] or [H, L, D], L >= limit, or None
    start_ptr, query_ptr,  # [B, M] and [B], or None
    order_ptr,  # [lanes] lanes (PACK heads each) sorted by span, longest first, or None
    out_ptr, maximum_ptr, sum_ptr,  # out: [B, H, M, splits, D], then twice [B, H, M, splits]
    # strides of the batch (b), head (h) and token (t) axes
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, span_b, span_h, span_t, rel_h,
    heads, group, m, n, limit, skip, splits, ramp: tl.float64, scale: tl.float64,
    PACK: tl.constexpr,  # query heads per tile; more than 1 only if rel_pos is None or shared by the heads
    CONSECUTIVE: tl.constexpr,  # rows of a tile are consecutive queries (False when decoding one token)
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    ramp, scale = tl.cast(ramp, ACC), tl.cast(scale, ACC)
    per_token = 1.0 / ramp
    tiles = tl.cdiv(PACK * m, BM)
    pid = tl.program_id(0)
    split = pid % splits
    tile = tiles - 1 - pid // splits % tiles
    b = (pid // splits // tiles).to(tl.int64)
    lane = tl.program_id(1).to(tl.int64)
    if order_ptr is not None:
        lane = tl.load(order_ptr + lane)
    r, c = tl.arange(0, BM), tl.arange(0, BN)
    row = tl.minimum(tile * BM + r, PACK * m - 1)  # surplus rows repeat the last row and are not stored
    query = row % m
    head, kv = lane * PACK + row // m, lane * PACK // group
    start, valid = _query_start(query_ptr, b, m, n)
    p, last = start - skip + query, start + m - 1
    span_at = span_ptr + b * span_b + head * span_h + query.to(tl.int64) * span_t
    span, first, full = _window(p, span_at, start_ptr, b * m + query, ramp, limit, n, CLOSED=False)
    low, high = tl.maximum(tl.min(first, 0), 0), tl.max(p, 0) + 1
    full, nearest = tl.max(full, 0), tl.min(p, 0)
    share = tl.cdiv(tl.cdiv(high - low, BN), splits) * BN
    low += split * share
    high = tl.minimum(high, low + share)

    farthest = (p - first).to(ACC)[:, None]
    q = load_rows(q_ptr + b * q_b, head * q_h + query.to(tl.int64) * q_t, D, D1, D2)
    k_ptr += b * k_b + kv * k_h
    v_ptr += b * v_b + kv * v_h
    if rel_ptr is not None:
        rel_ptr += lane * rel_h
        # distance x = behind + r - c: products `upper` are of x >= behind, `lower` of x < behind
        if CONSECUTIVE:
            skewed_index = (r[:, None] - c[None, :]) & (BN - 1)
            tril = c[None, :] <= r[:, None]
            behind = start - skip + tile * BM - low
    row_max = tl.full((BM,), float("-inf"), ACC)
    total = tl.zeros((BM,), ACC)
    acc = zeros(BM, D1, D2, ACC)
    for j in range(low, high, BN):
        key = tl.minimum(j + c, last).to(tl.int64)
        s = dot(q, load_rows(k_ptr, key * k_t, D, D1, D2), ACC)
        if rel_ptr is not None:
            if CONSECUTIVE:
                upper = dot(q, _distances(rel_ptr, behind + c, limit, D, D1, D2), ACC)
                behind -= BN
                lower = dot(q, _distances(rel_ptr, behind + c, limit, D, D1, D2), ACC)
                s += tl.gather(tl.where(tril, upper, lower), skewed_index, 1)
            else:
                s += dot(q, _distances(rel_ptr, start - skip - j - c, limit, D, D1, D2), ACC)
        s *= scale
        masked = (j < full) | (j + BN - 1 > nearest)
        if masked:
            x = (p - j).to(ACC)[:, None] - c.to(ACC)[None, :]
            s = tl.where((x >= 0.0) & (x <= farthest), s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        w = tl.exp(s - shift[:, None])
        if masked:
            x = (p - j).to(ACC)[:, None] - c.to(ACC)[None, :]
            w *= _weight(span[:, None] - x, ramp, per_token)
        decay = tl.exp(row_max - shift)
        total = total * decay + tl.sum(w, 1)
        acc = add_product(scaled(acc, decay[:, None]), w, load_rows(v_ptr, key * v_t, D, D1, D2), ACC)
        row_max = new_max
    total = tl.where(valid, total, float("nan"))
    empty = total == 0.0
    out_row = ((b * heads + head) * m + query) * splits + split
    mask = tile * BM + r < PACK * m
    tl.store(maximum_ptr + out_row, tl.where(empty, 0.0, row_max), mask)
    tl.store(sum_ptr + out_row, total, mask)
    factor = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))
    store_rows(out_ptr, out_row * D, mask, acc, factor[:, None], D, D1, D2)


@triton.jit
def join_splits(
    part_ptr, part_maximum_ptr, part_sum_ptr,  # [rows, splits, D], then twice [rows, splits]
    out_ptr, maximum_ptr, sum_ptr,  # out: [rows, D], then twice [rows]
    splits, D: tl.constexpr, SPLITS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    s, c = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    sums = tl.load(part_sum_ptr + row * splits + s, s < splits, other=0.0)
    nonempty = sums != 0.0
    maxima = tl.load(part_maximum_ptr + row * splits + s, nonempty, other=float("-inf"))
    row_max = tl.max(maxima, 0)
    row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    w = sums * tl.exp(maxima - row_max)
    total = tl.sum(w, 0)
    at = (row * splits + s[:, None]) * D + c[None, :]
    parts = tl.load(part_ptr + at, nonempty[:, None] & (c < D)[None, :], other=0.0)
    out = tl.sum(parts * w[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * D + c, out.to(out_ptr.dtype.element_ty), c < D)
    tl.store(maximum_ptr + row, row_max)
    tl.store(sum_ptr + row, total)


@triton.jit
def row_sums(
    grad_ptr, out_ptr,  # [B, H, M, D]
    span_ptr, start_ptr, query_ptr,
    delta_ptr,  # out: [B, H, M] sum over D of grad * out
    first_ptr, full_ptr,  # out: [B, H, tiles] first key that any row sees, first key that weighs 1 for all
    g_b, g_h, g_t, span_b, span_h, span_t,
    heads, m, n, limit, skip, ramp: tl.float64,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(m, BM)
    tile = tl.program_id(0) % tiles
    b = (tl.program_id(0) // tiles).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    r = tl.arange(0, BM)
    row = tl.minimum(tile * BM + r, m - 1).to(tl.int64)
    at = (b * heads + head) * m + row
    grad = load_rows(grad_ptr + b * g_b + head * g_h, row * g_t, D, D1, D2)
    out = load_rows(out_ptr, at * D, D, D1, D2)
    delta = tl.sum(grad[0].to(ACC) * out[0].to(ACC), 1)
    if D2:
        delta += tl.sum(grad[1].to(ACC) * out[1].to(ACC), 1)
    tl.store(delta_ptr + at, delta, tile * BM + r < m)
    span_at = span_ptr + b * span_b + head * span_h + row * span_t
    p = _query_start(query_ptr, b, m, n)[0] - skip + row.to(tl.int32)
    _, first, full = _window(p, span_at, start_ptr, b * m + row, tl.cast(ramp, ACC), limit, n, CLOSED=True)
    at = (b * heads + head) * tiles + tile
    tl.store(first_ptr + at, tl.min(first, 0))
    tl.store(full_ptr + at, tl.max(full, 0))


@triton.jit
def _log(total):
    """Log of a row's sum of weights; inf if the sum is 0, so that exp(s - log_sum) is 0 for every key."""
    return tl.where(total == 0.0, float("inf"), tl.log(total))


@triton.jit
def _exponent(s, log_sum, x, farthest):
    """s if the key is visible, else -inf.

    Scores are capped at row maximum + 80. The maximum leaves out keys at the very end of the ramp, where
    the weight is 0, so the exponential of their scores could overflow.
    """
    s = tl.minimum(s, 80.0 - log_sum, propagate_nan=tl.PropagateNan.ALL)
    return tl.where((x >= 0.0) & (x <= farthest), s, float("-inf"))


@triton.jit
def backward_rows(
    q_ptr, k_ptr, v_ptr, grad_ptr, span_ptr, rel_ptr, start_ptr, query_ptr,
    order_ptr,  # [H] heads sorted by span, longest first
    maximum_ptr, sum_ptr, delta_ptr,  # [B, H, M]
    dq_ptr, dspan_ptr,  # out: [B, H, M, D] or None, [B, H, M] or None
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, span_b, span_h, span_t, rel_h,
    heads, group, m, n, limit, skip, ramp: tl.float64, scale: tl.float64,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    ramp, scale = tl.cast(ramp, ACC), tl.cast(scale, ACC)
    per_token = 1.0 / ramp
    tiles = tl.cdiv(m, BM)
    tile = tiles - 1 - tl.program_id(0) % tiles
    b = (tl.program_id(0) // tiles).to(tl.int64)
    head = tl.load(order_ptr + tl.program_id(1))
    r, c = tl.arange(0, BM), tl.arange(0, BN)
    row = tl.minimum(tile * BM + r, m - 1)  # surplus rows repeat the last row and are not stored
    start = _query_start(query_ptr, b, m, n)[0]
    p, last = start - skip + row, start + m - 1
    row = row.to(tl.int64)
    span_at = span_ptr + b * span_b + head * span_h + row * span_t
    span, first, full = _window(p, span_at, start_ptr, b * m + row, ramp, limit, n, CLOSED=True)
    low, high = tl.maximum(tl.min(first, 0), 0), tl.max(p, 0) + 1
    full, nearest = tl.max(full, 0), tl.min(p, 0)
    farthest = (p - first).to(ACC)[:, None]
    row_at = (b * heads + head) * m + row
    row_max, log_sum = tl.load(maximum_ptr + row_at)[:, None], _log(tl.load(sum_ptr + row_at))[:, None]
    delta = tl.load(delta_ptr + row_at)[:, None]
    q = load_rows(q_ptr + b * q_b + head * q_h, row * q_t, D, D1, D2)
    grad = load_rows(grad_ptr + b * g_b + head * g_h, row * g_t, D, D1, D2)
    k_ptr += b * k_b + head // group * k_h
    v_ptr += b * v_b + head // group * v_h
    if rel_ptr is not None:
        rel_ptr += head * rel_h
        skewed_index = (r[:, None] - c[None, :]) & (BN - 1)
        tril = c[None, :] <= r[:, None]
        behind = start - skip + tile * BM - low
    dspan = tl.zeros((BM,), ACC)
    dq = zeros(BM, D1, D2, ACC)
    for j in range(low, high, BN):
        key = tl.minimum(j + c, last).to(tl.int64)
        k = load_rows(k_ptr, key * k_t, D, D1, D2)
        s = dot(q, k, ACC)
        if rel_ptr is not None:
            after = _distances(rel_ptr, behind + c, limit, D, D1, D2)
            behind -= BN
            before = _distances(rel_ptr, behind + c, limit, D, D1, D2)
            upper, lower = dot(q, after, ACC), dot(q, before, ACC)
            s += tl.gather(tl.where(tril, upper, lower), skewed_index, 1)
        s = s * scale - row_max - log_sum  # one at a time: row_max + log_sum would be rounded
        masked = (j < full) | (j + BN - 1 > nearest)
        if masked:
            s = _exponent(s, log_sum, (p - j).to(ACC)[:, None] - c.to(ACC)[None, :], farthest)
        w = tl.exp(s)
        dw = dot(grad, load_rows(v_ptr, key * v_t, D, D1, D2), ACC) - delta
        if masked:
            margin = span[:, None] - ((p - j).to(ACC)[:, None] - c.to(ACC)[None, :])
            if dspan_ptr is not None:
                dspan += tl.sum(tl.where(margin > 0.0, 0.0, w * dw), 1)
            w *= _weight(margin, ramp, per_token)
        ds = w * dw
        if dq_ptr is not None:
            dq = add_product(dq, ds, k, ACC)
            if rel_ptr is not None:
                skewed = tl.gather(ds, skewed_index, 1)
                dq = add_product(dq, tl.where(tril, skewed, 0.0), after, ACC)
                dq = add_product(dq, tl.where(tril, 0.0, skewed), before, ACC)
    mask = tile * BM + r < m
    if dq_ptr is not None:
        store_rows(dq_ptr, row_at * D, mask, dq, scale, D, D1, D2)
    if dspan_ptr is not None:
        tl.store(dspan_ptr + row_at, dspan * per_token, mask)


@triton.jit
def backward_keys(
    q_ptr, k_ptr, v_ptr, grad_ptr, span_ptr, rel_ptr, start_ptr, query_ptr,
    order_ptr,  # [Hkv] key heads sorted by span, longest first
    maximum_ptr, sum_ptr, delta_ptr,  # [B, H, M]
    first_ptr, full_ptr,  # [B, H, tiles] of row_sums with the same BM
    dk_ptr, dv_ptr,  # out: [B, Hkv, N, D]
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, span_b, span_h, span_t, rel_h,
    heads, group, m, n, limit, skip, ramp: tl.float64, scale: tl.float64,
    BY_ROW: tl.constexpr,  # whether the rows of a head differ in their span or first key
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    ramp, scale = tl.cast(ramp, ACC), tl.cast(scale, ACC)
    per_token = 1.0 / ramp
    tiles = tl.cdiv(m, BM)
    key = tl.program_id(0) % tl.cdiv(n, BN) * BN  # first key of the tile
    b = (tl.program_id(0) // tl.cdiv(n, BN)).to(tl.int64)
    kv = tl.load(order_ptr + tl.program_id(1))
    r, c = tl.arange(0, BM), tl.arange(0, BN)
    start = _query_start(query_ptr, b, m, n)[0]
    at = tl.minimum(key + c, start + m - 1).to(tl.int64)
    k = load_rows(k_ptr + b * k_b + kv * k_h, at * k_t, D, D1, D2)
    v = load_rows(v_ptr + b * v_b + kv * v_h, at * v_t, D, D1, D2)
    dk, dv = zeros(BN, D1, D2, ACC), zeros(BN, D1, D2, ACC)
    origin = start - skip  # distance from the first query to key 0
    for member in range(group):
        head = kv * group + member
        q_at = q_ptr + b * q_b + head * q_h
        grad_at = grad_ptr + b * g_b + head * g_h
        rows_at = (b * heads + head) * m
        tiles_at = (b * heads + head) * tiles
        span_at = span_ptr + b * span_b + head * span_h
        low = tl.maximum(key - origin, 0) // BM
        if BY_ROW:
            high = low
            for t0 in range(low, tiles, 256):
                t = t0 + tl.arange(0, 256)
                overlaps = tl.load(first_ptr + tiles_at + t, t < tiles, other=n) < tl.minimum(key + BN, n)
                high = tl.maximum(high, tl.max(tl.where(overlaps, t + 1, 0), 0))
        else:
            span, first, full = _window(0, span_at, None, 0, ramp, limit, n, CLOSED=True)
            farthest = (-first).to(ACC)
            high = tl.minimum(tl.cdiv(tl.maximum(key + BN - first - origin, 0), BM), tiles)
        for tile in range(low, high):
            i = tile * BM
            row = tl.minimum(i + r, m - 1).to(tl.int64)
            q = load_rows(q_at, row * q_t, D, D1, D2)
            grad = load_rows(grad_at, row * g_t, D, D1, D2)
            s = dot(k, q, ACC)  # [BN, BM]
            if rel_ptr is not None:
                behind = origin + i - key + c
                upper = dot(_distances(rel_ptr + head * rel_h, behind, limit, D, D1, D2), q, ACC)
                lower = dot(_distances(rel_ptr + head * rel_h, behind - BN, limit, D, D1, D2), q, ACC)
                mixed = tl.where(c[:, None] <= r[None, :], upper, lower)
                s += tl.gather(mixed, (r[None, :] - c[:, None]) & (BN - 1), 0)
            # surplus rows get log_sum = inf, so their weights are 0
            row_max = tl.load(maximum_ptr + rows_at + row)[None, :]
            log_sum = _log(tl.load(sum_ptr + rows_at + i + r, i + r < m, other=0.0))[None, :]
            s = s * scale - row_max - log_sum
            if BY_ROW:
                full_tile = tl.load(full_ptr + tiles_at + tile)
            else:
                full_tile = origin + i + BM - 1 + full
            masked = (key < full_tile) | (key + BN - 1 > origin + i)
            if masked:
                x = (origin + i + r - key).to(ACC)[None, :] - c.to(ACC)[:, None]
                if BY_ROW:
                    span_row, first_row, _ = _window(
                        origin + row.to(tl.int32), span_at + row * span_t, start_ptr, b * m + row,
                        ramp, limit, n, CLOSED=True,
                    )  # fmt: skip
                    s = _exponent(s, log_sum, x, (origin + row.to(tl.int32) - first_row).to(ACC)[None, :])
                    w = tl.exp(s) * _weight(span_row[None, :] - x, ramp, per_token)
                else:
                    w = tl.exp(_exponent(s, log_sum, x, farthest)) * _weight(span - x, ramp, per_token)
            else:
                w = tl.exp(s)
            dv = add_product(dv, w, grad, ACC)
            dw = dot(v, grad, ACC) - tl.load(delta_ptr + rows_at + row)[None, :]
            dk = add_product(dk, w * dw, q, ACC)
    at = ((b * tl.num_programs(1) + kv) * n + key + c) * D
    store_rows(dk_ptr, at, key + c < n, dk, scale, D, D1, D2)
    store_rows(dv_ptr, at, key + c < n, dv, 1.0, D, D1, D2)


@triton.jit
def backward_distances(
    q_ptr, k_ptr, v_ptr, grad_ptr, span_ptr, rel_ptr, start_ptr, query_ptr,
    maximum_ptr, sum_ptr, delta_ptr,  # [B, H, M]
    first_ptr, full_ptr,  # [B, H, tiles] of row_sums with BM = BT
    drel_ptr,  # out: [splits, lanes, limit, D]
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, span_b, span_h, span_t, rel_h,
    batch, heads, group, m, n, limit, skip, splits,
    shared,  # heads that share one row of rel_pos: H or 1
    ramp: tl.float64, scale: tl.float64,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ACC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    ramp, scale = tl.cast(ramp, ACC), tl.cast(scale, ACC)
    per_token = 1.0 / ramp
    tiles = tl.cdiv(m, BT)
    split = tl.program_id(0) % splits
    distance = tl.program_id(0) // splits * BT  # smallest distance of the tile
    lane = tl.program_id(1).to(tl.int64)
    r = tl.arange(0, BT)
    skewed_index = (r[:, None] - r[None, :]) & (BT - 1)
    tril = r[None, :] <= r[:, None]
    # distance of row r from column c: the key at base + c, or BT before it if c > r
    x = (distance + skewed_index).to(ACC)
    rel = _distances(rel_ptr + lane * rel_h, distance + r, limit, D, D1, D2)
    drel = zeros(BT, D1, D2, ACC)
    share = tl.cdiv(batch * tiles, splits)
    for step in range(shared * share):  # heads in order; per head the query tiles of this split
        head, unit = lane * shared + step // share, split * share + step % share
        kv = head // group
        if unit < batch * tiles:
            b, i = (unit // tiles).to(tl.int64), unit % tiles * BT
            tile_at = (b * heads + head) * tiles + unit % tiles
            start = _query_start(query_ptr, b, m, n)[0]
            base = start - skip + i - distance  # key position of column 0
            last = start + m - 1
            if tl.maximum(tl.load(first_ptr + tile_at), 0) <= tl.minimum(base + BT - 1, last - distance):
                row = tl.minimum(i + r, m - 1).to(tl.int64)
                near = tl.minimum(tl.maximum(base + r, 0), last).to(tl.int64)
                far = tl.minimum(tl.maximum(base - BT + r, 0), last).to(tl.int64)
                q = load_rows(q_ptr + b * q_b + head * q_h, row * q_t, D, D1, D2)
                grad = load_rows(grad_ptr + b * g_b + head * g_h, row * g_t, D, D1, D2)
                k_at, v_at = k_ptr + b * k_b + kv * k_h, v_ptr + b * v_b + kv * v_h
                s = dot(q, load_rows(k_at, near * k_t, D, D1, D2), ACC)
                s = tl.where(tril, s, dot(q, load_rows(k_at, far * k_t, D, D1, D2), ACC))
                s += tl.gather(dot(q, rel, ACC), skewed_index, 1)
                at = (b * heads + head) * m
                row_max = tl.load(maximum_ptr + at + row)[:, None]
                log_sum = _log(tl.load(sum_ptr + at + i + r, i + r < m, other=0.0))[:, None]
                s = s * scale - row_max - log_sum
                masked = tl.maximum(tl.load(full_ptr + tile_at), 0) > base - BT + 1
                if masked:
                    p = start - skip + row.to(tl.int32)
                    span_at = span_ptr + b * span_b + head * span_h + row * span_t
                    span, first, _ = _window(p, span_at, start_ptr, b * m + row, ramp, limit, n, CLOSED=True)
                    farthest = (p - tl.maximum(first, 0)).to(ACC)[:, None]
                    s = _exponent(s, log_sum, x, farthest)
                    w = tl.exp(s) * _weight(span[:, None] - x, ramp, per_token)
                else:
                    w = tl.exp(s)
                dw = dot(grad, load_rows(v_at, near * v_t, D, D1, D2), ACC)
                dw = tl.where(tril, dw, dot(grad, load_rows(v_at, far * v_t, D, D1, D2), ACC))
                ds = w * (dw - tl.load(delta_ptr + at + row)[:, None])
                drel = add_product(drel, tl.gather(ds, skewed_index, 1).T, q, ACC)
    at = ((split * tl.num_programs(1) + lane) * limit + distance + r) * D
    store_rows(drel_ptr, at, distance + r < limit, drel, scale, D, D1, D2)


# ------------------------------------------------------------------ launchers


def _pick(table: dict, q: Tensor) -> tuple[int, int, int, int]:
    kind = {torch.float64: "double", torch.float32: "float"}.get(q.dtype, "half")
    if "ampere" in table and kind == "half" and q.is_cuda:
        kind = "half" if torch.cuda.get_device_capability(q.device)[0] >= 9 else "ampere"
    return table[kind][sum(q.shape[3] > width for width in WIDTHS)] if kind in table else SMALL_TILES


def _dense(t: Tensor) -> Tensor:
    """t with a contiguous last axis; kernels read the other axes by their strides."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _longest_first(span: Tensor, lanes: int) -> Tensor:
    longest = span if span.dim() == 1 else span.amax((0, 2))  # [H]
    return longest.view(lanes, -1).sum(1).argsort(descending=True)


def _limit(n: int, max_span: int | None, rel_pos: Tensor | None) -> int:
    """Keys at this distance or farther are never visible."""
    return min(n, n if max_span is None else max_span, n if rel_pos is None else rel_pos.shape[-2])


def _widths(q: Tensor) -> dict:
    d = q.shape[3]
    if d > MAX_WIDTH:
        raise NotImplementedError(f"q: CUDA supports heads of width d <= {MAX_WIDTH}, got {d}")
    d1, d2 = parts(d)
    return dict(D=d, D1=d1, D2=d2, ACC=tl.float64 if q.dtype == torch.float64 else tl.float32)


def _strides(q, k, v, span, rel_pos, grad=None) -> list[int]:
    given = [q, k, v] if grad is None else [q, k, v, grad]
    span_strides = span.stride() if span.dim() == 3 else (0, span.stride(0), 0)
    per_head = rel_pos is not None and rel_pos.dim() == 3
    return [*(x for t in given for x in t.stride()[:3]), *span_strides, rel_pos.stride(0) if per_head else 0]


def forward(q, k, v, span, rel_pos, key_start, query_start, ramp, scale, skip, max_span):
    """The CUDA kernel of sukhops::adaptive_span."""
    (b, h, m, d), (hkv, n) = q.shape, k.shape[1:3]
    widths = _widths(q)
    out, maximum, total = q.new_empty(q.shape), span.new_empty(q.shape[:3]), span.new_empty(q.shape[:3])
    if not out.numel():
        return out, maximum, total
    q, k, v = _dense(q), _dense(k), _dense(v)
    rel_pos, key_start, query_start = map(_contiguous, (rel_pos, key_start, query_start))
    pack = h // hkv if m * (h // hkv) <= 16 and (rel_pos is None or (m == 1 and rel_pos.dim() == 2)) else 1
    few = m * pack <= 16 and (rel_pos is None or m == 1)
    table = FEW_ROWS_TILES if few else FORWARD_TILES if rel_pos is None else REL_FORWARD_TILES
    bm, bn, warps, stages = _pick(table, q)
    tiles, lanes, limit = triton.cdiv(pack * m, bm), h // pack, _limit(n, max_span, rel_pos)
    splits = max(1, min(PROGRAMS // (tiles * b * lanes), triton.cdiv(limit, bn)))
    parts = joined = (out, maximum, total)
    if splits > 1:
        parts = [maximum.new_empty(b, h, m, splits, *width) for width in ((d,), (), ())]
    forward_tiles[(tiles * b * splits, lanes)](
        q, k, v, span, rel_pos, key_start, query_start, None if few else _longest_first(span, lanes),
        *parts, *_strides(q, k, v, span, rel_pos), h, h // hkv, m, n, limit, skip, splits, ramp,
        scale, PACK=pack, CONSECUTIVE=m > 1, **widths, BM=bm, BN=bn, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if splits > 1:
        join_splits[(b * h * m,)](
            *parts, *joined, splits,
            D=d, SPLITS=triton.next_power_of_2(splits), WIDTH=triton.next_power_of_2(d), num_warps=4,
        )  # fmt: skip
    return joined


def backward(grad, q, k, v, span, rel_pos, key_start, query_start, out, maximum, total, ramp, scale, skip,
             max_span, need_q, need_kv, need_span, need_rel_pos):  # fmt: skip
    """The CUDA kernel of sukhops::adaptive_span_backward."""
    (b, h, m, d), (hkv, n) = q.shape, k.shape[1:3]
    widths = _widths(q)
    dq, dk, dv = (
        t.new_empty(t.shape if need else 0) for t, need in ((q, need_q), (k, need_kv), (v, need_kv))
    )
    drel = rel_pos.new_zeros(rel_pos.shape) if need_rel_pos else q.new_empty(0)
    if not out.numel():
        return dq, dk.zero_(), dv.zero_(), span.new_zeros(span.shape if need_span else 0), drel
    grad, q, k, v = _dense(grad), _dense(q), _dense(k), _dense(v)
    rel_pos, key_start, query_start = map(_contiguous, (rel_pos, key_start, query_start))
    limit, strides = _limit(n, max_span, rel_pos), _strides(q, k, v, span, rel_pos, grad)
    sizes = (h, h // hkv, m, n, limit, skip)

    def sums_by_tile(bm):
        delta, tiles = torch.empty_like(maximum), triton.cdiv(m, bm)
        first, full = (torch.empty(b, h, tiles, dtype=torch.int32, device=q.device) for _ in range(2))
        row_sums[(tiles * b, h)](
            grad, out, span, key_start, query_start, delta, first, full, *strides[9:-1], h, m, n, limit,
            skip, ramp, **widths, BM=bm, num_warps=4,
        )  # fmt: skip
        return maximum, total, delta, first, full

    by_row = span.dim() == 3 or key_start is not None
    grouped = GROUPED_DKV_BY_ROW_TILES if by_row else GROUPED_DKV_TILES
    table = REL_DKV_TILES if rel_pos is not None else DKV_TILES if h == hkv else grouped
    bm, bn, warps, stages = _pick(table, q)
    saved = sums_by_tile(bm)
    if need_kv:
        backward_keys[(triton.cdiv(n, bn) * b, hkv)](
            q, k, v, grad, span, rel_pos, key_start, query_start, _longest_first(span, hkv), *saved, dk, dv,
            *strides, *sizes, ramp, scale, BY_ROW=by_row, **widths,
            BM=bm, BN=bn, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    if need_rel_pos:
        bt, _, warps, stages = _pick(DREL_TILES, q)
        lanes, tiles = h if rel_pos.dim() == 3 else 1, triton.cdiv(limit, bt)
        splits = max(1, min(4 * PROGRAMS // (tiles * lanes), triton.cdiv(m, bt) * b))
        parts = maximum.new_empty(splits, lanes, limit, d)
        backward_distances[(tiles * splits, lanes)](
            q, k, v, grad, span, rel_pos, key_start, query_start, *sums_by_tile(bt), parts, *strides, b,
            *sizes, splits, h // lanes, ramp, scale, **widths, BT=bt, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        drel[..., :limit, :] = parts.sum(0).view(*rel_pos.shape[:-2], limit, d)
    dspan = torch.empty_like(maximum) if need_span else None
    if need_q or need_span:
        bm, bn, warps, stages = _pick(DQ_TILES if rel_pos is None else REL_DQ_TILES, q)
        backward_rows[(triton.cdiv(m, bm) * b, h)](
            q, k, v, grad, span, rel_pos, key_start, query_start, _longest_first(span, h), *saved[:3],
            dq if need_q else None, dspan, *strides, *sizes, ramp, scale,
            **widths, BM=bm, BN=bn, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    if need_span and span.dim() == 1:
        dspan = dspan.sum((0, 2))
    return dq, dk, dv, dspan if need_span else span.new_empty(0), drel
