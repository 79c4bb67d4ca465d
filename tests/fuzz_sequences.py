"""Fuzz cases of attention with spans and of segmentations."""

import math

import torch
from fuzz_compare import NOT_FINITE, compare, moving, rounded
from fuzz_inputs import HUGE, Source, must_raise, precise, surroundings
from torch import Tensor

import sukhops
from sukhops import reference
from sukhops.testing import finite_max

VAST = 2.0**52 * math.log(2)  # larger sums of scores give NaN


# ------------------------------------------------------------------ adaptive_span_attention


def adaptive_span_attention(s: Source) -> None:
    special = s.special is not None
    b, hkv, group = s.size("B", 2), s.size("Hkv", 2, 1), s.size("heads of a key", 3, 1)
    h, m, d = hkv * group, s.size("M", 6 if special else 80), s.size("d", 80, 1)
    n = m + s.size("more keys", 6 if special else 60)
    scale = s.pick("size", 1.0, 1.0, 1e-3, 30.0)
    if s.special in HUGE:
        s.special = "root of huge"  # gradients multiply two of these; cancellation leaves rounding errors
    q = s.tensor("q", b, h, m, d, scale=scale)
    k = q if m == n and group == 1 and s.flag("k is q") else s.tensor("k", b, hkv, n, d)
    v = k if s.flag("v is k") else s.tensor("v", b, hkv, n, d)
    ramp = s.pick("ramp", 32.0, 1, 4.0, 0.5, 1e-6, 1e6)
    given = {"q": q, "k": k, "v": v, "span": span(s, ramp, (b, h, m), n), "ramp": ramp}
    given["include_self"] = s.flag("include_self")
    given["scale"] = s.pick("scale", None, 0.7, 0, -1.0)
    given["max_span"] = s.pick("max_span", None, 1, 5, 64, 10**9)
    if s.flag("rel_pos") and given["max_span"] != 10**9:
        least = given["max_span"] or 1
        given["rel_pos"] = s.tensor(
            "rel_pos", *((h,) if s.flag("of each head") else ()), s.size("S", 80, least), d
        )
    if s.flag("key_start"):
        shape = (b,) if s.flag("of a sequence") else (b, m)
        given["key_start"] = s.integers("key_start", s.whole(-2, n + 3, *shape))
    kind = s.pick("query_start", None, None, "int", "tensor")
    if kind == "int":
        given["query_start"] = s.integer("first query", 0, n - m)
    if kind == "tensor":
        start = s.whole(0, n - m + 1, b)
        wrong = s.pick("query_start: wrong", *[None] * 12, -1, n - m + 1, 2**31 - 1)
        if wrong is not None and b:
            start[-1], s.bad = wrong, True
        given["query_start"] = s.integers("query_start", start)
    s.with_gradients(given)
    with surroundings(s):
        if s.bad:
            return must_raise(s, RuntimeError, sukhops.adaptive_span_attention, given)
        plain = reference.adaptive_span_attention
        truth = by_query if special else plain

        def exact(**given):
            return {"out": truth(**given) + (recomputation(**given) if moving() else 0)}

        def unknown(name, exact):
            """The truth computes 0 * NaN in the gradient of a span, for NaN in an invisible key."""
            return exact.isnan() & (name == "grad of span")

        compare(
            s, lambda **g: {"out": sukhops.adaptive_span_attention(**g)}, exact, given, n + d,
            fixed=("span",), unknown=unknown, plain=lambda **g: {"out": plain(**g)},
            spreads=s.special in NOT_FINITE,  # 0 * NaN of an invisible key is NaN
        )  # fmt: skip


def span(s: Source, ramp: float, shape: tuple[int, int, int], n: int) -> Tensor:
    """Spans in the accumulation dtype whose ramps end at keys, between keys, or outside the sequence."""
    shape = shape if s.flag("span of each query") else shape[1:2]
    kind = s.pick("span", "real", "whole", "ramp ends here", "boundless", "none")
    if s.special:
        kind = "real"  # it is not specified whether keys of weight 0 are read
    t = {
        "real": 20 * s.normal(*shape),
        "whole": s.whole(-3, n + 3, *shape).double(),
        "ramp ends here": s.whole(-1, n + 1, *shape) - ramp,
        "boundless": torch.full(shape, 1e30),
        "none": torch.full(shape, -1e30),
    }[kind]
    return s.laid_out("span", t.to(s.acc))


def recomputation(
    q, k, v, span, *, ramp, rel_pos=None, scale=None, include_self=True, max_span=None, key_start=None,
    query_start=None,
):  # fmt: skip
    """Returns 0, with gradients that perturb the result by the rounding errors of a recomputing backward.

    Such a backward rounds its weights exp(score - lse) and the sums v . grad and out . grad separately, so
    terms that cancel exactly in the reference do not. For example, if a query sees a single key, the gradient
    of its score is exactly 0 in the reference.
    """
    (_, h, m, d), n = q.shape, k.shape[2]
    k, v = (t.repeat_interleave(h // t.shape[1], 1) for t in (k, v))
    first = torch.as_tensor(n - m if query_start is None else query_start).view(-1, 1, 1, 1)
    x = first + torch.arange(m).view(-1, 1) - torch.arange(n) - int(not include_self)  # [B or 1, 1, M, N]
    seen, score = x >= 0, q @ k.mT
    for limit in (max_span, None if rel_pos is None else rel_pos.shape[-2]):
        seen = seen if limit is None else seen & (x < limit)
    if key_start is not None:
        seen = seen & (torch.arange(n) >= key_start.view(len(key_start), 1, -1, 1))
    if rel_pos is not None:
        index = x.clamp(0, rel_pos.shape[-2] - 1).expand(score.shape)
        score = score + (q @ rel_pos.mT).gather(-1, index)
    score = (d**-0.5 if scale is None else scale) * score
    spans = span.view(-1, 1, 1) if span.dim() == 1 else span.unsqueeze(-1)
    weight = (ramp + (spans - x)) / ramp
    mask, fixed = weight.detach().clamp(0, 1), score.detach()
    lse = (fixed + mask.log()).masked_fill(~seen, -torch.inf).logsumexp(-1, keepdim=True)
    whole = (fixed - lse).exp().masked_fill(~seen | (weight < 0) | (lse == -torch.inf), 0.0)

    def noise(t):
        return rounded(torch.zeros_like(t), t)

    inside = (weight.detach() >= 0) & (weight.detach() <= 1)
    moved = noise(mask * whole) * (score - fixed) + noise(whole * inside) * (weight - weight.detach())
    signs = rounded(torch.zeros_like(q), 1.0).sign()
    return (moved @ v.detach().abs()) * signs + noise(mask * whole) @ (v - v.detach())


def by_query(
    q, k, v, span, *, ramp, rel_pos=None, scale=None, include_self=True, max_span=None, key_start=None,
    query_start=None,
):  # fmt: skip
    """The reference for one query at a time, without its invisible keys, which could give 0 * NaN."""
    (b, h, m, _), (_, hkv, n, _) = q.shape, k.shape
    first = torch.as_tensor(n - m if query_start is None else query_start).expand(b).tolist()
    rows = []
    for i, j, t in ((i, j, t) for i in range(b) for j in range(h) for t in range(m)):
        own_span = span[j] if span.dim() == 1 else span[i, j, t]
        table = rel_pos if rel_pos is None or rel_pos.dim() == 2 else rel_pos[j]
        x = first[i] + t - torch.arange(n) - int(not include_self)
        seen = (x >= 0) & ~((ramp + (own_span.detach() - x)) < 0)
        for limit in (max_span, None if table is None else len(table)):
            seen = seen if limit is None else seen & (x < limit)
        if key_start is not None:
            seen = seen & (torch.arange(n) >= (key_start[i] if key_start.dim() == 1 else key_start[i, t]))
        if table is not None:
            used = torch.zeros(len(table), dtype=torch.bool).index_fill(0, x[seen], True)
            table = table.where(used.unsqueeze(1), 0.0)
        keys, values = (a[i, j * hkv // h].where(seen.unsqueeze(1), 0.0).view(1, 1, n, -1) for a in (k, v))
        start = (
            None if key_start is None else (key_start[i] if key_start.dim() == 1 else key_start[i, t]).view(1)
        )
        rows.append(
            reference.adaptive_span_attention(
                q[i, j, t].view(1, 1, 1, -1), keys, values, own_span.view(1), ramp=ramp, rel_pos=table,
                scale=scale, include_self=include_self, max_span=max_span, key_start=start,
                query_start=first[i] + t,
            )
        )  # fmt: skip
    return torch.cat(rows).view(q.shape) if rows else 0 * q


# ------------------------------------------------------------------ segmentations


def lattice(s: Source) -> dict[str, object]:
    """scores with impossible segments, and lengths; sometimes one length is invalid and must raise."""
    b, t = s.size("B", 4), s.size("T", 70)
    k = s.size("K", 70 if t < 9 else 8 if t < 33 else 4)
    scale = s.pick("size", 1.0, 1.0, 30.0, 1e-3, 1e4, 1e9)
    scores = s.tensor("scores", b, t, k, scale=min(scale, 1e4) if s.dtype == torch.float16 else scale)
    missing = s.pick("missing", 0.0, 0.3, 0.7, 1.0)
    if missing:  # a new tensor, because equal rows share memory
        scores = s.laid_out("scores", scores.masked_fill(s.uniform(b, t, k) < missing, -torch.inf))
    given: dict[str, object] = {"scores": scores}
    if s.flag("lengths"):
        lengths = s.whole(0, t + 1, b)
        wrong = s.pick("lengths: wrong", *[None] * 12, -1, t + 1, 2**31 - 1)
        if wrong is not None and b:
            lengths[-1], s.bad = wrong, True
        given["lengths"] = s.integers("lengths", lengths)
    return given


def counting(scores: Tensor, lengths: Tensor | None) -> Tensor:
    """Mask [B, T, K] of the segments that end within their sequence."""
    b, t, k = scores.shape
    ends = torch.arange(1, t + 1).unsqueeze(1) + torch.arange(k)
    limit = torch.full((b,), t) if lengths is None else lengths
    return ends <= limit.view(-1, 1, 1)


def segment_scores(scores: Tensor, lengths: Tensor | None) -> Tensor:
    """Scores of segments within the sequence; `Perturbations` changes them by rounding errors of the sums."""
    scores = scores.where(counting(scores, lengths), -torch.inf)
    _, t, k = scores.shape
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return rounded(wide, 1 + t * (finite_max(scores) + math.log(k + 1)))


ORDERS = {"segmentation_logz": (0, 1), "segmentation_marginals": (1, 2), "segmentation_entropy": (2, 2)}


def rounding(order: int, scores: Tensor) -> float:
    """Error bound of the reference in float64; see `rounding` in test_segmentation.py."""
    _, t, k = scores.shape
    a = t * (finite_max(scores) + math.log(k + 1))
    e = t * (3 * a + k + 4) * torch.finfo(torch.float64).eps / 2
    return e * (1, 6, (1 + a) * 6 * t)[order]


def vast(given: dict) -> bool:
    """Whether sums may be so large that results are NaN."""
    return finite_max(precise(given["scores"])) * given["scores"].shape[1] > VAST


def differentiable(name: str):
    def case(s: Source) -> None:
        given = s.with_gradients(lattice(s))
        call = getattr(sukhops, name)
        with surroundings(s):
            if s.bad:
                return must_raise(s, RuntimeError, call, given)
            scores, lengths = precise(given["scores"]), given.get("lengths")
            counts = counting(scores, lengths)
            lost = (counts & (scores.isnan() | (scores == torch.inf))).flatten(1).any(1)
            apart = lost.view(-1, 1, 1) & (~counts | (scores == -torch.inf))

            def plain(scores: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
                return {"result": getattr(reference, name)(segment_scores(scores, lengths), lengths)}

            def unknown(_: str, exact: Tensor) -> Tensor:
                """In a sequence with NaN, impossible segments may be 0 or NaN."""
                if exact.shape != apart.shape:
                    return torch.zeros_like(exact, dtype=torch.bool)
                return apart | (lost.view(-1, 1, 1) & exact.isfinite())

            truth = None if vast(given) else plain
            compare(
                s, lambda **g: {"result": call(**g)}, truth, given, scores.shape[2], unknown=unknown,
                off=lambda result: rounding(ORDERS[name][result.startswith("grad")], scores),
            )  # fmt: skip

    case.__name__ = name
    return case


def segmentation_viterbi(s: Source) -> None:
    given = lattice(s)
    with surroundings(s):
        if s.bad:
            return must_raise(s, RuntimeError, sukhops.segmentation_viterbi, given)
        scores, lengths = precise(given["scores"]), given.get("lengths")
        counts = counting(scores, lengths)
        lost = (counts & (scores.isnan() | (scores == torch.inf))).flatten(1).any(1)
        clean = scores.where(counts, -torch.inf).masked_fill(lost.view(-1, 1, 1), -torch.inf)
        best = reference.segmentation_viterbi(clean, lengths)

        def truth(scores, lengths=None):
            dtype = s.acc if scores.dtype == s.dtype else torch.float64
            return {"score": best.score.masked_fill(lost, torch.nan).to(dtype)}

        def call(**given):
            return {"score": sukhops.segmentation_viterbi(**given).score}

        found = compare(s, call, None if vast(given) else truth, given, 1)
        segments = sukhops.segmentation_viterbi(**given).segments
        if vast(given):
            return
        assert not segments[lost].any() and not segments[found["score"] == -torch.inf].any()
        kept = ~lost & (best.score > -torch.inf)
        total = score_of(segments, clean, lengths)[kept]
        rounding = (
            2 * (1 + scores.shape[1]) ** 2 * torch.finfo(torch.float64).eps * max(1.0, finite_max(scores))
        )
        assert ((total - best.score[kept]).abs() <= rounding).all(), f"{segments}: {total}, not {best.score}"
        if (clean[clean.isfinite()] % 1 == 0).all():  # sums of integers are exact, so ties are exact
            assert torch.equal(segments, best.segments), f"{segments}, not {best.segments}"


def score_of(segments: Tensor, scores: Tensor, lengths: Tensor | None) -> Tensor:
    """Scores [B] of segmentations [B, T]; NaN if the segments do not cover the sequence exactly."""
    b, t, k = scores.shape
    ends = [t] * b if lengths is None else lengths.tolist()
    totals = []
    for row, end, table in zip(segments.tolist(), ends, scores, strict=True):
        at, total = 0, 0.0
        while at < end and 0 < row[at] <= k:
            total, at = total + table[at, row[at] - 1].item(), at + row[at]
        covered = at == end and sum(row) == end and sum(x > 0 for x in row) == count(row, end)
        totals.append(total if covered else math.nan)
    return torch.tensor(totals, dtype=torch.float64)


def count(row: list[int], end: int) -> int:
    """Number of consecutive segments from 0 to the end."""
    at = steps = 0
    while at < end and row[at] > 0:
        at, steps = at + row[at], steps + 1
    return steps


def segmentation_sample(s: Source) -> None:
    given = lattice(s)
    samples, seed = s.pick("samples", 3, 0, 1, 400), s.integer("generator", 0, 9)

    def draw(**given) -> Tensor:
        return sukhops.segmentation_sample(
            given["scores"], samples, given.get("lengths"), torch.Generator().manual_seed(seed)
        )

    with surroundings(s):
        scores, lengths = precise(given["scores"]), given.get("lengths")
        if s.bad:
            return must_raise(s, RuntimeError, draw, given)
        counts = counting(scores, lengths)
        if (counts & (scores.isnan() | (scores == torch.inf))).any():
            return must_raise(s, RuntimeError, draw, given)
        if vast(given):
            return None
        drawn = compare(s, lambda **g: {"segments": draw(**g)}, None, given, 1)["segments"]
        assert drawn.shape == (samples, *scores.shape[:2])
        clean = scores.where(counts, -torch.inf)
        exists = reference.segmentation_viterbi(clean, lengths).score > -torch.inf
        assert not drawn[:, ~exists].any()
        for one in drawn[:20]:
            assert score_of(one, clean, lengths)[exists].isfinite().all(), f"no segmentation: {one}"
        if samples == 400 and scores.numel() < 300:
            check_frequencies(drawn, reference.segmentation_marginals(clean, lengths))


def check_frequencies(drawn: Tensor, posterior: Tensor) -> None:
    """Asserts that counts are close to their means: Bernstein bounds that chance violates once in 1e12."""
    n, k = len(drawn), posterior.shape[2]
    counts = torch.stack([(drawn == i).sum(0) for i in range(1, k + 1)], -1) if k else posterior
    unlikely = math.log(2 / 1e-12)
    bound = unlikely / 3 + (unlikely**2 / 9 + 2 * unlikely * n * posterior * (1 - posterior)).sqrt()
    assert ((counts - n * posterior).abs() <= bound).all(), f"{counts} of {n}, posterior {posterior}"


TARGETS = {"adaptive_span_attention": adaptive_span_attention} | {
    name: differentiable(name)
    for name in ("segmentation_logz", "segmentation_marginals", "segmentation_entropy")
}
TARGETS |= {f.__name__: f for f in (segmentation_viterbi, segmentation_sample)}
