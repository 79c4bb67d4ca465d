"""Batches of a LossTrainer: requests to the model, number of items in a batch, and the default collator."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from sukhops import losses
from sukhops.losses.director import lm_target
from sukhops.nn import DirectorLoss, DPOLoss, KTOLoss, PairwiseCringeLoss, StepKTOLoss

PER_TOKEN = ("label", "step_ids", "ref_logp")  # shifted like labels if they are [B, T] like input_ids
_IGNORE = -100
_FILL = {"labels": _IGNORE, "label": -1, "step_ids": -1, "step_labels": -1}  # padding values; others are 0
SIDES = ("chosen_", "rejected_")


class Request:
    """What the forward of a model computes on its hidden states: a loss, or (without a loss) log-probs.

    It is a class because FSDP2 casts tensors in arguments of types that it knows (dict, for example).
    """

    def __init__(
        self,
        loss: nn.Module | None,
        target: Tensor,
        arguments: dict[str, Any] | None = None,
        mismatched: dict[str, Tensor] | None = None,
    ):
        self.loss = loss
        self.target = target  # [B, T - 1], or packed [T - 1]
        self.arguments = arguments or {}
        self.mismatched = mismatched  # model inputs of the batch that estimates KTO's reference point


def packed(target: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Removes the first axis of packed sequences [1, T - 1], and ignores the first token of each sequence."""
    ends = (arguments["cu_seqlens"] - 1).clamp(min=0)
    flat = {n: v[0] if getattr(v, "shape", None) == target.shape else v for n, v in arguments.items()}
    return target[0].index_fill(0, ends[1:-1].long(), _IGNORE), {**flat, "cu_seqlens": ends}


def has_two_counts(loss: nn.Module) -> bool:
    """Whether the terms of the loss are divided by different numbers, so that it does not take num_items."""
    if isinstance(loss, DPOLoss):
        return bool(loss.options.nll_weight) or not {"sft", "orpo"}.isdisjoint(loss.options.types)
    if isinstance(loss, StepKTOLoss):
        return bool(loss.options.step_weight)
    return isinstance(loss, DirectorLoss) and loss.reduction != "mean"


def count(request: Request) -> Tensor:
    """The number of items (tokens, pairs, completions) by which the loss of a batch is divided: int64 []."""
    loss, target, arguments = request.loss, request.target, request.arguments
    if isinstance(loss, DPOLoss | PairwiseCringeLoss):
        ends = arguments.get("cu_seqlens")
        return torch.tensor((target.shape[0] if ends is None else len(ends) - 1) // 2)
    if isinstance(loss, KTOLoss | StepKTOLoss):
        return (arguments["desirable"].long() != -1).sum()
    counted = target != _IGNORE
    if not isinstance(loss, DirectorLoss):  # CRINGE
        return counted.sum()
    label = arguments["label"]
    label = label.unsqueeze(1).expand(target.shape) if label.dim() == 1 else label
    trains_lm = lm_target(target, label, loss.train_lm_on_positive) != _IGNORE
    return trains_lm.sum() + (counted & (label >= 0)).sum()


def columns(dataset: Any) -> set[str] | None:
    """The names of a dataset's columns; None if they are not known."""
    names = getattr(dataset, "column_names", None)
    if names is None and not isinstance(dataset, IterableDataset) and hasattr(dataset, "__getitem__"):
        first = dataset[0] if hasattr(dataset, "__len__") and len(dataset) else None
        names = first if isinstance(first, Mapping) else None
    return None if names is None else set(names)


class Collator:
    """The default collator: pads rows on the right, and splits pairs into chosen, then rejected sequences.

    Args:
        pad_id: padding token.
        mismatches: whether to add a mismatched batch (for KTO) if there is no column kl.
        required: columns that every row must have.
    """

    def __init__(self, pad_id: int, mismatches: bool, required: Collection[str] = ()):
        self.pad_id, self.mismatches, self.required = pad_id, mismatches, set(required)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        rows = [_checked(number, row, rows[0].keys() | self.required) for number, row in enumerate(rows)]
        if any(n.startswith("chosen_") for n in rows[0]):
            rows = [_side(row, *sides) for sides in (SIDES, SIDES[::-1]) for row in rows]
        batch = {name: self._column(name, [row[name] for row in rows]) for name in rows[0]}
        if "attention_mask" not in batch and "input_ids" in batch:
            lengths = torch.tensor([len(row["input_ids"]) for row in rows])
            positions = torch.arange(batch["input_ids"].shape[1])
            batch["attention_mask"] = (positions < lengths.unsqueeze(1)).long()
        if self.mismatches and not {"kl", "kl_input_ids"} & set(batch):
            ids, target = losses.mismatched(
                batch["labels"][:, 1:], batch["input_ids"][:, :-1], pad_id=self.pad_id
            )
            batch["kl_input_ids"] = nn.functional.pad(ids, (0, 1), value=self.pad_id)
            batch["kl_labels"] = nn.functional.pad(target, (1, 0), value=_IGNORE)
        return batch

    def _column(self, name: str, values: list[Tensor]) -> Tensor:
        if len({v.dim() for v in values}) > 1:
            raise ValueError(f"{name}: expected a number in every row or a list in every row, got both")
        if not values[0].dim():
            stacked = torch.stack(values)
            return stacked.float().mean() if name in ("kl", "step_kl") else stacked
        name = name.removeprefix("kl_")
        fill = self.pad_id if name == "input_ids" else _FILL.get(name, 0)
        return nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)


def _checked(number: int, row: dict[str, Any], names: set[str]) -> dict[str, Tensor]:
    """The columns of a row as tensors.

    Raises a ValueError if a column is missing or not numeric, or has not one value per token but should have.
    """
    if row.keys() != names:
        wrong = sorted(names ^ row.keys())
        raise ValueError(
            f"row {number} of the batch: expected the columns {sorted(names)}, got {sorted(row)}; "
            f"{wrong} are not in all rows"
        )
    made = {}
    for name, value in row.items():
        try:
            made[name] = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"{name}: expected a number or a list of numbers in row {number} of the batch, got {value!r}"
            ) from None
    for name, value in made.items():
        prefix = next((p for p in (*SIDES, "kl_") if name.startswith(p)), "")
        tokens = made.get(f"{prefix}input_ids")
        per_token = name.removeprefix(prefix) in ("labels", "attention_mask", *PER_TOKEN)
        if per_token and tokens is not None and value.dim() and len(value) != len(tokens):
            raise ValueError(
                f"{name}: expected as many values as {prefix}input_ids in row {number} of the batch, "
                f"{len(tokens)}, got {len(value)}"
            )
    return made


def _side(row: dict[str, Tensor], kept: str, other: str) -> dict[str, Tensor]:
    return {n.removeprefix(kept): v for n, v in row.items() if not n.startswith(other)}
