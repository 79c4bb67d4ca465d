"""Attention with a soft span that each head, or each token, learns."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sukhops import _checks, _library
from sukhops.parallel import adaptive_span as parallel

_ops = torch.ops.sukhops
_LAUNCHERS = "sukhops.triton_kernels.adaptive_span"


def adaptive_span_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    span: Tensor,
    *,
    ramp: float = 32.0,
    rel_pos: Tensor | None = None,
    scale: float | None = None,
    include_self: bool = True,
    max_span: int | None = None,
    key_start: Tensor | None = None,
    query_start: Tensor | int | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Causal attention with a soft mask that ends `span` tokens before the query; differentiable in the span.

    A key x tokens before a query has the weight

        clamp((ramp + span - x) / ramp, 0, 1) * exp(scale * (q . k + q . rel_pos[x]))

    and the weights of each query are normalized to sum 1. Time and memory of a head grow with its span: keys
    beyond span + ramp are never read, and no mask tensor is built. The clamp has gradient 1 on the whole
    ramp, including both ends. Only first derivatives are supported. Repeated calls give bitwise equal
    results. On the CPU, the number of threads changes the rounding of the gradient of rel_pos, because each
    thread adds up its own part; it changes no other result.

    Args:
        q: [B, H, M, d], float32, bfloat16, float16 or float64. The queries are the last M of the N positions,
            unless query_start is given.
        k, v: [B, Hkv, N, d], of the same dtype, with N >= M and H a multiple of Hkv.
        span: [H] or [B, H, M], in tokens, float32 (float64 if q is float64). It may be negative: the formula
            above applies unchanged.
        ramp: width of the ramp in tokens, > 0.
        rel_pos: [S, d], or [H, S, d] with a table per head: relative position embeddings, or None.
        scale: factor of the scores. None: d**-0.5.
        include_self: True: x = 0 is the token of the query. False: x = 0 is the token before it, as in the
            2019 code.
        max_span: keys with x >= max_span are never seen, whatever the span. None: no limit other than S.
        key_start: [B] or [B, M], int64 or int32: index (in 0 to N) of the first key that a query may see. Use
            it for left padding, or for the start of the query's document in a packed sequence.
        query_start: [B], int64 or int32, or an int: position of the first query, in 0 to N - M. None: N - M.
            Keys after a query are never seen, so a preallocated cache can be passed as a whole.
        group: process group for sequence parallelism. Each rank holds one part of every sequence: the parts
            are consecutive in rank order, of equal length, with as many queries as keys. key_start counts
            from the start of the whole sequence. Ranks receive the keys that their queries can see, up to
            min(max_span, S, largest span + ramp) tokens back. Gradients of k and v are sent back to the ranks
            that own them; gradients of span and rel_pos are this rank's part, to be summed over the ranks.

    Returns:
        [B, H, M, d], of q's dtype. A query that sees no key, or only keys of weight 0, has output 0 and no
        gradient. NaN or infinity in a value outside a query's span may still give NaN, because the value is
        multiplied by the weight 0.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device; N < M; ramp <= 0;
            max_span < 1; rel_pos is shorter than max_span; an int query_start is outside 0 to N - M;
            query_start is given with group.
        RuntimeError: a value of a tensor query_start is outside 0 to N - M, on the CPU. On CUDA the output of
            that sequence is NaN instead.

    Source: Sukhbaatar et al. 2019 (Adaptive Attention Span in Transformers).
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        _checks.check_tensor(name, t)
    q, k, v, rel_pos = _checks.as_floats(q=q, k=k, v=v, rel_pos=rel_pos)
    if q.dim() != 4 or q.shape[3] == 0 or q.shape[1] == 0:
        raise ValueError(f"q: expected shape [B, H, M, d] with H, d >= 1, got {list(q.shape)}")
    b, h, m, d = q.shape
    if k.dim() != 4 or k.shape[0] != b or k.shape[3] != d or k.shape[1] == 0 or h % k.shape[1]:
        raise ValueError(
            f"k: expected shape [B = {b}, Hkv, N, d = {d}], H = {h} a multiple of Hkv, got {list(k.shape)}"
        )
    _checks.check_shape("v", v, tuple(k.shape), "as k")
    n = k.shape[2]
    if n < m:
        raise ValueError(f"k: expected at least as many positions as q, M = {m}, got N = {n}")
    if query_start is not None and group is not None:
        raise ValueError(f"query_start: expected None with group, got {type(query_start).__name__}")
    if isinstance(query_start, int) and not isinstance(query_start, bool):
        if not 0 <= query_start <= n - m:
            raise ValueError(f"query_start: expected 0 to N - M = {n - m}, got {query_start}")
        k, v = k[:, :, : query_start + m], v[:, :, : query_start + m]
        query_start = None
    elif query_start is not None:
        if not isinstance(query_start, Tensor):
            name = type(query_start).__name__
            raise TypeError(f"query_start: expected an int, a tensor [B] or None, got {name}")
        _checks.check_integers("query_start", query_start)
        _checks.check_device("q", q, "query_start", query_start)
        _checks.check_shape("query_start", query_start, (b,), "one per sequence, or an int")
        query_start = query_start.long()
    _check_span(span, q)
    if not isinstance(ramp, (int, float)) or not 0 < ramp < float("inf"):
        raise ValueError(
            f"ramp: expected a finite number of tokens > 0, got {ramp!r}; "
            "for a hard window of n keys use a small ramp and span = n - 0.5"
        )
    if scale is not None and not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a number or None, got {type(scale).__name__}")
    if max_span is not None and (not isinstance(max_span, int) or max_span < 1):
        raise ValueError(f"max_span: expected an int >= 1 or None, got {max_span!r}")
    if rel_pos is not None:
        if rel_pos.dim() not in (2, 3) or rel_pos.shape[-1] != d or rel_pos.shape[:-2] not in ((), (h,)):
            raise ValueError(
                f"rel_pos: expected shape [S, d = {d}] or [H = {h}, S, d], got {list(rel_pos.shape)}"
            )
        if rel_pos.shape[-2] < (max_span or 1):
            raise ValueError(
                f"rel_pos: expected S >= max_span = {max_span or 1} distances, got {rel_pos.shape[-2]}"
            )
    if key_start is not None:
        _checks.check_integers("key_start", key_start)
        _checks.check_device("q", q, "key_start", key_start)
        if tuple(key_start.shape) not in ((b,), (b, m)):
            raise ValueError(
                f"key_start: expected shape [B = {b}] or [B, M = {m}], got {list(key_start.shape)}"
            )
        key_start = key_start.long()
        if key_start.dim() == 1:
            key_start = key_start.unsqueeze(1).expand(b, m)
    scale = d**-0.5 if scale is None else float(scale)
    if group is not None:
        return parallel.attention(
            adaptive_span_attention, group, q, k, v, span, ramp=ramp, rel_pos=rel_pos, scale=scale,
            include_self=include_self, max_span=max_span, key_start=key_start,
        )  # fmt: skip
    return _ops.adaptive_span(
        q, k, v, span, rel_pos, key_start, query_start, float(ramp), scale, int(not include_self), max_span
    )[0]


def _check_span(span: Tensor, q: Tensor) -> None:
    _checks.check_tensor("span", span)
    _checks.check_reverse_mode("span", span)
    _checks.check_device("q", q, "span", span)
    dtype = _checks.accumulation_dtype(q.dtype)
    if span.dtype != dtype:
        raise TypeError(f"span: expected {dtype} with q in {q.dtype}, got {span.dtype}")
    if tuple(span.shape) not in ((q.shape[1],), tuple(q.shape[:3])):
        raise ValueError(
            f"span: expected shape [H = {q.shape[1]}] or [B, H, M] = {list(q.shape[:3])}, "
            f"got {list(span.shape)}"
        )


@torch.library.register_fake("sukhops::adaptive_span")
def _(q, k, v, span, rel_pos, key_start, query_start, ramp, scale, skip, max_span):
    return q.new_empty(q.shape), span.new_empty(q.shape[:3]), span.new_empty(q.shape[:3])


@torch.library.register_fake("sukhops::adaptive_span_backward")
def _(grad, q, k, v, span, rel_pos, key_start, query_start, out, maximum, sum, ramp, scale, skip,
      max_span, need_q, need_kv, need_span, need_rel_pos):  # fmt: skip
    def like(t, need):
        return t.new_empty(t.shape if need else (0,))

    rel = like(q if rel_pos is None else rel_pos, need_rel_pos)
    return like(q, need_q), like(k, need_kv), like(v, need_kv), like(span, need_span), rel


def _save(ctx, inputs, output):
    *tensors, ctx.ramp, ctx.scale, ctx.skip, ctx.max_span = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradient(ctx, grad, *_):
    q, k, v, span, rel = (ctx.needs_input_grad[i] for i in range(5))
    grads = _ops.adaptive_span_backward(
        grad, *ctx.saved_tensors, ctx.ramp, ctx.scale, ctx.skip, ctx.max_span, q, k or v, span, rel
    )
    wanted = (g if need else None for g, need in zip(grads, (q, k, v, span, rel), strict=True))
    return *wanted, *[None] * 6


torch.library.register_autograd("sukhops::adaptive_span", _gradient, setup_context=_save)
_library.not_differentiable_twice("adaptive_span_backward")
_library.cuda_launcher("adaptive_span", f"{_LAUNCHERS}:forward")
_library.cuda_launcher("adaptive_span_backward", f"{_LAUNCHERS}:backward")
