"""Adaptive-span attention on CUDA: Triton kernels whose work follows the spans of the heads.

Every program reads the span of its head, or of its rows, and walks the keys from the first that can weigh
anything: no mask in memory, no look at a value by the host. Tiles where every key weighs 1 skip the mask.
Programs of the heads with the longest spans start first; few queries share out their keys among several
programs, whose results are joined in order. Each output has one owner: repeats are bitwise the same.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WIDTH = 256
PROGRAMS = 264  # that a launch should have: two for each processor
# queries and keys of a tile, warps, stages: by the bytes of an element, for heads up to 64, 128 and 256 wide
FORWARD = {
    2: ((128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
    4: ((32, 32, 4, 2), (32, 32, 4, 1), (16, 32, 4, 1)),
    8: ((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
}
FEW = {  # at most 16 rows, all the query heads that share a key head among them
    2: ((16, 128, 4, 3), (16, 64, 4, 3), (16, 64, 4, 2)),
    4: ((16, 32, 4, 2), (16, 32, 4, 1), (16, 32, 4, 1)),
    8: ((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
}


@triton.jit
def _part(at, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    c = FIRST + tl.arange(0, WIDTH)[None, :]
    if FIRST + WIDTH > D:
        return tl.load(at + c, mask=c < D, other=0.0)
    else:
        return tl.load(at + c)


@triton.jit
def _rows(ptr, at, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """The rows that start `at` [R] elements after ptr, in parts [R, D1] and [R, D2]: 80 is 64 and 16."""
    at = ptr + at[:, None]
    if D2:
        return (_part(at, 0, D1, D), _part(at, D1, D2, D))
    else:
        return (_part(at, 0, D1, D),)


@triton.jit
def _distances(rel_ptr, x, limit, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """rel_pos of distances x; those that are never seen give any other."""
    x = tl.minimum(tl.maximum(x, 0), limit - 1)
    return _rows(rel_ptr, x.to(tl.int64) * D, D, D1, D2)


@triton.jit
def _zeros(ROWS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ACC: tl.constexpr):
    if D2:
        return (tl.zeros((ROWS, D1), ACC), tl.zeros((ROWS, D2), ACC))
    else:
        return (tl.zeros((ROWS, D1), ACC),)


@triton.jit
def _dot(x, y, ACC: tl.constexpr):
    """x . y^T over the parts: [R, C]."""
    z = tl.dot(x[0], y[0].T, input_precision="ieee", out_dtype=ACC)
    if len(x) > 1:
        z = tl.dot(x[1], y[1].T, z, input_precision="ieee", out_dtype=ACC)
    return z


@triton.jit
def _add_product(acc, w, y, ACC: tl.constexpr):
    """acc + w . y, by part; w [R, C] is rounded to y's dtype."""
    w = w.to(y[0].dtype)
    first = tl.dot(w, y[0], acc[0], input_precision="ieee", out_dtype=ACC)
    if len(acc) > 1:
        return (first, tl.dot(w, y[1], acc[1], input_precision="ieee", out_dtype=ACC))
    else:
        return (first,)


@triton.jit
def _store(ptr, at, mask, acc, factor, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """acc * factor [R] or [] to rows `at`, where mask."""
    at, mask = ptr + at[:, None], mask[:, None]
    c = tl.arange(0, D1)[None, :]
    tl.store(at + c, (acc[0] * factor).to(ptr.dtype.element_ty), mask & (c < D))
    if D2:
        c = D1 + tl.arange(0, D2)[None, :]
        tl.store(at + c, (acc[1] * factor).to(ptr.dtype.element_ty), mask & (c < D))


@triton.jit
def _reach(span, ramp):
    """Distance at which weights end; below 0 all are the same."""
    reach = ramp + span
    return tl.where(reach < -1.0, -1.0, reach)


@triton.jit
def _window(p, reach, ramp, limit, start_ptr, at, n, CLOSED: tl.constexpr):
    """The first key that a row at p sees, and one from which on all weigh 1; a NaN sees every key, none whole.

    CLOSED: the key at the very end of the ramp, where the weight is 0, is seen as well.
    """
    if CLOSED:
        end = tl.floor(reach)
    else:
        end = tl.ceil(reach) - 1.0
    first = p - tl.where(reach < limit, end, limit - 1.0).to(tl.int32)
    near = tl.where(reach == reach, reach - ramp, 0.0)
    whole = p - tl.where(near < limit, near, limit * 1.0).to(tl.int32) + 1
    if start_ptr is not None:
        start = tl.minimum(tl.maximum(tl.load(start_ptr + at), 0), n).to(tl.int32)
        first, whole = tl.maximum(first, start), tl.maximum(whole, start)
    return first, whole


@triton.jit
def _weight(a, per_token):
    """Of a key for which a = ramp + span - x >= 0."""
    return tl.minimum(a * per_token, 1.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def forward_tiles(
    q_ptr,  # [B, H, M, D]
    k_ptr,  # [B, Hkv, N, D]
    v_ptr,
    span_ptr,  # [B, H, M] by its strides
    rel_ptr,  # [limit or more, D] or [H, .., D], or None
    start_ptr,  # [B, M] or None
    order_ptr,  # [lanes] the longest first, or None
    out_ptr,  # [B, H, M, splits, D]
    lse_ptr,  # [B, H, M, splits]
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, span_b, span_h, span_t, rel_h,
    heads, group, m, n, limit, skip, splits,
    ramp: tl.float64,
    scale: tl.float64,
    PACK: tl.constexpr,  # query heads of a tile; more than 1 only with a rel_pos that they share, or none
    SKEW: tl.constexpr,  # whether the rows of a tile stand one after the other, or all at one place (M = 1)
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    ramp = tl.cast(ramp, ACC)
    scale = tl.cast(scale, ACC) * tl.full((), 1.4426950408889634, ACC)  # exp2 below
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
    row = tl.minimum(tile * BM + r, PACK * m - 1)  # rows past the last repeat it, and are not stored
    query = row % m
    head = lane * PACK + row // m
    kv = lane * PACK // group
    p = n - m - skip + query
    reach = _reach(tl.load(span_ptr + b * span_b + head * span_h + query.to(tl.int64) * span_t), ramp)
    first, whole = _window(p, reach, ramp, limit, start_ptr, b * m + query, n, CLOSED=False)
    low, high = tl.maximum(tl.min(first, 0), 0), tl.max(p, 0) + 1
    whole, nearest = tl.max(whole, 0), tl.min(p, 0)
    share = tl.cdiv(tl.cdiv(high - low, BN), splits) * BN
    low += split * share
    high = tl.minimum(high, low + share)

    farthest = (p - first).to(ACC)[:, None]
    q = _rows(q_ptr + b * q_b, head * q_h + query.to(tl.int64) * q_t, D, D1, D2)
    k_ptr += b * k_b + kv * k_h
    v_ptr += b * v_b + kv * v_h
    if rel_ptr is not None:
        rel_ptr += lane * rel_h
        if SKEW:  # x = behind + r - c: those from `behind` on are the products `upper`, those before `lower`
            turn = (r[:, None] - c[None, :]) & (BN - 1)
            below = c[None, :] <= r[:, None]
            behind = n - m - skip + tile * BM - low
            upper = _dot(q, _distances(rel_ptr, behind + c, limit, D, D1, D2), ACC)
    top = tl.full((BM,), float("-inf"), ACC)
    total = tl.zeros((BM,), ACC)
    acc = _zeros(BM, D1, D2, ACC)
    for j in range(low, high, BN):
        at = tl.minimum(j + c, n - 1).to(tl.int64)
        s = _dot(q, _rows(k_ptr, at * k_t, D, D1, D2), ACC)
        if rel_ptr is not None:
            if SKEW:
                behind -= BN
                lower = _dot(q, _distances(rel_ptr, behind + c, limit, D, D1, D2), ACC)
                s += tl.gather(tl.where(below, upper, lower), turn, 1)
                upper = lower
            else:
                s += _dot(q, _distances(rel_ptr, n - m - skip - j - c, limit, D, D1, D2), ACC)
        s *= scale
        edge = (j < whole) | (j + BN - 1 > nearest)
        if edge:
            x = (p - j).to(ACC)[:, None] - c.to(ACC)[None, :]
            s = tl.where((x >= 0.0) & (x <= farthest), s, float("-inf"))
        here = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(here == float("-inf"), 0.0, here)
        w = tl.exp2(s - shift[:, None])
        if edge:
            x = (p - j).to(ACC)[:, None] - c.to(ACC)[None, :]
            w *= _weight(reach[:, None] - x, per_token)
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(w, 1)
        acc = _scaled(acc, decay[:, None])
        acc = _add_product(acc, w, _rows(v_ptr, at * v_t, D, D1, D2), ACC)
        top = here
    empty = total == 0.0
    out_row = ((b * heads + head) * m + query) * splits + split
    mask = tile * BM + r < PACK * m
    lse = (top + tl.log2(tl.where(empty, 1.0, total))) * tl.full((), 0.6931471805599453, ACC)
    lse = tl.where(empty, tl.where(splits == 1, float("inf"), float("-inf")), lse)
    tl.store(lse_ptr + out_row, lse, mask)
    factor = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))
    _store(out_ptr, out_row * D, mask, acc, factor[:, None], D, D1, D2)


@triton.jit
def _scaled(acc, factor):
    if len(acc) > 1:
        return (acc[0] * factor, acc[1] * factor)
    else:
        return (acc[0] * factor,)


@triton.jit
def join_splits(
    part_ptr,  # [rows, splits, D]
    part_lse_ptr,  # [rows, splits], -inf where a part saw nothing
    out_ptr,  # [rows, D]
    lse_ptr,  # [rows]
    splits,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    s, c = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    lse = tl.load(part_lse_ptr + row * splits + s, s < splits, other=float("-inf"))
    some = lse != float("-inf")
    top = tl.max(lse, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    w = tl.exp(lse - top)
    total = tl.sum(w, 0)
    empty = total == 0.0
    at = (row * splits + s[:, None]) * D + c[None, :]
    parts = tl.load(part_ptr + at, some[:, None] & (c < D)[None, :], other=0.0)
    out = tl.sum(parts * w[:, None], 0) / tl.where(empty, 1.0, total)
    tl.store(out_ptr + row * D + c, out.to(out_ptr.dtype.element_ty), c < D)
    tl.store(lse_ptr + row, tl.where(empty, float("inf"), top + tl.log(total)))


# ------------------------------------------------------------------ launchers


def _parts(d: int) -> tuple[int, int]:
    """Powers of two that hold a row of d: one, or two where they are fewer columns together."""
    whole = max(16, triton.next_power_of_2(d))
    rest = max(16, triton.next_power_of_2(d - whole // 2))
    return (whole // 2, rest) if whole // 2 + rest < whole else (whole, 0)


def _pick(table: dict, q: Tensor) -> tuple[int, int, int, int]:
    d = q.shape[3]
    return table[q.element_size()][(d > 64) + (d > 128)]


def _dense(t: Tensor) -> Tensor:
    """t, its last axis without gaps; the others are read by their strides."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _longest_first(span: Tensor, lanes: int) -> Tensor:
    reach = span if span.dim() == 1 else span.amax((0, 2))  # [H]
    return reach.view(lanes, -1).sum(1).argsort(descending=True)


def _limit(n: int, max_span: int | None, rel_pos: Tensor | None) -> int:
    """Distances from here on are never seen."""
    return min(n, n if max_span is None else max_span, n if rel_pos is None else rel_pos.shape[-2])


def _check_width(q: Tensor) -> None:
    if q.shape[3] > MAX_WIDTH:
        raise NotImplementedError(
            f"q: heads of at most d = {MAX_WIDTH} are supported on CUDA, got {q.shape[3]}"
        )


def forward(q, k, v, span, rel_pos, key_start, ramp, scale, skip, max_span):
    """The CUDA kernel of sukhops::adaptive_span."""
    _check_width(q)
    (b, h, m, d), (hkv, n) = q.shape, k.shape[1:3]
    out, lse = q.new_empty(q.shape), span.new_empty(q.shape[:3])
    if not lse.numel():
        return out, lse
    q, k, v = _dense(q), _dense(k), _dense(v)
    per_head = rel_pos is not None and rel_pos.dim() == 3
    pack = 1 if per_head or (rel_pos is not None and m > 1) else h // hkv
    if pack * m > 16:
        pack = 1
    few = pack * m <= 16 and (rel_pos is None or m == 1)
    bm, bn, warps, stages = _pick(FEW if few else FORWARD, q)
    tiles, lanes, limit = triton.cdiv(pack * m, bm), h // pack, _limit(n, max_span, rel_pos)
    splits = max(1, min(PROGRAMS // (tiles * b * lanes), triton.cdiv(limit, bn)))
    part = out if splits == 1 else lse.new_empty(b, h, m, splits, d)
    part_lse = lse if splits == 1 else lse.new_empty(b, h, m, splits)
    acc = tl.float64 if lse.dtype == torch.float64 else tl.float32
    d1, d2 = _parts(d)
    forward_tiles[(tiles * b * splits, lanes)](
        q, k, v, span, None if rel_pos is None else rel_pos.contiguous(),
        None if key_start is None else key_start.contiguous(), None if few else _longest_first(span, lanes),
        part, part_lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *(span.stride() if span.dim() == 3 else (0, span.stride(0), 0)), rel_pos.shape[1] * d if per_head else 0,
        h, h // hkv, m, n, limit, skip, splits, ramp, scale,
        PACK=pack, SKEW=m > 1, D=d, D1=d1, D2=d2, ACC=acc, BM=bm, BN=bn, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if splits > 1:
        join_splits[(b * h * m,)](
            part, part_lse, out, lse, splits,
            D=d, SPLITS=triton.next_power_of_2(splits), WIDTH=triton.next_power_of_2(d), num_warps=4,
        )  # fmt: skip
    return out, lse
