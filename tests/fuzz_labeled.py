"""Fuzz cases of the losses on labeled tokens: CRINGE, Director, segmentations."""

from unittest import mock

import torch
from fuzz_compare import rounded
from fuzz_heads import spread
from fuzz_inputs import HUGE, Source
from fuzz_losses import IGNORE, Batch, labels, token_logp
from fuzz_sequences import segment_scores
from torch import Tensor

from sukhops import losses, nn, reference
from sukhops.losses.cringe import label_per_token, sample_rival
from sukhops.losses.director import lm_target
from sukhops.reference import director as classifier
from sukhops.reference.vocab_head import logits

# ------------------------------------------------------------------ CRINGE


class Rivals:
    """Log-probs of the targets, and their logits minus those of rivals sampled with a seeded generator."""

    def __init__(self, s: Source):
        self.k, self.seed, self.acc = s.pick("k", 1, 2, 5), s.integer("generator", 0, 9), s.acc

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def __call__(self, hidden, weight, target, bias, detach: bool = False) -> tuple[Tensor, Tensor]:
        rows, logp = target != IGNORE, token_logp(hidden, weight, target, bias)
        z = rounded(logits(hidden[rows], weight, bias, None, 1.0, 1.0))
        lost = (z == torch.inf).any(-1, keepdim=True)  # the log-probs of such a row are NaN
        z = z * torch.ones_like(z).masked_fill(lost, torch.nan)
        if len(weight) == 1:
            return logp, torch.full_like(logp, -torch.inf)
        width = min(self.k + 1, len(weight))
        values, indices = (t[:, :width] for t in z.sort(stable=True, dim=-1, descending=True))
        shape = (*target.shape, width)
        uniform = torch.rand(shape, dtype=self.acc, generator=self.generator() if width > 2 else None)
        noise = -torch.log(-torch.log(uniform.clamp(min=torch.finfo(self.acc).tiny)))
        own = target[rows].long()
        rival = values.gather(1, sample_rival(values, indices, own, noise[rows]).unsqueeze(1))
        gap = z.gather(1, own.unsqueeze(1)) - (rival.detach() if detach else rival)
        return logp, spread(gap.squeeze(1), rows)


def cringe(s: Source) -> None:
    rivals, alpha, detach = Rivals(s), s.pick("alpha", 1.0, 0.7, 0.0), s.flag("detach_positive")
    batch = Batch(s, s.size("sequences", 5), packed=False)
    per_token = s.flag("label per token")
    batch.given["label"] = labels(s, "label", *(batch.shape if per_token else batch.shape[:1]))
    batch.num_items()
    loss = nn.CringeLoss(alpha, rivals.k, detach_positive=detach)

    def truth(*, hidden, weight, target, label, bias=None, num_items=None) -> losses.LossOutput:
        logp, gap = rivals(hidden, weight, target, bias, detach)
        label = label_per_token(label, target)
        return losses.cringe_loss(logp, gap, target, label, alpha=alpha, num_items=num_items)

    batch.compare(lambda **g: loss(**g, generator=rivals.generator()), truth)


def pairwise_cringe(s: Source) -> None:
    rivals = Rivals(s)
    options = {
        "alpha": s.pick("alpha", 1.0, 0.6), "margin": s.pick("margin", 0.0, -0.5, 3.0),
        "temperature": s.pick("temperature", 1.0, 4.0), "detach_gate": s.flag("detach_gate"),
    }  # fmt: skip
    batch = Batch(s, 2 * s.size("pairs", 4))
    batch.num_items()
    loss = nn.PairwiseCringeLoss(k=rivals.k, **options)

    def truth(*, hidden, weight, target, bias=None, **rest) -> losses.LossOutput:
        logp, gap = rivals(hidden, weight, target, bias)
        return losses.pairwise_cringe_loss(logp, gap, target, **rest, **options)

    batch.compare(lambda **g: loss(**g, generator=rivals.generator()), truth)


# ------------------------------------------------------------------ Director


def director(s: Source) -> None:
    options = {
        "gamma": s.pick("gamma", 0.5, 3.0, 0.0), "norm_weight": s.pick("norm_weight", 0.0, 0.8),
        "class_weight": s.pick("class_weight", (1.0, 1.0), (2.0, 0.5), (0.0, 1.0)),
        "reduction": s.pick("reduction", "mean", "sum_of_means"),
        "train_lm_on_positive": s.flag("train_lm_on_positive"),
    }  # fmt: skip
    detach = s.flag("detach_hidden")
    batch = Batch(s, s.size("sequences", 5), packed=False)
    given = batch.given
    given["lm_weight"] = given.pop("weight")
    if "bias" in given:
        given["lm_bias"] = given.pop("bias")
    given["cls_weight"] = None
    kind = s.pick("classifier", "matrix", "the same matrix", "affine")
    if kind == "affine":
        given["cls_affine"] = tuple(t.clone() for t in s.tensor("cls_affine", 2, dtype=s.acc))
    else:
        same = kind == "the same matrix"
        given["cls_weight"] = (
            given["lm_weight"] if same else s.tensor("cls_weight", batch.v, batch.d, scale=0.3)
        )
        if s.flag("cls_bias"):
            given["cls_bias"] = s.tensor("cls_bias", batch.v)
    per_token = s.flag("label per token")
    label = s.whole(-1, 2, *(batch.shape if per_token else batch.shape[:1]))
    wrong = s.pick("label: wrong", *[None] * 12, 2, -2)
    if wrong is not None and (given["target"] != IGNORE).any():
        label.fill_(wrong)
        s.bad = True
    given["label"] = s.integers("label", label)
    if options["reduction"] == "mean":
        batch.num_items()

    def truth(
        *, hidden, lm_weight, cls_weight, target, label, lm_bias=None, cls_bias=None, cls_affine=None,
        num_items=None,
    ) -> losses.LossOutput:  # fmt: skip
        label = label if label.shape == target.shape else label.unsqueeze(1).expand(target.shape)
        hidden = hidden.detach() if detach else hidden
        rows, shared = (target != IGNORE) & (label >= 0), cls_affine is not None
        weight, bias = (lm_weight, lm_bias) if shared else (cls_weight, cls_bias)
        cls = hidden[rows], weight, target[rows].long(), label[rows], bias
        logit = rounded(classifier.classifier_logit(*cls))
        if shared:
            logit = cls_affine[0] * logit + cls_affine[1]
        norm = spread(classifier.classifier_norm(*cls, cls_affine), rows) if options["norm_weight"] else None
        lm = token_logp(hidden, lm_weight, lm_target(target, label, options["train_lm_on_positive"]), lm_bias)
        return losses.director_loss(
            lm, spread(logit, rows), target, label, norm=norm, num_items=num_items, **options
        )

    batch.compare(nn.DirectorLoss(**options, detach_hidden=detach), truth)


# ------------------------------------------------------------------ segmentations


def segmentation(s: Source) -> None:
    if s.special in HUGE:
        s.special = None  # sums of such log-probs overflow in segmentation_logz
    flat = s.flag("flat")
    batch = Batch(s, s.size("sequences", 4), packed=False)
    given, (b, t), k = batch.given, batch.shape, s.size("K", 6)
    del given["target"]
    s.bad = False
    ids = s.whole(0, batch.v, b, t, k)
    ids[s.uniform(b, t, k) < s.pick("no unit", 0.3, 0.0, 0.9, 1.0)] = -1
    if s.flag("lengths"):
        given["lengths"] = s.integers("lengths", s.whole(0, t + 1, b))
    wrong = s.pick("unit_ids: wrong", *[None] * 12, -2, -100, batch.v)
    first = [0] * b if t and k else []
    ends = given["lengths"].tolist() if "lengths" in given else [t] * b
    if wrong is not None and any(end for end, _ in zip(ends, first, strict=False)):
        ids[:, 0, 0] = wrong  # position 0 exists in every non-empty sequence
        s.bad = True
    given["unit_ids"] = s.integers("unit_ids", ids)
    batch.num_items()

    def logz(scores: Tensor, lengths: Tensor) -> Tensor:
        return reference.segmentation_logz(segment_scores(scores, lengths), lengths)

    def truth(*, hidden, weight, unit_ids, bias=None, lengths=None, num_items=None) -> losses.LossOutput:
        targets = losses.unit_targets(unit_ids, lengths)
        counts = targets != IGNORE
        rows = counts.any(-1)
        logp = reference.linear_logp(hidden[rows], weight, targets[rows], bias)
        with mock.patch(
            "sukhops.losses.segmentation.segmentation_logz", logz
        ):  # the functional loss itself calls the fused operator
            return losses.segmentation_loss(
                spread(rounded(logp), rows), unit_ids, lengths=lengths, flat=flat, num_items=num_items
            )

    batch.compare(nn.SegmentationLoss(flat=flat), truth, error=ValueError)


TARGETS = {
    "CringeLoss": cringe,
    "PairwiseCringeLoss": pairwise_cringe,
    "DirectorLoss": director,
    "SegmentationLoss": segmentation,
}
