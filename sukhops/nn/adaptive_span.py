"""Adaptive spans as modules: the learned spans of the heads, and an attention layer with a cache."""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from sukhops import _checks
from sukhops.ops.adaptive_span import adaptive_span_attention

_SLACK = 0.01  # how far outside [0, 1] a ratio may be for every gradient to pass


class _Clamp(torch.autograd.Function):
    """clamp(ratio, 0, 1) with a gradient that can move the ratio back inside.

    The gradient arrives in parts, from the training loss and from the span penalty, and only their sum has
    the right direction. So a part that points further outside is blocked only if the ratio is outside by more
    than the slack. The ratio of a head at a bound stays within the slack, and comes back as soon as the sum
    changes its sign.
    """

    @staticmethod
    def forward(ratio: Tensor) -> Tensor:
        return ratio.clamp(0, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (ratio,) = ctx.saved_tensors
        outward = ((ratio < -_SLACK) & (grad > 0)) | ((ratio > 1 + _SLACK) & (grad < 0))
        return grad.masked_fill(outward, 0.0)


class SpanReport(NamedTuple):
    tokens: list[float]  # the span of each head
    keys: list[int]  # number of keys that a query of each head reads: span + ramp, at most max_span
    share: float  # mean of keys / max_span


class AdaptiveSpan(nn.Module):
    """The attention span of each head, stored as a learned ratio of max_span.

    The ratio is clamped to [0, 1] when it is read. Its gradient passes at the bounds, so no extra call is
    needed after `optimizer.step()`. More than 0.01 outside a bound, only a gradient that points back inside
    passes. The ratio stays float32 if the model is cast to half precision, because the 8 significant bits of
    bfloat16 cannot represent spans to one token. Exclude `ratio` [H] from weight decay, as is usual for norms
    and biases: weight decay would shorten the spans in addition to the penalty.

    Add the `penalty` of every layer to the training loss. For a span per token instead of per head no module
    is needed: `sukhops.adaptive_span_attention` accepts any span [B, H, M], for example
    `max_span * torch.sigmoid(linear(x)).mT.float()` with a linear layer from D to H.

    Args:
        num_heads: number H of heads.
        max_span: the span at ratio 1, in tokens.
        ramp: width of the soft mask's ramp beyond the span, in tokens, > 0.
        init: initial ratio, in [0, 1].
        device, dtype: of the ratio, which is float64 if dtype is float64, else float32.

    Raises:
        ValueError: an option is out of range.

    Source: Sukhbaatar et al. 2019 (Adaptive Attention Span in Transformers).
    """

    def __init__(
        self,
        num_heads: int,
        max_span: int,
        *,
        ramp: float = 32.0,
        init: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, value in (("num_heads", num_heads), ("max_span", max_span)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an int >= 1, got {value!r}")
        if not 0 < ramp < math.inf:
            raise ValueError(f"ramp: expected a finite number of tokens > 0, got {ramp!r}")
        if not 0 <= init <= 1:
            raise ValueError(f"init: expected a ratio of max_span in [0, 1], got {init!r}")
        self.num_heads, self.max_span, self.ramp, self.init = num_heads, max_span, float(ramp), float(init)
        dtype = _checks.accumulation_dtype(dtype or torch.get_default_dtype())
        self.ratio = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the ratio to `init`."""
        nn.init.constant_(self.ratio, self.init)

    def extra_repr(self) -> str:
        return f"{self.num_heads}, max_span={self.max_span}, ramp={self.ramp:g}, init={self.init:g}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdaptiveSpan":
        """Called by `.to`, `.half` and others: moves the ratio to other devices, not to half precision."""

        def keep(t: Tensor) -> Tensor:
            new = fn(t)
            return new if new.dtype in (torch.float32, torch.float64) else t.to(new.device, torch.float32)

        return super()._apply(keep, recurse)

    def span(self) -> Tensor:
        """The span of each head in tokens: [H], float32 (float64 for a float64 module)."""
        ratio = self.ratio.to(_checks.accumulation_dtype(self.ratio.dtype))
        return self.max_span * _Clamp.apply(ratio)

    def penalty(self, coef: float) -> Tensor:
        """coef * mean span in tokens, a scalar. The models of the paper sum it over their layers."""
        return coef * _whole(self.span()).mean()

    @torch.no_grad()
    def report(self) -> SpanReport:
        """The learned spans as Python numbers. It waits for the device, so do not call it in every step."""
        span = _whole(self.span())
        keys = (self.ramp + span).ceil().clamp(max=self.max_span).int().tolist()
        return SpanReport(span.tolist(), keys, sum(keys) / len(keys) / self.max_span)


def _whole(span: Tensor) -> Tensor:
    """The spans of all ranks, if FSDP2 has sharded the ratio."""
    return span.full_tensor() if isinstance(span, DTensor) else span


class SpanCache(NamedTuple):
    """Keys and values from earlier calls of a layer (opaque). Heads that keep equally many form a group."""

    keys: tuple[Tensor, ...]  # for each group [B, heads, n, d], detached
    values: tuple[Tensor, ...]  # as keys
    seen: int  # number of positions since the start
    key_start: Tensor | None  # [B]


class AdaptiveSpanAttention(nn.Module):
    """Causal self-attention in which every head learns its span; shorter spans cost less.

    Projections have no bias. Positions are used in the scores only, as embeddings of relative positions. To
    share the table of embeddings between layers, as the models of the paper do, pass the one of the first
    layer: `AdaptiveSpanAttention(..., rel_pos=first.rel_pos)`. The attribute `adaptive_span` holds the spans:
    add its `penalty` to the loss, and read the spans with its `report()`.

    `freeze_spans()` fixes the windows of a trained layer. Outputs stay the same, and the cache then keeps for
    each head only the keys that its window can still see.

    Args:
        d_model: width D, a multiple of num_heads.
        num_heads: number H of heads.
        max_span: keys max_span or more tokens back are never seen, whatever the span.
        ramp, init: see `AdaptiveSpan`.
        rel_pos: True: the layer creates a table [max_span, d] with normally distributed entries, as in the
            paper. A parameter [S, d] or [H, S, d] with S >= max_span: the layer uses this table. False: no
            position embeddings.
        include_self: whether a token sees itself. False: a span starts at the token before, as in the 2019
            code.
        num_kv_heads: number Hkv of key and value heads, a divisor of H. None: H. A key is kept as long as the
            query head with the largest window needs it.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: an option is out of range, or rel_pos has the wrong type or shape.

    Source: Sukhbaatar et al. 2019 (Adaptive Attention Span in Transformers).
    """

    rel_pos: nn.Parameter | None
    _order: Tensor  # indices of the key heads, sorted by group; None until spans are frozen
    _inverse_order: Tensor  # position of each key head in _order

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        max_span: int,
        *,
        ramp: float = 32.0,
        init: float = 0.0,
        rel_pos: bool | nn.Parameter = True,
        include_self: bool = True,
        num_kv_heads: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.adaptive_span = AdaptiveSpan(num_heads, max_span, ramp=ramp, init=init, **options)
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if not isinstance(kv_heads, int) or kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads = {num_heads}, got {kv_heads!r}")
        if not isinstance(d_model, int) or d_model < 1 or d_model % num_heads:
            raise ValueError(f"d_model: expected a multiple of num_heads = {num_heads}, got {d_model!r}")
        d = d_model // num_heads
        self.d_model, self.num_heads, self.num_kv_heads = d_model, num_heads, kv_heads
        self.max_span, self.include_self = max_span, include_self
        self.q_proj = nn.Linear(d_model, d_model, bias=False, **options)
        self.k_proj = nn.Linear(d_model, kv_heads * d, bias=False, **options)
        self.v_proj = nn.Linear(d_model, kv_heads * d, bias=False, **options)
        self.out_proj = nn.Linear(d_model, d_model, bias=False, **options)
        if rel_pos is True:
            self.rel_pos = nn.Parameter(torch.empty(max_span, d, **options))
            self.reset_parameters()
        elif rel_pos is False:
            self.register_parameter("rel_pos", None)
        else:
            self.rel_pos = self._checked_table(rel_pos, d)
        self.windows: tuple[int, ...] | None = None  # number of keys that each head sees, once frozen
        self._groups = [(kv_heads, max_span)]  # for each group: number of key heads, largest window
        self.register_buffer("_order", None, persistent=False)
        self.register_buffer("_inverse_order", None, persistent=False)
        self.register_load_state_dict_post_hook(_freeze_again)

    def _checked_table(self, rel_pos: nn.Parameter, d: int) -> nn.Parameter:
        if not isinstance(rel_pos, nn.Parameter):
            raise TypeError(
                f"rel_pos: expected True, False or an nn.Parameter, got {type(rel_pos).__name__}; "
                "to share the table of another layer, pass its attribute rel_pos"
            )
        *heads, length, width = rel_pos.shape if rel_pos.dim() in (2, 3) else (0, 0)
        if heads not in ([], [self.num_heads]) or length < self.max_span or width != d:
            raise ValueError(
                f"rel_pos: expected shape [S, d = {d}] or [H = {self.num_heads}, S, d], "
                f"S >= max_span = {self.max_span}, got {list(rel_pos.shape)}"
            )
        return rel_pos

    def reset_parameters(self) -> None:
        """Initializes the position table, shared or not; projections and spans have their own methods."""
        if self.rel_pos is not None:
            nn.init.normal_(self.rel_pos)

    def extra_repr(self) -> str:
        text = f"{self.d_model}, {self.num_heads}, max_span={self.max_span}, include_self={self.include_self}"
        if self.num_kv_heads != self.num_heads:
            text += f", num_kv_heads={self.num_kv_heads}"
        if self.rel_pos is None:
            text += ", rel_pos=False"
        return text if self.windows is None else f"{text}, windows={self.windows}"

    def forward(
        self,
        x: Tensor,
        cache: SpanCache | None = None,
        key_start: Tensor | None = None,
        group: ProcessGroup | None = None,
    ) -> tuple[Tensor, SpanCache | None]:
        """Attention over the tokens of x and of the cache.

        Args:
            x: [B, T, D], the tokens that follow those of the cache. T may be 1 and may differ between calls.
            cache: the cache that the previous call returned; None at the start of the sequences. The call
                does not change it, and no gradient flows into it.
            key_start: [B] or [B, T], int64 or int32: the first position that a token may see, counted from
                the start of the sequence (including tokens that the cache has dropped). For left padding, the
                number of padding tokens; in a packed sequence, the start of the token's document. The cache
                stores the value of the last token, so pass it again only if it changes.
            group: process group for sequence parallelism: x is this rank's part of every sequence, see
                `sukhops.adaptive_span_attention`. Not with cache.

        Returns:
            out [B, T, D], and the cache for the next call (None with group).

        Raises:
            TypeError, ValueError: an argument has the wrong type, dtype or shape; the cache comes from a
                layer with other windows.
        """
        if x.dim() != 3 or x.shape[2] != self.d_model:
            raise ValueError(f"x: expected shape [B, T, D = {self.d_model}], got {list(x.shape)}")
        seen = x.shape[1]
        if cache is not None:
            if group is not None:
                raise ValueError("cache: expected None with group (sequence parallelism), got a cache")
            self._check_cache(cache, x.shape[0])
            seen += cache.seen
            if key_start is None:
                key_start = cache.key_start
        if key_start is not None:
            _checks.check_integers("key_start", key_start)
        start = key_start
        if start is None and cache is not None and self.windows is not None:
            start = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)  # hides zeros of a new cache
        outs, keys, values = [], [], []
        for i, (q, k, v, span, rel_pos, window) in enumerate(self._by_group(x)):
            if cache is not None:
                k, v = torch.cat([cache.keys[i], k], 2), torch.cat([cache.values[i], v], 2)
            first = None if start is None else (start - (seen - k.shape[2])).clamp(min=0)
            outs.append(adaptive_span_attention(
                q, k, v, span, ramp=self.adaptive_span.ramp, rel_pos=rel_pos,
                include_self=self.include_self, max_span=self.max_span, key_start=first,
                group=group,
            ))  # fmt: skip
            if group is not None:
                continue
            kept = window - int(self.include_self)  # if the next token sees itself, its key is in the window
            keys.append(_last(k, kept, self.windows is not None))
            values.append(_last(v, kept, self.windows is not None))
        out = outs[0]  # [B, H, T, d]
        if len(outs) > 1:
            out = self._select(torch.cat(outs, 1), 1, self._inverse_order)
        if key_start is not None and key_start.dim() == 2:
            if x.shape[1]:
                key_start = key_start[:, -1]
            else:  # no tokens: the cache's start is unchanged
                key_start = None if cache is None else cache.key_start
        cache = SpanCache(tuple(keys), tuple(values), seen, key_start) if group is None else None
        return self.out_proj(out.transpose(1, 2).flatten(2)), cache

    def _by_group(self, x: Tensor) -> Iterable[tuple]:
        """(q, k, v, span, rel_pos, window) of each group of heads; heads are in the order of `_order`."""
        q = self.q_proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, T, d]
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2)  # [B, Hkv, T, d]
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2)
        span, rel_pos = self.adaptive_span.span(), self.rel_pos
        if len(self._groups) == 1:
            return [(q, k, v, span, rel_pos, self._groups[0][1])]
        k, v = k.index_select(1, self._order), v.index_select(1, self._order)
        q, span = self._select(q, 1, self._order), self._select(span, 0, self._order)
        counts, windows = zip(*self._groups, strict=True)
        heads = [n * (self.num_heads // self.num_kv_heads) for n in counts]
        tables = [rel_pos] * len(counts)
        if rel_pos is not None and rel_pos.dim() == 3:
            tables = self._select(rel_pos, 0, self._order).split(heads)
        parts = q.split(heads, 1), k.split(counts, 1), v.split(counts, 1), span.split(heads), tables, windows
        return zip(*parts, strict=True)

    def _select(self, t: Tensor, dim: int, index: Tensor) -> Tensor:
        """Query heads [..., H, ...] on axis `dim`, reordered with the key heads that they share."""
        shape = (self.num_kv_heads, -1)
        return t.unflatten(dim, shape).index_select(dim, index).flatten(dim, dim + 1)

    def _check_cache(self, cache: SpanCache, b: int) -> None:
        if not isinstance(cache, SpanCache):
            raise TypeError(f"cache: expected a SpanCache from this layer, got {type(cache).__name__}")
        kept = [(k.shape[1], k.shape[2]) for k in cache.keys]
        most = [(n, window - int(self.include_self)) for n, window in self._groups]
        if self.windows is None:
            most = [(n, min(cache.seen, keys)) for n, keys in most]
        if kept != most:
            raise ValueError(
                f"cache: expected (heads, keys) {most} as in this layer, got {kept}; "
                "start with a new cache after freeze_spans()"
            )
        if cache.keys[0].shape[0] != b:
            raise ValueError(f"cache: expected B = {b} sequences as x, got {cache.keys[0].shape[0]}")

    def freeze_spans(self) -> "AdaptiveSpanAttention":
        """Fixes the span and the window of each head, for inference. Returns the layer itself.

        Outputs do not change. From then on the cache keeps, for each head, only the keys that its window
        (span + ramp, see `windows`) can still see; a key head that several query heads share keeps those of
        the largest window. The shapes of the cache are the same from the first call on, so a cache that
        fills up does not make `torch.compile` compile again: decoding token by token takes two graphs, one
        for the first position and one for all others. The ratio gets no more gradient. `state_dict` is the
        same as before freezing; a frozen layer that loads one takes its windows from the loaded spans.
        """
        self.adaptive_span.ratio.requires_grad_(False)
        self.windows = tuple(self.adaptive_span.report().keys)
        shared = self.num_heads // self.num_kv_heads
        kept = [max(self.windows[i : i + shared]) for i in range(0, self.num_heads, shared)]
        order = sorted(range(self.num_kv_heads), key=lambda head: -kept[head])
        self._groups = [(len(list(g)), w) for w, g in itertools.groupby(kept[head] for head in order)]
        self._order = torch.tensor(order, device=self.adaptive_span.ratio.device)
        self._inverse_order = self._order.argsort()
        return self


def _freeze_again(layer: AdaptiveSpanAttention, _: object) -> None:
    if layer.windows is not None:
        layer.freeze_spans()


def _last(t: Tensor, n: int, fill: bool) -> Tensor:
    """The last n keys of [B, heads, N, d], detached. If there are fewer, `fill` puts zeros before them.

    The result is a view, which saves a copy when decoding, unless the view would keep many other keys alive.
    """
    length = t.shape[2]
    kept = t.detach().narrow(2, max(0, length - n), min(n, length))
    if fill and length < n:
        return F.pad(kept, (0, 0, n - length, 0))
    return kept.clone() if length > 2 * n else kept
