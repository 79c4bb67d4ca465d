"""Director on CUDA. One Triton kernel decodes with all heads; gradients use torch.mm and row-wise kernels.

`gate_tiles` multiplies a block of rows with tiles of every head, gates the scores in registers, and keeps a
running log-sum-exp and top k. Top-k decoding writes no tensor of width V. Each program processes consecutive
tiles (one split of the vocabulary). Splits are joined in a fixed order, so repeated calls give the same bits.
"""

import torch
import triton
import triton.language as tl
from sukhops.triton_kernels.vocab_head import Rows, _captured, _mm
from torch import Tensor

TILE_BYTES = 256 << 20  # size limit of a tile of float32 logits in the backward, per head
CHUNK = 1024  # columns that a row-wise kernel processes at once
ROW_WARPS = 8
# block sizes (rows, vocabulary entries, depth), warps, stages
FEW_ROWS = (16, 64, 64, 8, 3)  # at most 16 rows, and every top k
MANY_ROWS = (64, 64, 32, 8, 3)
MAX_TOP = 64  # for larger k, all log-probs are written and torch sorts them
SPLITS = 264  # target number of programs per launch: two per SM on a 132-SM GPU


@triton.jit
def _logsig(c):
    e = tl.exp(-tl.abs(c))
    y = 1.0 + e
    return tl.minimum(c, 0.0) + tl.where(c != c, c, 0.0) - (tl.log(y) + (e - (y - 1.0)) / y)


@triton.jit
def _log_gate(c, gamma):
    """logsigmoid(c), or 0 if it is -inf and gamma is 0, so that 0 * -inf is 0 instead of NaN."""
    t = _logsig(c)
    return tl.where(t == float("-inf"), tl.where(gamma == 0, 0.0, t), t)


@triton.jit
def _order(score, index):
    """An int64 sort key: by score, and among equal scores the lower index is larger."""
    bits = score.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.to(tl.int64) << 32) + (0xFFFFFFFF - index)


@triton.jit
def _product(hidden, weight, rows, row_mask, entries, entry_mask, depth,
             BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    acc = tl.zeros((BN, BV), dtype=ACC)
    for d0 in range(0, depth, BD):
        d = d0 + tl.arange(0, BD)
        inside = d < depth
        h = tl.load(
            hidden + rows[:, None] * depth + d[None, :], row_mask[:, None] & inside[None, :], other=0.0
        )
        w = tl.load(
            weight + entries[None, :] * depth + d[:, None], entry_mask[None, :] & inside[:, None], other=0.0
        )
        acc = tl.dot(h, w, acc, input_precision="ieee", out_dtype=ACC)
    return acc


@triton.jit
def gate_tiles(
    hidden_ptr,  # [n, depth]
    lm_ptr,  # [vocab, depth]
    cls_table,  # [HEADS] addresses of the classifier weights [vocab, depth]
    lm_bias_ptr,  # [vocab]
    cls_bias_ptr,  # [HEADS, vocab]
    gamma_ptr,  # [max(1, HEADS), n]
    affine_ptr,  # [2]
    out_ptr,  # out: [n, vocab] scores, if WRITE
    maximum_ptr,  # out: [n, splits]
    sum_ptr,  # out: [n, splits] sum of exp(score - maximum)
    top_ptr,  # out: [n, splits, TOP] largest sort keys of `_order`, if TOP
    n,
    vocab,
    depth,
    tiles,  # tiles per split
    HEADS: tl.constexpr,  # classifier heads; 0 if the classifier shares the LM head
    HAS_LM_BIAS: tl.constexpr,
    HAS_CLS_BIAS: tl.constexpr,
    WRITE: tl.constexpr,
    TOP: tl.constexpr,
    ACC: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
):
    split, splits = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    rows = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    row_mask = rows < n
    top = tl.full((BN,), float("-inf"), ACC)
    total = tl.zeros((BN,), ACC)
    if TOP:
        best = tl.full((BN, TOP), -(2**63) + 1, tl.int64)
    for tile in range(tiles):
        entries = (split * tiles + tile) * BV + tl.arange(0, BV)
        entry_mask = entries < vocab
        s = _product(hidden_ptr, lm_ptr, rows, row_mask, entries, entry_mask, depth, BN, BV, BD, ACC)
        if HAS_LM_BIAS:
            s += tl.load(lm_bias_ptr + entries, entry_mask, other=0.0)[None, :]
        if HEADS == 0:
            c = tl.load(affine_ptr) * s + tl.load(affine_ptr + 1)
            gamma = tl.load(gamma_ptr + rows, row_mask, other=0.0)[:, None]
            s += gamma * _log_gate(c, gamma)
        for a in tl.static_range(HEADS):
            cls = tl.load(cls_table + a).to(lm_ptr.dtype)
            cls = tl.multiple_of(cls, 16)
            c = _product(hidden_ptr, cls, rows, row_mask, entries, entry_mask, depth, BN, BV, BD, ACC)
            if HAS_CLS_BIAS:
                c += tl.load(cls_bias_ptr + a * vocab.to(tl.int64) + entries, entry_mask, other=0.0)[None, :]
            gamma = tl.load(gamma_ptr + a * n + rows, row_mask, other=0.0)[:, None]
            s += gamma * _log_gate(c, gamma)
        mask = row_mask[:, None] & entry_mask[None, :]
        s = tl.where(mask, s, float("-inf"))
        if WRITE:
            tl.store(out_ptr + rows[:, None] * vocab + entries[None, :], s, mask=mask)
        here = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(here == float("-inf"), 0.0, here)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(s - shift[:, None]), 1)
        top = here
        if TOP:
            keys = tl.where(mask, _order(s, entries[None, :]), -(2**63) + 1)
            if tl.max((tl.max(keys, 1) > tl.min(best, 1)).to(tl.int32), 0) > 0:
                both = tl.join(best, tl.topk(keys, TOP, dim=1)).reshape(BN, 2 * TOP)
                best = tl.topk(both, TOP, dim=1)
    tl.store(maximum_ptr + rows * splits + split, top, mask=row_mask)
    tl.store(sum_ptr + rows * splits + split, total, mask=row_mask)
    if TOP:
        k = tl.arange(0, TOP)
        tl.store(top_ptr + (rows[:, None] * splits + split) * TOP + k[None, :], best, mask=row_mask[:, None])


@triton.jit
def gate_backward_rows(
    tile_ptr,  # [rows, width] products with the classifier weights, or with the LM head if SHARED
    grad_ptr,  # [rows, vocab]
    logp_ptr,  # [rows, vocab]
    total_ptr,  # [rows] sum of grad
    gamma_ptr,  # [rows]
    bias_ptr,  # [width] bias of this vocabulary block
    affine_ptr,  # [2]
    lm_out_ptr,  # out: [rows, width] gradient of the LM logits in the inputs' dtype, if LM
    cls_out_ptr,  # out: [rows, width] gradient of the classifier logits, unless SHARED
    grad_gamma_ptr,  # [rows] accumulated over vocabulary blocks
    grad_affine_ptr,  # [rows, 2] accumulated over vocabulary blocks
    v0,
    width,
    vocab,
    LM: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    total, gamma = tl.load(total_ptr + row), tl.load(gamma_ptr + row)
    dgamma, da, db = total * 0.0, total * 0.0, total * 0.0
    for start in range(0, width, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        mask = columns < width
        at = row * vocab + v0 + columns
        g = tl.load(grad_ptr + at, mask, other=0.0)
        ds = g - tl.exp(tl.load(logp_ptr + at, mask, other=float("-inf"))) * total
        ds = tl.where(mask, ds, 0.0)
        z = tl.load(tile_ptr + row * width + columns, mask, other=0.0)
        if HAS_BIAS:
            z += tl.load(bias_ptr + columns, mask, other=0.0)
        c = z
        if SHARED:
            c = tl.load(affine_ptr) * z + tl.load(affine_ptr + 1)
        t = _log_gate(c, gamma)
        dgamma += tl.sum(tl.where(ds == 0, 0.0, ds * t), 0)
        e = tl.exp(-tl.abs(c))
        dc = gamma * ds * tl.where(c < 0, 1.0 / (1.0 + e), e / (1.0 + e))
        if SHARED:
            da += tl.sum(tl.where(dc == 0, 0.0, dc * z), 0)
            db += tl.sum(dc, 0)
            ds += tl.load(affine_ptr) * dc
        else:
            tl.store(cls_out_ptr + row * width + columns, dc.to(cls_out_ptr.dtype.element_ty), mask=mask)
        if LM:
            tl.store(lm_out_ptr + row * width + columns, ds.to(lm_out_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_gamma_ptr + row, tl.load(grad_gamma_ptr + row) + dgamma)
    if SHARED:
        tl.store(grad_affine_ptr + 2 * row, tl.load(grad_affine_ptr + 2 * row) + da)
        tl.store(grad_affine_ptr + 2 * row + 1, tl.load(grad_affine_ptr + 2 * row + 1) + db)


@triton.jit
def norm_rows(
    tile_ptr,  # [rows, width] products hidden @ weight^T
    out_ptr,  # out: [rows, width] gradient of the products in the inputs' dtype, if BACKWARD
    bias_ptr,  # [width] bias of this vocabulary block
    affine_ptr,  # [2]
    target_ptr,  # [rows]
    grad_ptr,  # [rows] gradient of the sum, if BACKWARD
    grad_logit_ptr,  # [rows] gradient of the target's logit, if BACKWARD
    sum_ptr,  # [rows] sum of (sigmoid(c) - 1/2)^2 over all entries but the target, accumulated over blocks
    logit_ptr,  # [rows] logit of the target: 0 before its block, unless BACKWARD
    grad_affine_ptr,  # [rows, 2] accumulated over blocks
    tile_stride,
    v0,
    width,
    HAS_BIAS: tl.constexpr,
    SHARED: tl.constexpr,
    BACKWARD: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row) - v0
    total = tl.load(sum_ptr + row)
    logit = tl.load(logit_ptr + row)
    da, db = logit * 0.0, logit * 0.0
    for start in range(0, width, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        mask = columns < width
        u = tl.load(tile_ptr + row * tile_stride + columns, mask, other=0.0)
        if HAS_BIAS:
            u += tl.load(bias_ptr + columns, mask, other=0.0)
        logit += tl.sum(tl.where(mask & (columns == target), u, 0.0), 0)
        c = u
        if SHARED:
            c = tl.load(affine_ptr) * u + tl.load(affine_ptr + 1)
        e = tl.exp(-tl.abs(c))
        p = 0.5 * (1.0 - e) / (1.0 + e)  # |sigmoid(c) - 1/2|
        p = tl.where(mask & (columns != target), tl.where(c < 0, -p, p), 0.0)
        if BACKWARD:
            dc = tl.load(grad_ptr + row) * 2.0 * p * (0.25 - p * p)
            if SHARED:
                da += tl.sum(tl.where(dc == 0, 0.0, dc * u), 0)
                db += tl.sum(dc, 0)
                dc *= tl.load(affine_ptr)
            dc = tl.where(columns == target, tl.load(grad_logit_ptr + row), dc)
            tl.store(out_ptr + row * width + columns, dc.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            total += tl.sum(p * p, 0)
    if BACKWARD:
        if SHARED:
            tl.store(grad_affine_ptr + 2 * row, tl.load(grad_affine_ptr + 2 * row) + da)
            tl.store(grad_affine_ptr + 2 * row + 1, tl.load(grad_affine_ptr + 2 * row + 1) + db)
    else:
        tl.store(sum_ptr + row, total)
        tl.store(logit_ptr + row, logit)


# ------------------------------------------------------------------ launchers


def _acc(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _run(hidden, lm_weight, cls_weight, gamma, lm_bias, cls_bias, cls_affine, top: int, write: bool):
    """Decodes: scores [N, V] or None, their maximum [N, 1], log sum exp(scores - maximum) [N, 1], and the
    largest sort keys of every split [N, splits, top] or None."""
    (n, d), v, heads, acc = hidden.shape, lm_weight.shape[0], len(cls_weight), _acc(hidden)
    few = bool(top) or n <= FEW_ROWS[0]
    bn, bv, bd, warps, stages = FEW_ROWS if few else MANY_ROWS
    bv = max(bv, top)
    blocks, whole = triton.cdiv(n, bn), triton.cdiv(v, bv)
    tiles = triton.cdiv(whole, max(1, min(whole, SPLITS // blocks)))
    splits = triton.cdiv(whole, tiles)
    weights = [w.contiguous() for w in cls_weight]
    # filled on the device: a copy from the host would synchronize and cannot be captured in a CUDA graph
    pointers = [hidden.new_full((1,), w.data_ptr(), dtype=torch.int64) for w in weights]
    table = torch.cat(pointers) if pointers else hidden.new_zeros(1, dtype=torch.int64)
    has_bias = any(b.numel() for b in cls_bias)
    biases = hidden.new_zeros(max(1, heads), v, dtype=acc) if has_bias else hidden
    for a, b in enumerate(cls_bias):
        if b.numel():
            biases[a] = b
    gamma = torch.where((gamma >= 0) & (gamma < float("inf")), gamma, float("nan")).contiguous()
    scores = hidden.new_empty(n, v, dtype=acc) if write else hidden
    maximum, total = (hidden.new_empty(n, splits, dtype=acc) for _ in range(2))
    keys = hidden.new_empty(n, splits, top, dtype=torch.int64) if top else None
    gate_tiles[(splits, blocks)](
        hidden.contiguous(), lm_weight.contiguous(), table,
        hidden if lm_bias is None else lm_bias.to(acc).contiguous(), biases, gamma,
        gamma if cls_affine is None else cls_affine.contiguous(), scores, maximum, total,
        table if keys is None else keys, n, v, d, tiles,
        HEADS=heads, HAS_LM_BIAS=lm_bias is not None, HAS_CLS_BIAS=has_bias, WRITE=write, TOP=top,
        ACC=tl.float64 if acc == torch.float64 else tl.float32, BN=bn, BV=bv, BD=bd,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    top_score = maximum.amax(1, keepdim=True)
    log_sum = (total * (maximum - top_score).exp()).sum(1, keepdim=True).log()
    return scores if write else None, top_score, log_sum, keys


def logp(*arguments):
    """The CUDA kernel of sukhops::director."""
    hidden, lm_weight = arguments[:2]
    if hidden.shape[0] == 0:
        empty = hidden.new_empty(0, lm_weight.shape[0], dtype=_acc(hidden))
        return empty, *(empty.new_empty(0) for _ in range(2))
    scores, maximum, log_sum, _ = _run(*arguments, top=0, write=True)
    return scores.sub_(maximum).sub_(log_sum), maximum.squeeze(1), log_sum.squeeze(1)


def topk(*arguments):
    """The CUDA kernel of sukhops::director_topk."""
    *arguments, k = arguments
    hidden = arguments[0]
    n, acc = hidden.shape[0], _acc(hidden)
    top = max(2, triton.next_power_of_2(k))
    if n == 0:
        none = [hidden.new_empty(0, dtype=acc) for _ in range(2)]
        return hidden.new_empty(0, k, dtype=acc), hidden.new_empty(0, k, dtype=torch.int64), *none
    if top > MAX_TOP or acc == torch.float64:  # a sort key holds a float32 score
        all_values, *sums = logp(*arguments)
        values, indices = all_values.sort(dim=1, descending=True, stable=True)
        return values[:, :k].contiguous(), indices[:, :k].contiguous(), *sums
    _, maximum, log_sum, keys = _run(*arguments, top=top, write=False)
    keys = keys.flatten(1).topk(k, dim=1).values  # [N, k], descending
    bits = keys >> 32
    values = (bits ^ ((bits >> 63) & 0x7FFFFFFF)).to(torch.int32).view(torch.float32)
    indices = 0xFFFFFFFF - (keys & 0xFFFFFFFF)
    return (values - maximum) - log_sum, indices, maximum.squeeze(1), log_sum.squeeze(1)


def _blocks(n: int, v: int):
    width = max(CHUNK, TILE_BYTES // (4 * max(n, 1) * CHUNK) * CHUNK)
    return min(v, width), range(0, v if n else 0, width)


def backward(grad, grad_elsewhere, logp, hidden, lm_weight, cls_weight, gamma, lm_bias, cls_bias, cls_affine,
             need_hidden, need_lm, need_cls, need_bias):  # fmt: skip
    """The CUDA kernel of sukhops::director_backward."""
    (n, d), v, acc, shared = hidden.shape, lm_weight.shape[0], _acc(hidden), cls_affine is not None
    grad, logp, gamma, hidden = grad.contiguous(), logp.contiguous(), gamma.contiguous(), hidden.contiguous()
    empty = hidden.new_empty(0)
    weights, biases = [lm_weight, *cls_weight], [lm_bias, *(b if b.numel() else None for b in cls_bias)]
    need = [need_lm, *[need_cls] * len(cls_weight)]
    dw = [torch.zeros_like(w, memory_format=torch.contiguous_format) if x else empty
          for w, x in zip(weights, need, strict=True)]  # fmt: skip
    db = [hidden.new_zeros(v if need_bias and b is not None else 0) for b in biases]
    dh = hidden.new_zeros(n, d, dtype=acc)
    dgamma, daffine = torch.zeros_like(gamma), gamma.new_zeros(n, 2)
    total = grad.sum(1) if grad_elsewhere is None else grad.sum(1) + grad_elsewhere
    affine = gamma if cls_affine is None else cls_affine.contiguous()
    width, starts = _blocks(n, v)
    for v0 in starts:
        w = min(width, v - v0)
        outs = [hidden.new_empty(n, w) for _ in weights]
        for i in [0] if shared else range(1, len(weights)):
            tile = _mm(hidden, weights[i][v0 : v0 + w].T)
            bias = None if biases[i] is None else biases[i][v0 : v0 + w].to(acc).contiguous()
            a = max(0, i - 1)
            gate_backward_rows[(n,)](
                tile, grad, logp, total, gamma[a], tile if bias is None else bias, affine, outs[0], outs[i],
                dgamma[a], daffine, v0, w, v,
                LM=i <= 1, SHARED=shared, HAS_BIAS=bias is not None, CHUNK=CHUNK, num_warps=ROW_WARPS,
            )  # fmt: skip
            del tile  # frees its memory for the next tile
        for i, g in enumerate(outs):
            if need_hidden:
                dh.add_(_mm(g, weights[i][v0 : v0 + w]))
            if need[i]:
                torch.mm(g.T, hidden, out=dw[i][v0 : v0 + w])
            if db[i].numel():
                db[i][v0 : v0 + w] = g.sum(0, dtype=acc)
    return (
        dh.to(hidden.dtype) if need_hidden else empty, dw[0], dw[1:], dgamma, db[0],
        [b if x.numel() else x.new_zeros(0) for b, x in zip(db[1:], cls_bias, strict=True)],
        daffine.sum(0) if shared else gamma.new_empty(0),
    )  # fmt: skip


def _classifier(target: Tensor, label: Tensor, v: int):
    """Masks of labeled rows and of invalid rows (their result is NaN), and targets clamped to [0, v)."""
    given = target != -100
    wrong = given & ((target < 0) | (target >= v) | (label < -1) | (label > 1))
    return given & (label != -1), wrong, target.clamp(0, v - 1)


def dot(hidden, weight, target, label, bias):
    """The CUDA kernel of sukhops::director_dot: gathers one weight row per target."""
    counts, wrong, entry = _classifier(target, label, weight.shape[0])
    acc = _acc(hidden)
    out = (hidden.to(acc) * weight[entry].to(acc)).sum(1)
    if bias is not None:
        out = out + bias[entry].to(acc)
    return torch.where(counts, out, 0.0).masked_fill(wrong, float("nan"))


def dot_backward(grad, hidden, weight, target, label, need_hidden, need_weight, need_bias):
    """The CUDA kernel of sukhops::director_dot_backward; index_put_ sorts on CUDA, so it is deterministic."""
    counts, _, entry = _classifier(target, label, weight.shape[0])
    grad, empty, acc = torch.where(counts, grad, 0.0), hidden.new_empty(0), _acc(hidden)
    dh = (grad.unsqueeze(1) * weight[entry].to(acc)).to(hidden.dtype) if need_hidden else empty
    dw = torch.zeros_like(weight, memory_format=torch.contiguous_format) if need_weight else empty
    db = weight.new_zeros(weight.shape[0], dtype=acc) if need_bias else empty
    rows = Rows(counts)
    h, g, entry = (rows.select(t) for t in (hidden, grad, entry))
    if need_weight:
        parts = g.unsqueeze(1) * h.to(acc)
        if _captured(hidden):  # the host cannot read how many targets are distinct
            dw.index_put_((entry,), parts.to(dw.dtype), accumulate=True)
        else:
            used, where = entry.unique(return_inverse=True)
            sums = parts.new_zeros(used.shape[0], weight.shape[1])
            dw[used] = sums.index_put_((where,), parts, accumulate=True).to(dw.dtype)
    if need_bias:
        db.index_put_((entry,), g, accumulate=True)
    return dh, dw, db.to(weight.dtype)


def _norm(hidden, weight, target, label, bias, affine, logits, grads, need_hidden, need_weight, need_bias):
    v, d = weight.shape
    acc, empty = _acc(hidden), hidden.new_empty(0)
    counts, wrong, entry = _classifier(target, label, v)
    rows = Rows(counts)
    h, t, *given = (rows.select(x) for x in (hidden, entry, *grads))
    h, t, n = h.contiguous(), t.contiguous(), h.shape[0]
    kept = min(n, logits.shape[0])
    if not grads:
        logits[kept:].zero_()  # a captured backward pass reads all rows
    others = max(1, v - 1)
    total, logit = hidden.new_zeros(n, dtype=acc), hidden.new_zeros(n, dtype=acc)
    daffine = hidden.new_zeros(n, 2, dtype=acc)
    upstream = (given[0] / others, given[1]) if given else (total, total)
    dh = hidden.new_zeros(n, d, dtype=acc) if need_hidden else empty
    dw = torch.zeros_like(weight, memory_format=torch.contiguous_format) if need_weight else empty
    db = weight.new_zeros(v) if need_bias else empty
    width, starts = _blocks(n, v)
    pair = total if affine is None else affine.contiguous()
    for v0 in starts:
        w = min(width, v - v0)
        block = weight[v0 : v0 + w]
        out = hidden.new_empty(n, w)
        b = None if bias is None else bias[v0 : v0 + w].to(acc).contiguous()
        for lo, hi in ((0, kept), (kept, n)):
            if lo == hi:
                continue
            tile = logits[:hi, v0 : v0 + w] if hi == kept else None
            if tile is None or not grads:
                tile = _mm(h[lo:hi], block.T, tile)
            norm_rows[(hi - lo,)](
                tile, out[lo:hi], tile if b is None else b, pair, t[lo:hi], *(x[lo:hi] for x in upstream),
                total[lo:hi], logit[lo:hi], daffine[lo:hi], tile.stride(0), v0, w,
                HAS_BIAS=b is not None, SHARED=affine is not None, BACKWARD=bool(grads), CHUNK=CHUNK,
                num_warps=ROW_WARPS,
            )  # fmt: skip
            del tile  # frees its memory for the next tile
        if need_hidden:
            dh.add_(_mm(out, block))
        if need_weight:
            torch.mm(out.T, h, out=dw[v0 : v0 + w])
        if need_bias:
            db[v0 : v0 + w] = out.sum(0, dtype=acc)
        del out

    if not grads:
        return tuple(rows.spread(x).masked_fill(wrong, float("nan")) for x in (total / others, logit))
    dh = rows.spread(dh).to(hidden.dtype) if need_hidden else dh
    return dh, dw, db, empty.to(acc) if affine is None else daffine.sum(0)


def norm(hidden, weight, target, label, bias, affine, logits_budget):
    """The CUDA kernel of sukhops::director_norm."""
    v, acc = weight.shape[0], _acc(hidden)
    logits = hidden.new_empty(min(len(hidden), logits_budget // (v * acc.itemsize)), v, dtype=acc)
    return *_norm(hidden, weight, target, label, bias, affine, logits, (), False, False, False), logits


def norm_backward(
    grad, grad_logit, hidden, weight, target, label, bias, affine, logits, need_hidden, need_weight, need_bias
):
    """The CUDA kernel of sukhops::director_norm_backward."""
    need = need_hidden, need_weight, need_bias
    return _norm(hidden, weight, target, label, bias, affine, logits, (grad, grad_logit), *need)
