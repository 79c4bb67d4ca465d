"""Fuzz cases of the operators on a vocabulary head: random arguments and true results."""

import math
from collections.abc import Callable

import torch
from fuzz_compare import NOT_FINITE, compare, moving, rounded
from fuzz_inputs import Source, must_raise, precise, surroundings
from torch import Tensor

import sukhops
from sukhops import reference
from sukhops.ops.vocab_head import TokenStats
from sukhops.reference.vocab_head import logits


def spread(values: Tensor, counts: Tensor) -> Tensor:
    """Scatters `values` to the rows where `counts` is True; other rows are 0."""
    index = counts.reshape(-1).nonzero().squeeze(1)
    whole = values.new_zeros(counts.numel(), *values.shape[1:]).index_copy(0, index, values)
    return whole.reshape((*counts.shape, *values.shape[1:]))


def linear_head(s: Source) -> dict[str, object]:
    """hidden, weight, optional bias and options of the logits; hidden and weight may be the same tensor."""
    one = s.pick("hidden is weight", False, False, False, False, True)
    v, d = s.size("V", 70 if one else 300, 1), s.size("D", 80)
    weight = s.tensor("weight", v, d, scale=0.3)
    given = {"hidden": weight, "weight": weight}
    if not one:
        given["hidden"] = s.tensor("hidden", *s.rows(), d, scale=s.pick("size", 1.0, 30.0, 1e-3, 1e3))
    if s.flag("bias"):
        given["bias"] = s.tensor("bias", v)
    for name, values in (
        ("softcap", (None, 5.0)),
        ("scale", (1.0, 0.7, -1.3, 0.0)),
        ("temperature", (1.0, 0.4)),
    ):
        if s.flag(f"set {name}"):
            given[name] = s.pick(name, *values)
    return given


def terms(given: dict) -> int:
    """Length of the longest sums: D per logit, V per softmax, the number of rows per weight gradient."""
    v, d = given["weight"].shape
    return v + d + given["hidden"].numel() // max(d, 1)


def row_bytes(s: Source, v: int) -> int:
    return v * s.acc.itemsize


def rows_of(given: dict) -> tuple[int, ...]:
    return tuple(given["hidden"].shape[:-1])


def of_each_part(logp: Tensor, target: Tensor, z: Tensor) -> Tensor:
    """Returns `logp` [n] or [n, K]; `Perturbations` perturbs both terms of its gradient, softmax and target.

    z [n, V] are the logits. The terms cancel if a token is certain; in the reference they cancel exactly.
    """
    if not moving():
        return logp
    index = target.long() if target.dim() == 2 else target.long().unsqueeze(1)
    picked = (z - z.detach()).gather(-1, index)
    softmax = of_softmax(z).unsqueeze(-1)
    return logp + (softmax + rounded(torch.zeros_like(picked), 1.0) * picked).view(logp.shape)


def of_softmax(z: Tensor) -> Tensor:
    """Zeros [n] whose gradient is the rounding error of a softmax of z [n, V].

    The backward pass may sum a logit in another order than the forward pass, so log p has the rounding of z.
    """
    size = z.detach().softmax(-1) * (1 + z.detach().abs())
    z = z.where(z.isfinite(), 0.0)
    return (rounded(torch.zeros_like(z), size) * (z - z.detach())).sum(-1)


# ------------------------------------------------------------------ linear_logp


def logp_call(**given) -> dict[str, Tensor]:
    out = sukhops.linear_logp(**given)
    return out._asdict() if given["return_lse"] else {"logp": out}


def logp_truth(*, hidden, target, return_lse, ignore_index=-100, **rest) -> dict[str, Tensor]:
    counts = target != ignore_index
    rows = counts if target.dim() < hidden.dim() else counts.any(-1) | (target.shape[-1] == 0)
    out = reference.linear_logp(
        hidden[rows], target=target[rows], ignore_index=ignore_index, return_lse=True, **rest
    )
    if moving():
        z = head_logits(hidden[rows], **rest)
        logp = of_each_part(out.logp, target[rows].where(counts[rows], 0), z)
        out = out._replace(logp=logp, lse=out.lse + of_softmax(z))
    found = {"logp": spread(rounded(out.logp), rows)}
    return found | ({"lse": spread(out.lse, rows)} if return_lse else {})


def linear_logp(s: Source) -> None:
    given = linear_head(s)
    v, rows = len(given["weight"]), rows_of(given)
    ignore = given["ignore_index"] = s.pick("ignore_index", -100, -100, 0, -1)
    shape = (*rows, s.size("K", 4, s.special in NOT_FINITE)) if s.flag("several targets") else rows
    given |= {"target": s.target(shape, v, ignore), "return_lse": s.flag("return_lse")}
    s.with_gradients(given)
    with surroundings(s, row_bytes(s, v)):
        if s.bad:
            return must_raise(s, RuntimeError, logp_call, given)
        compare(s, logp_call, logp_truth, given, terms(given))


# ------------------------------------------------------------------ linear_token_stats


def stats_call(**given) -> dict[str, Tensor]:
    found = sukhops.linear_token_stats(**given)
    return {n: t for n, t in found._asdict().items() if t is not None and n != "top1"}


def stats_truth(*, hidden, target, ignore_index=-100, **rest) -> dict[str, Tensor]:
    rows = target != ignore_index
    found = reference.linear_token_stats(
        hidden[rows], target=target[rows], ignore_index=ignore_index, **rest
    )._asdict()
    if moving():
        rest.pop("outputs")
        z = head_logits(hidden[rows], **rest)
        if found["logp"] is not None:
            found["logp"] = of_each_part(found["logp"], target[rows], z)
        if found["lse"] is not None:
            found["lse"] = found["lse"] + of_softmax(z)
        if found["entropy"] is not None:
            log_p = z.detach().log_softmax(-1)
            # terms of both signs, which cancel, and the rounding of z in log p
            size = (found["entropy"].detach().unsqueeze(-1) - log_p).abs()
            terms = log_p.exp() * (size + (1 + size) * z.detach().abs())
            found["entropy"] = found["entropy"] + (
                rounded(torch.zeros_like(z), terms) * (z - z.detach())
            ).sum(-1)
    return {n: spread(rounded(t), rows) for n, t in found.items() if t is not None and n != "top1"}


def linear_token_stats(s: Source) -> None:
    given = linear_head(s)
    v, rows = len(given["weight"]), rows_of(given)
    given["ignore_index"] = s.pick("ignore_index", -100, -100, 0)
    given["target"] = s.target(rows, v, given["ignore_index"])
    chosen = s.integer("outputs", 1, 2 ** len(TokenStats._fields) - 1)
    given["outputs"] = [n for i, n in enumerate(TokenStats._fields) if chosen >> i & 1]
    s.with_gradients(given)
    with surroundings(s, row_bytes(s, v)):
        if s.bad:
            return must_raise(s, RuntimeError, stats_call, given)
        # a logit of +inf makes the row NaN; in the reference, lse alone is inf
        spreads = s.special in ("inf", "-inf") and "logp" not in given["outputs"]
        compare(s, stats_call, stats_truth, given, terms(given), spreads=spreads)
        if "top1" in given["outputs"]:
            check_top1(s, given, sukhops.linear_token_stats(**given).top1)


def product_size(given: dict) -> Tensor:
    """Bound [..., V] on every partial sum of a logit before scale and softcap, for any order of summation."""
    hidden, weight, bias = (precise(given.get(n)) for n in ("hidden", "weight", "bias"))
    return hidden.abs() @ weight.abs().T + (0 if bias is None else bias.abs())


def logit_rounding(s: Source, given: dict) -> Tensor:
    """Bound [..., V] on the rounding error of a logit, for any order of summation."""
    hidden, size = given["hidden"], product_size(given)
    size = abs(given.get("scale", 1.0)) * size + (given.get("softcap") or 0.0)
    return (hidden.shape[-1] + 8) * torch.finfo(s.acc).eps * size / given.get("temperature", 1.0)


def head_logits(hidden, weight, bias=None, softcap=None, scale=1.0, temperature=1.0) -> Tensor:
    return logits(hidden, weight, bias, softcap, scale, temperature)


def exact_logits(given: dict) -> Tensor:
    hidden, weight, bias = (precise(given.get(n)) for n in ("hidden", "weight", "bias"))
    return logits(
        hidden, weight, bias, given.get("softcap"), given.get("scale", 1.0), given.get("temperature", 1.0)
    )


def check_top1(s: Source, given: dict, top1: Tensor) -> None:
    """top1 must be right where rounding cannot change the order, and False in ignored rows or with a NaN."""
    target = given["target"].long()
    counts = target != given["ignore_index"]
    z, off = exact_logits(given), logit_rounding(s, given)
    index = target.where(counts, 0).unsqueeze(-1)
    lead = z.gather(-1, index) - z
    lower = torch.arange(z.shape[-1]) < index
    safe = off + off.gather(-1, index)
    others = torch.arange(z.shape[-1]) != index
    first = ((lead > safe) | ((lead == 0) & (safe == 0) & ~lower) | ~others).all(-1)
    beaten = (((lead < -safe) | ((lead == 0) & (safe == 0) & lower)) & others).any(-1)
    finite = (z.isfinite() & z.to(s.acc).isfinite() & product_size(given).to(s.acc).isfinite()).all(-1)
    assert not (top1 & ~counts).any() and not (top1 & z.isnan().any(-1)).any(), f"top1: {top1}"
    assert not (first & counts & finite & ~top1).any(), f"top1: {top1}"
    assert not (beaten & finite & top1).any(), f"top1: {top1}"


# ------------------------------------------------------------------ linear_topk


def linear_topk(s: Source) -> None:
    given = linear_head(s)
    v = len(given["weight"])
    given["k"] = s.integer("k", 1, min(v, 9)) if s.flag("few") else s.size("k", v, 1)
    chosen: list[Tensor] = []  # indices of the last call, since near ties may come in any order

    def call(**given) -> dict[str, Tensor]:
        top = sukhops.linear_topk(**given)
        chosen[:] = [top.indices]
        check_order(top.values.detach(), top.indices, v)
        return {"values": top.values, "best": top.values.detach(), "lse": top.lse}

    def truth(*, hidden, weight, k, bias=None, softcap=None, scale=1.0, temperature=1.0) -> dict[str, Tensor]:
        z = logits(hidden, weight, bias, softcap, scale, temperature)
        lost = z.isnan().any(-1) | (z == torch.inf).any(-1)  # the log-probs of such a row are NaN
        z = z * torch.ones_like(z).masked_fill(lost.unsqueeze(-1), torch.nan)
        lse = torch.logsumexp(z, -1)
        lse = lse + of_softmax(z) if moving() else lse
        return {"values": z.gather(-1, chosen[0]), "best": z.detach().topk(k).values, "lse": lse}

    s.with_gradients(given)
    with surroundings(s, row_bytes(s, v)):
        compare(s, call, truth, given, terms(given))


def check_order(values: Tensor, indices: Tensor, v: int, ties: bool = True) -> None:
    """Asserts distinct entries in descending order; of equal ones the lower index comes first if `ties`."""
    assert indices.dtype == torch.int64 and ((indices >= 0) & (indices < v)).all(), f"indices: {indices}"
    assert (indices.sort(-1).values.diff(dim=-1) > 0).all(), f"indices: {indices}"
    right = (values[..., :-1] > values[..., 1:]) | (
        (values[..., :-1] == values[..., 1:]) & ((indices[..., :-1] < indices[..., 1:]) | (not ties))
    )
    assert (right | values[..., 1:].isnan()).all(), f"values {values} at {indices}"


# ------------------------------------------------------------------ director


def director_head(s: Source) -> dict[str, object]:
    one = s.pick("hidden is lm_weight", False, False, False, False, True)
    v, d = s.size("V", 70 if one else 300, 1), s.size("D", 80)
    weight = s.tensor("lm_weight", v, d, scale=0.3)
    rows = (v,) if one else s.rows()
    hidden = weight if one else s.tensor("hidden", *rows, d, scale=s.pick("size", 1.0, 30.0, 1e-3, 300.0))
    given = {"hidden": hidden, "lm_weight": weight, "cls_weight": None}
    heads = s.pick("classifiers", "one", "affine", "two", "list of one")
    count = {"two": 2, "list of one": 1}.get(heads)
    if heads == "affine":
        pair = s.tensor("cls_affine", 2, dtype=s.acc)
        given["cls_affine"] = s.pick("affine", (1.3, -0.4), (pair[0].clone(), 0.3), pair)
    elif count is None:
        given["cls_weight"] = weight if s.flag("one matrix") else s.tensor("cls_weight", v, d, scale=0.3)
        if s.flag("cls_bias"):
            given["cls_bias"] = s.tensor("cls_bias", v)
    else:
        given["cls_weight"] = [s.tensor(f"cls_weight {i}", v, d, scale=0.3) for i in range(count)]
        if s.flag("cls_bias"):
            given["cls_bias"] = [
                s.tensor(f"cls_bias {i}", v) if s.flag(f"bias {i}") else None for i in range(count)
            ]
    if s.flag("lm_bias"):
        given["lm_bias"] = s.tensor("lm_bias", v)
    if s.flag("set gamma"):
        given["gamma"] = gamma(s, rows)
        if count and s.flag("gammas"):
            given["gamma"] = [given["gamma"], *(gamma(s, rows) for _ in range(count - 1))]
    return given


def gamma(s: Source, rows: tuple[int, ...]) -> float | Tensor:
    kind = s.pick("gamma", 0.7, 0, "scalar", "rows", "last axis 1")
    if not isinstance(kind, str):
        return kind
    shape = {"scalar": (), "rows": rows, "last axis 1": (*rows[:-1], 1) if rows else ()}[kind]
    t = (3 * s.uniform(*shape)).to(s.pick("gamma: dtype", s.acc, torch.float32))
    if s.flag("gamma: some 0"):
        t = t.where(t > 1, 0.0)
    wrong = s.pick("gamma: wrong", *[None] * 12, -1.0, torch.nan, torch.inf)
    if wrong is not None and torch.empty(rows).numel():
        t.view(-1)[0] = wrong
        s.bad = True
    return s.laid_out("gamma", t)


def constant_gate(given: dict) -> bool:
    """Whether a gate is equal for all entries: gradients of gamma and affine are then 0, up to rounding."""
    weights, biases = (
        [precise(t) for t in (x if isinstance(x, list) else [x])]
        for x in (given["cls_weight"], given.get("cls_bias"))
    )
    hidden = precise(given["hidden"])
    if given["cls_weight"] is None:
        weights, biases = [precise(given["lm_weight"])], [precise(given.get("lm_bias"))]
    for i, w in enumerate(weights):
        bias = biases[i] if i < len(biases) else None
        z = hidden @ w.T + (0 if bias is None else bias)
        if (z.amax(-1) - z.amin(-1) < 1e-6).any():
            return True
    return "cls_affine" in given and float(given["cls_affine"][0]) == 0


def director_terms(given: dict) -> int:
    return terms({"hidden": given["hidden"], "weight": given["lm_weight"]})


def director_off(given: dict) -> Callable[[str], float]:
    """The error of a true log-prob: four roundings of log V; the budget has four for the operator's own."""
    error = 4 * torch.finfo(torch.float64).eps * (1 + math.log(len(given["lm_weight"])))
    return lambda name: 0.0 if name.startswith("grad") else error


def director_logp(s: Source) -> None:
    given = director_head(s)
    s.with_gradients(given, never=("gamma", "cls_affine") if constant_gate(given) else ())
    with surroundings(s):
        if s.bad:
            return must_raise(s, RuntimeError, sukhops.director_logp, given)

        def unknown(name: str, exact: Tensor) -> Tensor:
            """With gamma 0 in a NaN row, the classifier's gradient is 0 in the truth and NaN in a kernel.

            A logit of -inf adds 0 * inf to the truth of the affine's slope; a kernel skips it.
            """
            skipped = exact.isnan() & (s.special in ("inf", "-inf") and name == "grad of cls_affine[0]")
            return skipped | (exact == 0) & (s.special in NOT_FINITE and name.startswith("grad of cls"))

        compare(
            s,
            lambda **g: {"logp": sukhops.director_logp(**g)},
            lambda **g: {"logp": reference.director_logp(**g)},
            given,
            director_terms(given),
            unknown=unknown,
            off=director_off(given),
        )


def director_topk(s: Source) -> None:
    given = director_head(s)
    v = len(given["lm_weight"])
    given["k"] = s.integer("k", 1, min(v, 9)) if s.flag("few") else s.size("k", v, 1)
    chosen: list[Tensor] = []

    def call(**given) -> dict[str, Tensor]:
        top = sukhops.director_topk(**given)
        chosen[:] = [top.indices]
        check_order(top.values, top.indices, v, ties=False)  # log-probs may be equal where logits differ
        return {"values": top.values, "best": top.values}

    def truth(*, k, **rest) -> dict[str, Tensor]:
        logp = reference.director_logp(**rest)
        return {"values": logp.gather(-1, chosen[0]), "best": logp.topk(k).values}

    with surroundings(s):
        if s.bad:
            return must_raise(s, RuntimeError, call, given)
        compare(s, call, truth, given, director_terms(given), off=director_off(given))


TARGETS = {
    f.__name__: f for f in (linear_logp, linear_token_stats, linear_topk, director_logp, director_topk)
}
