"""Director's training loss on log-probs and classifier logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sukhops import _checks
from sukhops.losses._output import LossOutput, average
from sukhops.losses._sequences import IGNORE, as_scores, check_labels

REDUCTIONS = ("mean", "sum_of_means")


def lm_target(target: Tensor, label: Tensor, train_lm_on_positive: bool = False) -> Tensor:
    """`target` for tokens that train the language model, and -100 for all others.

    Args:
        target: [...], integers; -100 for an ignored token.
        label: [...], -1 for a plain example, 1 or 0 for a classifier example.
        train_lm_on_positive: whether positive classifier examples train the language model too.

    Returns:
        [...], of target's dtype.

    Source: Arora et al. 2022 (Director).
    """
    trains = label == -1
    if train_lm_on_positive:
        trains = trains | (label == 1)
    return target.where(trains, IGNORE)


def director_loss(
    lm_logp: Tensor,
    cls_logit: Tensor,
    target: Tensor,
    label: Tensor,
    *,
    gamma: float = 0.5,
    norm: Tensor | None = None,
    norm_weight: float = 0.0,
    class_weight: tuple[float, float] = (1.0, 1.0),
    reduction: str = "mean",
    train_lm_on_positive: bool = False,
    num_items: int | Tensor | None = None,
) -> LossOutput:
    """Cross entropy of plain examples plus gamma times the classifier loss of labeled examples.

        lm  = -lm_logp                                        where label is -1
        cls = -w_label * log p(label) + norm_weight * norm    where label is 0 or 1; p(1) = sigmoid(cls_logit)

    "mean" divides the sum of all token losses by the number of tokens that train a head. "sum_of_means", the
    published form, divides within each example and sums over examples, so it grows with the batch. A token
    that trains both heads counts twice. Without tokens the loss is 0.

    Args:
        lm_logp: [...], log-probs of the targets; 0 where the language model is not trained.
        cls_logit: [...], the classifier's logit of each target; 0 where the classifier is not trained.
        target: [...], integers; -100 for an ignored token. [B, T] for "sum_of_means".
        label: [...], 1, 0 or -1.
        gamma: weight of the classifier loss.
        norm: [...], from `sukhops.ops.director.classifier_terms`, which also gives cls_logit; needed if
            norm_weight is not 0.
        norm_weight: factor of norm (kappa in the paper).
        class_weight: (negative, positive) factors of the binary cross entropy.
        reduction: "mean" or "sum_of_means".
        train_lm_on_positive: as in `lm_target`.
        num_items: a number > 0 or a 0-dim tensor: the number of tokens that train a head in the whole batch,
            if this call has a part of it. None: their number in this call. Only with "mean".

    Returns:
        LossOutput(loss [], metrics). Metrics are detached scalars. lm_loss, cls_loss and (with norm_weight)
        norm are means per token in nats, without gamma and norm_weight. accuracy, accuracy_negative,
        accuracy_positive, f1_negative and f1_positive are over classifier tokens (0 without any). lm_tokens
        and cls_tokens are the numbers of tokens.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; a label of a token that is
            not ignored is outside {1, 0, -1} (on CUDA the loss is NaN instead); reduction is unknown; target
            is not [B, T] with "sum_of_means"; norm is given without norm_weight or norm_weight without norm;
            num_items is given with "sum_of_means", or is not as above.

    Source: Arora et al. 2022 (Director); norm and sum_of_means are from its public training code.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")
    _checks.check_integers("target", target)
    if reduction == "sum_of_means" and target.dim() != 2:
        raise ValueError(f"reduction: sum_of_means needs target [B, T], got {list(target.shape)}")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items: reduction {reduction!r} divides per example, expected None")
    if norm_weight if norm is None else not norm_weight:
        raise ValueError(f"norm: expected exactly when norm_weight is not 0, got norm_weight = {norm_weight}")
    label = check_labels("label", label, target.shape, target, counted=target != IGNORE)
    scores = {"lm_logp": lm_logp, "cls_logit": cls_logit} | ({} if norm is None else {"norm": norm})
    lm_logp, cls_logit, *norms = as_scores(target, **scores)
    trains_lm = lm_target(target, label, train_lm_on_positive) != IGNORE  # [...]
    trains_cls = (target != IGNORE) & (label >= 0)  # [...]
    positive = label == 1  # [...]
    wrong = (target != IGNORE) & ((label < -1) | (label > 1))  # [...]
    nll = (-lm_logp).where(trains_lm, 0.0).masked_fill(wrong, torch.nan)  # [...]
    bce = -F.logsigmoid(torch.where(positive, cls_logit, -cls_logit))  # [...]
    negative_weight, positive_weight = class_weight
    weighted = torch.where(positive, positive_weight * bce, negative_weight * bce)
    if norms:
        weighted = weighted + norm_weight * norms[0]
    weighted = weighted.where(trains_cls, 0.0)  # [...]
    dims = () if reduction == "mean" else (-1,)

    def total(t: Tensor) -> Tensor:
        return t.sum(dims) if dims else t.sum()

    counted = total(trains_lm) + total(trains_cls)  # [] or [B]
    loss = average(total(nll) + gamma * total(weighted), counted, num_items).sum()
    with torch.no_grad():
        metrics = _metrics(nll, bce, norms, cls_logit, positive, trains_lm, trains_cls)
    return LossOutput(loss, metrics)


def _metrics(
    nll: Tensor, bce: Tensor, norms: list[Tensor], cls_logit: Tensor, positive: Tensor, trains_lm: Tensor,
    trains_cls: Tensor,
) -> dict[str, Tensor]:  # fmt: skip
    lm_tokens, cls_tokens = trains_lm.sum(), trains_cls.sum()
    guess = cls_logit > 0  # [...]
    nan = (cls_logit.isnan() & trains_cls).any()
    metrics = {
        "lm_loss": nll.sum() / lm_tokens.clamp(min=1),
        "cls_loss": bce.where(trains_cls, 0.0).sum() / cls_tokens.clamp(min=1),
        "lm_tokens": lm_tokens,
        "cls_tokens": cls_tokens,
        "accuracy": _over(((guess == positive) & trains_cls).sum(), cls_tokens, nan),
    }
    if norms:
        metrics["norm"] = norms[0].sum() / cls_tokens.clamp(min=1)
    for name, is_class, guessed in (("negative", ~positive, ~guess), ("positive", positive, guess)):
        hits = (is_class & guessed & trains_cls).sum()
        members, guesses = (is_class & trains_cls).sum(), (guessed & trains_cls).sum()
        metrics[f"accuracy_{name}"] = _over(hits, members, nan)
        metrics[f"f1_{name}"] = _over(2 * hits, members + guesses, nan)
    return {name: value.detach() for name, value in metrics.items()}


def _over(hits: Tensor, count: Tensor, nan: Tensor) -> Tensor:
    """hits / count, 0 if both are 0, or NaN if `nan`: all three are []."""
    return (hits / count.clamp(min=1)).masked_fill(nan, torch.nan)
