"""Fuzz cases of the loss modules; the truth is the functional loss on log-probs of the reference."""

import math
from collections.abc import Callable

import torch
from fuzz_compare import compare, moving, rounded
from fuzz_heads import head_logits, of_each_part, row_bytes, spread
from fuzz_inputs import Source, must_raise, surroundings
from torch import Tensor

from sukhops import losses, nn, reference
from sukhops.losses._preference import LOSSES, SMOOTHED

IGNORE = -100
STEPS = ("accuracy", "f1")  # metrics that are discontinuous, so they are not compared


def shown(out: losses.LossOutput) -> dict[str, Tensor]:
    return {"loss": out.loss} | {n: t for n, t in out.metrics.items() if not n.startswith(STEPS)}


def token_logp(hidden, weight, target, bias=None) -> Tensor:
    """Log-probs of the targets, 0 where ignored."""
    rows = target != IGNORE
    hidden, target = hidden[rows], target[rows]
    logp = reference.linear_logp(hidden, weight, target, bias)
    if moving():
        logp = of_each_part(logp, target, head_logits(hidden, weight, bias))
    return spread(rounded(logp), rows)


class Batch:
    """Padded or packed sequences and a head: hidden, weight, target, optional bias and cu_seqlens."""

    def __init__(self, s: Source, sequences: int, packed: bool | None = None):
        self.s, self.sequences = s, sequences
        self.packed = s.flag("packed") if packed is None else packed
        self.v, self.d = s.size("V", 300, 1), s.size("D", 70)
        self.given: dict[str, object] = {}
        self.shape = self._sequences("", sequences)
        self.given["hidden"] = s.tensor(
            "hidden", *self.shape, self.d, scale=s.pick("size", 1.0, 1.0, 0.1, 10.0)
        )
        self.given["weight"] = s.tensor("weight", self.v, self.d, scale=0.3)
        self.given["target"] = s.target(self.shape, self.v)
        if s.flag("bias"):
            self.given["bias"] = s.tensor("bias", self.v)

    def _sequences(self, prefix: str, sequences: int) -> tuple[int, ...]:
        s = self.s
        if not self.packed:
            return (sequences, s.size(f"{prefix}T", 12))
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), s.whole(0, 9, sequences).cumsum(0)])
        kind = s.pick(f"{prefix}cu_seqlens: dtype", torch.int64, torch.int32)
        self.given[f"{prefix}cu_seqlens"] = s.laid_out(f"{prefix}cu_seqlens", ends.to(kind))
        return (int(ends[-1]),)

    def reference(self, forms: tuple[str, ...]) -> str:
        """Adds a reference model: its head, or its log-probs of tokens or of sequences."""
        form = self.s.pick("reference", *forms)
        if form == "head":
            self.given |= self._reference_head()
        else:
            self.given["ref_logp"] = self._reference_logp("ref_logp", form, self.shape, self.given["target"])
        return form

    def _reference_head(self) -> dict[str, Tensor]:
        s, given = self.s, self.given
        if s.pick("the policy is the reference", False, False, True):
            return {"ref_hidden": given["hidden"], "ref_weight": given["weight"]}
        d = s.size("reference D", 40)
        head = {"ref_hidden": s.tensor("ref_hidden", *self.shape, d)}
        head["ref_weight"] = s.tensor("ref_weight", self.v, d, scale=0.3)
        if s.flag("ref_bias"):
            head["ref_bias"] = s.tensor("ref_bias", self.v)
        return head

    def _reference_logp(self, label: str, form: str, shape: tuple[int, ...], target: Tensor) -> Tensor:
        s = self.s
        shape = shape if form == "tokens" else (self.sequences,)
        t = -(4 if form == "tokens" else 20) * s.uniform(*shape)
        if form == "tokens" and s.flag(f"{label}: NaN where ignored"):
            t = t.masked_fill(target == IGNORE, torch.nan)
        return s.laid_out(label, t.to(s.pick(f"{label}: dtype", s.acc, s.dtype)))

    def mismatched(self, ref: str) -> None:
        """Adds a mismatched batch with the same number of sequences, of other lengths."""
        s, shape = self.s, self._sequences("kl_", self.sequences)
        if not self.packed and self.sequences > 1 and s.flag("of this batch"):
            self.given["kl_target"] = losses.mismatched(self.given["target"])
            shape = tuple(self.given["kl_target"].shape)
        else:
            self.given["kl_target"] = s.target(shape, self.v, label="kl_target")
        self.given["kl_hidden"] = s.tensor("kl_hidden", *shape, self.d)
        if ref == "head" and s.flag("kl_ref_hidden"):
            self.given["kl_ref_hidden"] = s.tensor("kl_ref_hidden", *shape, self.given["ref_weight"].shape[1])
        else:
            form = (
                s.pick("kl_ref_logp", "tokens")
                if "step_ids" in self.given
                else s.pick("kl_ref_logp", "tokens", "sequences")
            )
            self.given["kl_ref_logp"] = self._reference_logp(
                "kl_ref_logp", form, shape, self.given["kl_target"]
            )

    def num_items(self) -> None:
        if self.s.flag("num_items"):
            self.given["num_items"] = self.s.pick("num_items", 3, 0.5, torch.tensor(7))

    def compare(
        self,
        loss: Callable,
        truth: Callable,
        never: tuple[str, ...] = (),
        error: type[Exception] = RuntimeError,
    ) -> None:
        s = self.s
        s.with_gradients(self.given, never)

        def call(**given) -> dict[str, Tensor]:
            return shown(loss(**given))

        with surroundings(s, row_bytes(s, self.v)):
            if s.bad:
                return must_raise(s, error, call, self.given)
            terms = self.v + self.d + math.prod(self.shape)
            compare(s, call, lambda **g: shown(truth(**g)), self.given, terms, unknown=unread)


def unread(name: str, exact: Tensor) -> Tensor:
    """Elements where the truth computes 0 * NaN and kernels do not: zero gradients, the target in a norm."""
    return exact.isnan() & name.startswith(("grad", "norm"))


def reference_logp(target, ref_logp=None, ref_hidden=None, ref_weight=None, ref_bias=None) -> Tensor | None:
    if ref_hidden is None:
        return None if ref_logp is None else rounded(ref_logp.detach())
    with torch.no_grad():
        return token_logp(ref_hidden, ref_weight, target, ref_bias)


def split(given: dict) -> tuple[dict, dict]:
    """Splits the arguments into those of the reference model and the others."""
    ref = {n: given[n] for n in ("ref_logp", "ref_hidden", "ref_weight", "ref_bias") if n in given}
    return ref, {n: v for n, v in given.items() if n not in ref}


# ------------------------------------------------------------------ DPO


def dpo_options(s: Source) -> dict[str, object]:
    """Random valid options: an option that conflicts with earlier ones is left out."""
    types = [s.pick("loss_type", *LOSSES) for _ in range(s.pick("loss types", 1, 1, 2, 3))]
    options: dict[str, object] = {"loss_type": types[0] if len(types) == 1 else types}
    if not SMOOTHED.isdisjoint(types) and ({"robust", "exo_pair"} & {*types} or s.flag("smoothed")):
        options["label_smoothing"] = s.pick("label_smoothing", 0.1, 0.3)
    if len(types) > 1 and s.flag("weighted"):
        options["loss_weights"] = [1.0, 0.5, -0.3][: len(types)]
    more = {
        "beta": (0.1, 0.5, 2.0), "reference_free": (False, False, True), "length_alpha": (0.0, 0.1),
        "ld_alpha": (1.0, 0.5, 0.0), "nll_weight": (0.0, 0.3), "use_weighting": (False, True),
        "f_divergence": ("reverse_kl", "forward_kl", "js", "alpha"), "f_alpha": (0.5, 0.3, 2.0, 1.0),
        "margin": (0.0, 0.7), "tau": (0.05, 0.5),
    }  # fmt: skip
    for name, values in more.items():
        wanted = options | {name: s.pick(name, *values)}
        try:
            nn.DPOLoss(**wanted)
        except ValueError:
            continue
        options = wanted
    return options


def dpo(s: Source) -> None:
    options = dpo_options(s)
    loss = nn.DPOLoss(**options)
    batch = Batch(s, 2 * s.size("pairs", 4))
    if loss.options.needs_reference:
        batch.reference(("head", "tokens") if loss.options.ld_alpha != 1 else ("head", "tokens", "sequences"))
    if not loss.options.nll_weight and {"sft", "orpo"}.isdisjoint(loss.options.types):
        batch.num_items()

    def truth(*, hidden, weight, target, bias=None, **rest) -> losses.LossOutput:
        ref, rest = split(rest)
        rows = target != IGNORE
        squares = None
        if loss.options.use_weighting:
            given = hidden[rows], weight, target[rows], bias
            stats = reference.linear_token_stats(*given, outputs=("log_sum_sq",))
            squares = spread(rounded(stats.log_sum_sq), rows)
        return losses.dpo_loss(
            token_logp(hidden, weight, target, bias), target, reference_logp(target, **ref),
            log_sum_squares=squares, **rest, **options,
        )  # fmt: skip

    batch.compare(loss, truth)


# ------------------------------------------------------------------ KTO


def kto_options(s: Source) -> dict[str, float]:
    return {
        "beta": s.pick("beta", 0.1, 1.0),
        "desirable_weight": s.pick("desirable_weight", 1.0, 1.3, 0.0),
        "undesirable_weight": s.pick("undesirable_weight", 1.0, 0.7),
    }


def labels(s: Source, name: str, *shape: int) -> Tensor:
    if s.flag(f"{name} as bools"):
        return s.laid_out(name, s.whole(0, 2, *shape).bool())
    return s.integers(name, s.whole(-1, 2, *shape))


def reference_point(s: Source, batch: Batch, ref: str, name: str = "kl") -> None:
    kind = s.pick(name, "number", "tensor", "batch")
    if kind == "batch":
        batch.mismatched(ref)
    else:
        number = s.pick("reference point", 0.3, 0, -1.5)
        batch.given[name] = number if kind == "number" else torch.tensor(number, dtype=s.acc)


def of_mismatched(given: dict, ref: dict, weight: Tensor, bias: Tensor | None) -> dict:
    """The arguments of the functional loss, in which log-probs replace the mismatched batch."""
    batch = {n: given.pop(n) for n in [*given] if n.startswith("kl_")}
    if not batch:
        return given
    target, logp = batch["kl_target"], batch.get("kl_ref_logp")
    with torch.no_grad():
        policy = token_logp(batch["kl_hidden"], weight, target, bias)
        if logp is None:
            logp = token_logp(batch["kl_ref_hidden"], ref["ref_weight"], target, ref.get("ref_bias"))
    kl = losses.Mismatched(
        target, policy, rounded(logp), batch.get("kl_cu_seqlens"), batch.get("kl_step_ids")
    )
    return given | {"kl": kl}


def kto(s: Source) -> None:
    options = kto_options(s)
    batch = Batch(s, s.size("sequences", 6))
    ref = batch.reference(("head", "tokens", "sequences"))
    batch.given["desirable"] = labels(s, "desirable", batch.sequences)
    reference_point(s, batch, ref)
    batch.num_items()

    def truth(*, hidden, weight, target, desirable, bias=None, **rest) -> losses.LossOutput:
        ref, rest = split(rest)
        rest = of_mismatched(rest, ref, weight, bias)
        logp = token_logp(hidden, weight, target, bias)
        return losses.kto_loss(logp, target, desirable, reference_logp(target, **ref), **rest, **options)

    batch.compare(nn.KTOLoss(**options), truth)


def step_kto(s: Source) -> None:
    options = kto_options(s) | {
        "step_beta": s.pick("step_beta", None, 0.7),
        "step_weight": s.pick("step_weight", 1.0, 0.5, 0.0),
        "step_reduction": s.pick("step_reduction", "batch", "sequence"),
    }
    batch = Batch(s, s.size("sequences", 5))
    ref = batch.reference(("head", "tokens"))
    steps = s.size("steps", 4)
    batch.given |= {
        "desirable": labels(s, "desirable", batch.sequences),
        "step_ids": s.integers("step_ids", s.whole(-1, steps, *batch.shape)),
        "step_labels": labels(s, "step_labels", batch.sequences, steps),
    }
    reference_point(s, batch, ref)
    if "kl_target" in batch.given and s.flag("kl_step_ids"):
        shape = batch.given["kl_target"].shape
        batch.given["kl_step_ids"] = s.integers("kl_step_ids", s.whole(-1, max(1, min(3, shape[-1])), *shape))
    elif s.flag("step_kl"):
        batch.given["step_kl"] = 0.2
    if not options["step_weight"]:
        batch.num_items()

    def truth(
        *, hidden, weight, target, desirable, step_ids, step_labels, bias=None, **rest
    ) -> losses.LossOutput:
        ref, rest = split(rest)
        rest = of_mismatched(rest, ref, weight, bias)
        logp, ref_logp = token_logp(hidden, weight, target, bias), reference_logp(target, **ref)
        return losses.step_kto_loss(
            logp, target, desirable, step_ids, step_labels, ref_logp, **rest, **options
        )

    batch.compare(nn.StepKTOLoss(**options), truth)


TARGETS = {"DPOLoss": dpo, "KTOLoss": kto, "StepKTOLoss": step_kto}
