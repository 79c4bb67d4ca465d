"""vocab_head on CUDA: torch.mm over blocks of the vocabulary, Triton kernels over the rows of each block.

The algorithm is that of csrc/vocab_head.cpp. Products of half-precision inputs are float32, so logits are
never rounded to the inputs' dtype. Rows without any effect (every target ignored, or no gradient) are dropped
first, which synchronizes with the device once. While a CUDA graph is captured, all rows are computed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_BYTES = 256 << 20  # size limit of a tile of float32 logits
CHUNK = 2048  # columns that a program processes at once
WARPS = 8
FAR = tl.constexpr(-800.0)  # lower bound of t in exp(t) * t, so that the product is 0 at t = -inf, not NaN


@triton.jit
def _tanh(y):
    """Uses an odd polynomial near 0 in float32, where 1 - 2 / (e + 1) loses precision by cancellation."""
    a = tl.abs(y)
    e = tl.exp(-2.0 * a)
    big = (1.0 - e) / (1.0 + e)
    big = tl.where(y < 0, -big, big)
    if y.dtype == tl.float64:
        return big
    z = y * y
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    return tl.where(a < 0.625, p * z * y + y, big)


@triton.jit
def _logit(z, bias_ptr, columns, mask, bound, scale, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """Logits of one row: product + bias, scaled and soft-capped as `_curve` says; -inf outside the mask."""
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=mask, other=0.0)
    z *= scale
    if HAS_CAP:
        z = bound * _tanh(z)
    return tl.where(mask, z, float("-inf"))


@triton.jit
def forward_rows(
    tile_ptr,  # [rows, width] products hidden @ weight^T, float32 or float64, row stride `stride`
    out_ptr,  # out if MEAN: [rows, width] exp(logit - maximum) * (dlogit/draw) / slope * mean_scale
    bias_ptr,  # [width] bias of this vocabulary block
    target_ptr,  # [rows, K]
    target_logit_ptr,  # out: [rows, K]
    top_value_ptr,  # out: [rows, TOP] largest logits of this block
    top_index_ptr,  # out: [rows, TOP]
    maximum_ptr,  # [rows] running maximum over blocks, like the next two
    sum_ptr,  # [rows]
    moments_ptr,  # [rows, 3] if MOMENTS: sums of e * t, e * e and logit; t = logit - maximum, e = exp(t)
    decay_ptr,  # out: [rows] exp(old maximum - new maximum), the factor that rescales earlier sums
    stride,
    v0,
    width,
    targets,
    bound,
    scale,
    mean_scale,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    MOMENTS: tl.constexpr,
    MEAN: tl.constexpr,
    TOP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tile_ptr + row * stride
    old = tl.load(maximum_ptr + row)
    top = old
    for start in range(0, width, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        mask = columns < width
        z = tl.load(tile + columns, mask=mask, other=0.0)
        z = _logit(z, bias_ptr, columns, mask, bound, scale, HAS_BIAS, HAS_CAP)
        top = tl.maximum(top, tl.max(z, 0))
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros_like(shift)
    first, second, plain = tl.zeros_like(shift), tl.zeros_like(shift), tl.zeros_like(shift)
    for start in range(0, width, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        mask = columns < width
        z = tl.load(tile + columns, mask=mask, other=0.0)
        z = _logit(z, bias_ptr, columns, mask, bound, scale, HAS_BIAS, HAS_CAP)
        e = tl.exp(z - shift)
        total += tl.sum(e, 0)
        if MOMENTS:
            first += tl.sum(e * tl.maximum(z - shift, FAR), 0)
            second += tl.sum(e * e, 0)
            plain += tl.sum(tl.where(mask, z, 0.0), 0)
        if MEAN:
            if HAS_CAP:
                y = z / bound
                e *= tl.where(mask, 1.0 - y * y, 0.0)
            e *= mean_scale
            tl.store(out_ptr + row * width + columns, e.to(out_ptr.dtype.element_ty), mask=mask)
    decay = tl.exp(old - shift)
    before = tl.load(sum_ptr + row)
    tl.store(maximum_ptr + row, top)
    tl.store(sum_ptr + row, before * decay + total)
    tl.store(decay_ptr + row, decay)
    if MOMENTS:
        m = moments_ptr + 3 * row
        tl.store(m, decay * (tl.load(m) + tl.maximum(old - shift, FAR) * before) + first)
        tl.store(m + 1, decay * decay * tl.load(m + 1) + second)
        tl.store(m + 2, tl.load(m + 2) + plain)

    for k in range(targets):
        t = tl.load(target_ptr + row * targets + k) - v0
        inside = (t >= 0) & (t < width)
        z = tl.load(tile + t, mask=inside, other=0.0)
        z = _logit(z, bias_ptr, t, inside, bound, scale, HAS_BIAS, HAS_CAP)
        tl.store(target_logit_ptr + row * targets + k, z, mask=inside)

    # TOP times: the next largest logit; of equal logits the lower index comes first
    last = tl.full([], float("inf"), tile_ptr.dtype.element_ty)
    last_at = tl.full([], -1, tl.int64)
    for k in range(TOP):
        best = tl.full([], float("-inf"), tile_ptr.dtype.element_ty)
        best_at = tl.full([], 0, tl.int64) + width
        for start in range(0, width, CHUNK):
            columns = start + tl.arange(0, CHUNK).to(tl.int64)
            mask = columns < width
            z = tl.load(tile + columns, mask=mask, other=0.0)
            z = _logit(z, bias_ptr, columns, mask, bound, scale, HAS_BIAS, HAS_CAP)
            after = mask & ((z < last) | ((z == last) & (columns > last_at)))
            here = tl.max(tl.where(after, z, float("-inf")), 0)
            here_at = tl.min(tl.where(after & (z == here), columns, width), 0)
            better = (here_at < width) & ((best_at == width) | (here > best))
            best_at = tl.where(better, here_at, best_at)
            best = tl.where(better, here, best)
        last = best
        last_at = best_at
        tl.store(top_value_ptr + row * TOP + k, best)
        tl.store(top_index_ptr + row * TOP + k, best_at + v0)


@triton.jit
def backward_rows(
    tile_ptr,  # [rows, width] products hidden @ weight^T, float32 or float64, row stride `stride`
    out_ptr,  # out: [rows, width] dloss/dproduct in the inputs' dtype
    tile_row_ptr,  # [rows] if KEPT: index of each row in tile; otherwise row i is at index i
    bias_ptr,  # [width] bias of this vocabulary block
    maximum_ptr,  # [rows], like the next four
    log_sum_ptr,
    entropy_ptr,
    grad_log_sum_ptr,
    grad_entropy_ptr,
    pick_ptr,  # [rows, picks]
    grad_pick_ptr,  # [rows, picks]
    stride,
    v0,
    width,
    picks,
    bound,
    scale,
    slope,
    KEPT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile_row = tl.load(tile_row_ptr + row) if KEPT else row
    columns = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    mask = columns < width
    z = tl.load(tile_ptr + tile_row * stride + columns, mask=mask, other=0.0)
    z = _logit(z, bias_ptr, columns, mask, bound, scale, HAS_BIAS, HAS_CAP)
    t = (z - tl.load(maximum_ptr + row)) - tl.load(log_sum_ptr + row)  # log p
    g = tl.load(grad_log_sum_ptr + row)
    if ENTROPY:
        g -= tl.load(grad_entropy_ptr + row) * (tl.maximum(t, FAR) + tl.load(entropy_ptr + row))
    g *= tl.exp(t)
    for p in range(picks):
        at = tl.load(pick_ptr + row * picks + p) - v0
        g += tl.where(columns == at, tl.load(grad_pick_ptr + row * picks + p), 0.0)
    g *= slope
    if HAS_CAP:
        y = z / bound
        g *= tl.where(mask, 1.0 - y * y, 0.0)
    tl.store(out_ptr + row * width + columns, g.to(out_ptr.dtype.element_ty), mask=mask)


def forward(hidden, weight, target, bias, k, statistics, softcap, scale, temperature, ignore_index,
            logits_budget, need_hidden, need_weight, need_bias):  # fmt: skip
    """The CUDA kernel of sukhops::vocab_head."""
    n, (v, d), targets = hidden.shape[0], weight.shape, target.shape[1]
    acc = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    keep_mean = need_hidden and not need_weight and not need_bias
    counts = target != ignore_index  # [N, K]
    rows = Rows(counts.any(1) if targets else None)
    h = rows.select(hidden)  # [R, D]
    t = rows.select(target).contiguous()  # [R, K]
    r = h.shape[0]
    b = None if bias is None else bias.to(acc)
    maximum = h.new_full((r,), float("-inf"), dtype=acc)
    total = h.new_zeros(r, dtype=acc)
    moments = h.new_zeros(r if statistics else 0, 3, dtype=acc)
    bound, scale, _ = _curve(softcap, scale, temperature)
    decay = h.new_empty(r, dtype=acc)
    logit = h.new_zeros(r, targets, dtype=acc)
    found = 0 if r else k  # without rows, no block writes to top_value: allocate k columns here
    top_value, top_index = h.new_empty(r, found, dtype=acc), t.new_empty(r, found)
    mean = h.new_zeros(r, d, dtype=acc) if keep_mean else None
    # a power of two, so that sums over the vocabulary do not exceed max |weight|; float16 cannot reach
    # the limit of float32
    mean_scale = 1.0 if h.dtype == torch.float16 else 2.0 ** -v.bit_length()
    held = min(n, logits_budget // (v * acc.itemsize)) if need_weight or need_bias else 0
    logits = h.new_empty(held, v, dtype=acc)
    kept = min(r, held)
    logits[kept:].zero_()  # a captured backward pass reads all rows
    width = _width(r, v)
    for v0 in range(0, v if r else 0, width):
        w = min(width, v - v0)
        block = weight[v0 : v0 + w]
        out = h.new_empty(r if keep_mean else 0, w)
        top = min(k, w)
        value, index = h.new_empty(r, top, dtype=acc), t.new_empty(r, top)
        for lo, hi in ((0, kept), (kept, r)):
            if lo == hi:
                continue
            tile = _mm(h[lo:hi], block.T, logits[:hi, v0 : v0 + w] if hi == kept else None)
            forward_rows[(hi - lo,)](
                tile, out[lo:hi], tile if b is None else b[v0:], t[lo:hi], logit[lo:hi], value[lo:hi],
                index[lo:hi], maximum[lo:hi], total[lo:hi], moments[lo:hi] if statistics else decay,
                decay[lo:hi], tile.stride(0), v0, w, targets, bound, scale, mean_scale,
                HAS_BIAS=b is not None, HAS_CAP=softcap is not None, MOMENTS=statistics, MEAN=keep_mean,
                TOP=top, CHUNK=CHUNK, num_warps=WARPS,
            )  # fmt: skip
            del tile  # frees its memory for the next tile
        if k:  # earlier blocks come first, so a stable sort puts the lower of equal logits' indices first
            value, index = torch.cat([top_value, value], 1), torch.cat([top_index, index], 1)
            top_value, order = value.sort(dim=1, descending=True, stable=True)
            top_value, top_index = top_value[:, :k], index.gather(1, order)[:, :k]
        if keep_mean:
            mean = mean.mul_(decay.unsqueeze(1)).add_(_mm(out, block))
        del out
    log_sum = total.log()
    numbers = [maximum, log_sum]
    if statistics:
        first, second, plain = moments.unbind(1)
        numbers += [log_sum - first / total, second.log() - 2 * log_sum, plain / v]
    if targets:  # the host cannot check targets without synchronizing: an out-of-range target gives NaN
        wrong = ((t < 0) | (t >= v)) & (t != ignore_index)
        numbers[1:] = [x.masked_fill(wrong.any(1), float("nan")) for x in numbers[1:]]
    top_value = top_value.masked_fill(numbers[1].isnan().unsqueeze(1), float("nan"))
    maximum, log_sum, *moments = (rows.spread(x) for x in numbers)
    if mean is None:
        mean = h.new_zeros(0, dtype=acc)
    else:
        mean = rows.spread(mean / (mean_scale * total).unsqueeze(1))
    return (
        maximum, log_sum, rows.spread(logit), rows.spread(top_value), rows.spread(top_index.contiguous()),
        *(moments or (maximum.new_empty(0) for _ in range(3))), mean, logits,
    )  # fmt: skip


def backward(hidden, weight, target, bias, topk_index, maximum, log_sum, entropy, mean_weight, logits,
             grad_log_sum, grad_target, grad_topk, grad_entropy, softcap, scale, temperature, ignore_index,
             need_hidden, need_weight, need_bias):  # fmt: skip
    """The CUDA kernel of sukhops::vocab_head_backward."""
    v, d = weight.shape
    acc = log_sum.dtype
    of_entropy = grad_entropy is not None
    curve = _curve(softcap, scale, temperature)
    dropped = (target == ignore_index).all(1) & (target.shape[1] > 0)  # [N]
    pick, grad_pick = _picks(target, topk_index, grad_target, grad_topk, ignore_index, acc)  # [N, P]
    grad_pick = grad_pick.masked_fill(dropped.unsqueeze(1), 0.0)
    grad_log_sum, grad_entropy = (
        log_sum.new_zeros(log_sum.shape) if g is None else g.masked_fill(dropped, 0.0)
        for g in (grad_log_sum, grad_entropy)
    )  # fmt: skip
    empty = hidden.new_empty(0)
    b = None if bias is None else bias.to(acc)
    if mean_weight.dim() == 2 and not need_weight and not need_bias and not of_entropy:
        if not need_hidden:
            return empty, empty, empty
        coefficient = _through_curve(hidden, weight, b, pick, grad_pick, curve)
        dh = mean_weight * (grad_log_sum * curve[2]).unsqueeze(1)
        for p in range(pick.shape[1]):
            dh.addcmul_(coefficient[:, p, None], weight[pick[:, p].clamp(min=0)].to(acc))
        return dh.to(hidden.dtype), empty, empty

    # rows whose gradient needs the whole softmax; NaN != 0 is True, so NaN gradients are included
    whole = (grad_log_sum != 0) | (grad_entropy != 0)
    captured = _captured(hidden)
    rows = Rows(~dropped if captured else whole)
    h = rows.select(hidden)  # [R, D]
    r = h.shape[0]
    tile_row = rows.select((~dropped).cumsum(0) - 1)
    held = logits.shape[0]  # the forward kept the logits of its first `held` rows that were not dropped
    kept = min(r, held) if captured or held in (0, len(hidden)) else int((tile_row < held).sum())
    entropy = entropy if of_entropy else log_sum  # placeholder, not read
    numbers = [rows.select(x) for x in (maximum, log_sum, entropy, grad_log_sum, grad_entropy)]
    if rows.rest is not None:
        numbers[0] = numbers[0].masked_fill(rows.rest, float("inf"))  # so that exp(logit - maximum) is 0
    row_pick, row_grad_pick = rows.select(pick).contiguous(), rows.select(grad_pick).contiguous()
    dh = h.new_zeros(r, d, dtype=acc) if need_hidden else None
    dw = torch.zeros_like(weight, memory_format=torch.contiguous_format) if need_weight else empty
    db = weight.new_zeros(v, dtype=acc) if need_bias else empty
    width = _width(r, v)
    for v0 in range(0, v if r else 0, width):
        w = min(width, v - v0)
        block = weight[v0 : v0 + w]
        g = h.new_empty(r, w)
        for lo, hi in ((0, kept), (kept, r)):
            if lo == hi:
                continue
            tile = logits[:, v0 : v0 + w] if hi == kept else _mm(h[lo:hi], block.T)
            backward_rows[(hi - lo, triton.cdiv(w, CHUNK))](
                tile, g[lo:hi], tile_row[lo:hi], tile if b is None else b[v0:], *(x[lo:hi] for x in numbers),
                row_pick[lo:hi], row_grad_pick[lo:hi], tile.stride(0), v0, w, row_pick.shape[1], *curve,
                KEPT=hi == kept, HAS_BIAS=b is not None, HAS_CAP=softcap is not None, ENTROPY=of_entropy,
                CHUNK=CHUNK, num_warps=WARPS,
            )  # fmt: skip
            del tile  # frees its memory for the next tile
        if need_hidden:
            dh.add_(_mm(g, block))
        if need_weight:
            torch.mm(g.T, h, out=dw[v0 : v0 + w])
        if need_bias:
            db[v0 : v0 + w] = g.sum(0, dtype=acc)
        del g
    dh = rows.spread(dh) if need_hidden else None
    if not captured and len(others := (~whole & (grad_pick != 0).any(1)).nonzero().squeeze(1)):
        h, pick, grad_pick = hidden[others], pick[others], grad_pick[others]
        coefficient = _through_curve(h, weight, b, pick, grad_pick, curve)
        entries = pick.clamp(min=0).flatten()
        if need_hidden:
            dh[others] += (coefficient.unsqueeze(-1) * weight[entries].view(*pick.shape, d)).sum(1)
        if need_weight:  # index_put_ sorts its indices on CUDA, so it is deterministic
            parts = (coefficient.unsqueeze(-1) * h.unsqueeze(1)).reshape(-1, d)
            dw.index_put_((entries,), parts.to(dw.dtype), accumulate=True)
        if need_bias:
            db.index_put_((entries,), coefficient.flatten(), accumulate=True)
    return dh.to(hidden.dtype) if need_hidden else empty, dw, db.to(weight.dtype) if need_bias else empty


def _curve(softcap: float | None, scale: float, temperature: float) -> tuple[float, float, float]:
    """(bound, scale, slope): logit = scale * raw, or bound * tanh(scale * raw) with softcap; slope at 0."""
    if softcap is None:
        return 0.0, scale / temperature, scale / temperature
    return softcap / temperature, scale / softcap, scale / temperature


def _captured(t: Tensor) -> bool:
    """Whether work on t goes into a CUDA graph: then the host cannot read values of the device."""
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


class Rows:
    """The rows of [N, ...] tensors where a mask [N] is True, or all rows if it is None.

    While a CUDA graph is captured, the host cannot read how many these are. Then all rows are selected, these
    first, and the others are zeros: row i of a selection is the same row in a graph and outside of it.
    """

    def __init__(self, mask: Tensor | None):
        self.index = self.rest = None  # indices of the selected rows; a mask of those that are zeros
        if mask is not None and _captured(mask):
            self.index = (~mask).int().argsort(stable=True)
            self.rest = ~mask[self.index]
        elif mask is not None:
            self.index = mask.nonzero().squeeze(1)
        self.n = None if mask is None else len(mask)

    def select(self, t: Tensor) -> Tensor:
        """The selected rows of t [N, ...]."""
        return t if self.index is None else self._zero_rest(t[self.index])

    def spread(self, t: Tensor) -> Tensor:
        """The inverse of select: [N, ...], zero elsewhere."""
        if self.index is None:
            return t
        return t.new_zeros(self.n, *t.shape[1:]).index_copy_(0, self.index, self._zero_rest(t))

    def _zero_rest(self, t: Tensor) -> Tensor:
        if self.rest is None:
            return t
        return t.masked_fill(self.rest.view(-1, *[1] * (t.dim() - 1)), 0)


def _width(rows: int, v: int) -> int:
    """Columns of a tile: a multiple of CHUNK that fits in TILE_BYTES, at least two chunks."""
    return max(2, TILE_BYTES // (4 * max(rows, 1) * CHUNK)) * CHUNK if v > 2 * CHUNK else v


def _mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b in the accumulation dtype, written by the matrix product: a separate cast would be slow."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b, out=out)
    return (
        torch.mm(a, b, out_dtype=torch.float32, out=out)
        if a.is_cuda
        else torch.mm(a.float(), b.float(), out=out)
    )


def _picks(target, topk_index, grad_target, grad_topk, ignore_index, acc):
    """Targets and top-k indices concatenated [N, P], -1 where ignored, and their upstream gradients."""
    if grad_target is None:
        grad_target = torch.zeros_like(target, dtype=acc)
    if grad_topk is None:
        grad_topk = torch.zeros_like(topk_index, dtype=acc)
    ignored = target == ignore_index
    pick = torch.cat([target.masked_fill(ignored, -1), topk_index], 1)
    return pick, torch.cat([grad_target.masked_fill(ignored, 0.0), grad_topk], 1)


def _through_curve(h, weight, bias, pick, grad_pick, curve):
    """Gradients of the picked logits, through `_curve`, to the products h @ weight[pick]: [N, P]."""
    bound, scale, slope = curve
    if not bound:
        return grad_pick * slope
    entries = pick.clamp(min=0)
    acc = grad_pick.dtype
    raw = torch.stack([(h.to(acc) * weight[entries[:, p]].to(acc)).sum(1) for p in range(pick.shape[1])], 1)
    if bias is not None:
        raw = raw + bias[entries]
    return grad_pick * slope * (1 - torch.tanh(scale * raw).square())
