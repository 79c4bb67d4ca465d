"""LIFT's pairs: an instruction with a limit of words, and which answer wins under it."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from sukhops import _checks
from sukhops.pairs._pairs import check_numbers

# Words as treebanks part them: contractions are words of their own (do|n't, she|'ll, can|not); hyphens,
# slashes and full stops inside, and the commas of numbers, part nothing. The model is NLTK's tokenizer,
# which finds the ends of sentences with data that it downloads; without them "character's."
# inside a text is one word to it.
_CLITIC = r"(?:n['’]t|['’](?:s|m|d|re|ve|ll))(?![\w'’])"
_TOKEN = re.compile(
    rf"""{_CLITIC}
    | can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b) | (?:gim|lem)(?=me\b)
    | (?: (?! {_CLITIC} | \.\. | -- ) (?: [^\s"“”«»‘`;@\#$%&*?!()\[\]{{}}<>:,…—] | [:,](?=\d) ) )+
    """,
    re.IGNORECASE | re.VERBOSE,
)
_WORD = re.compile(r"[^\W_]")  # a token without a letter or a digit is punctuation


def count_words(text: str) -> int:
    """Words of a text: treebank-style tokens that hold a letter or a digit ("the character's." counts 3).

    Source: Yuan et al., Following Length Constraints in Instructions, 2025, count words; that they are
    treebank tokens without punctuation is inferred from the example they publish.
    """
    if not isinstance(text, str):
        raise TypeError(f"text: expected a str, got {type(text).__name__}")
    return sum(1 for token in _TOKEN.findall(text) if _WORD.search(token))


def lift_prompt(instruction: str, limit: int) -> str:
    """The instruction behind a sentence that limits the words of its answer (limit > 0).

    Source: the prompts of AlpacaEval-LI and MT-Bench-LI (Yuan et al., 2025).
    """
    if not isinstance(instruction, str):
        raise TypeError(f"instruction: expected a str, got {type(instruction).__name__}")
    if not isinstance(limit, int) or isinstance(limit, bool):
        raise TypeError(f"limit: expected an int, got {type(limit).__name__}")
    if limit < 1:
        raise ValueError(f"limit: expected > 0, got {limit}")
    return f"Answer the following instruction using {limit} words or less.\n\n{instruction}"


def lift_relabel(len_chosen: Tensor | float, len_rejected: Tensor | float, limit: Tensor | float) -> Tensor:
    """What becomes of a preference pair under a limit of length.

    The pair stays (1) if the chosen answer keeps the limit, is swapped (-1) if only the rejected one does,
    and is dropped (0) if neither does.

    Args:
        len_chosen, len_rejected, limit: >= 0 in the same unit (words), tensors or numbers that broadcast;
            an answer as long as the limit keeps it, and the limit may be infinite.

    Returns:
        1, -1 or 0, int64.

    Source: Yuan et al., Following Length Constraints in Instructions, 2025; the table is derived.
    """
    len_chosen, len_rejected, limit = _lengths(len_chosen, len_rejected, limit, "len_chosen", "len_rejected")
    swapped = torch.where(len_rejected <= limit, -1, 0)
    return torch.where(len_chosen <= limit, 1, swapped)


def lift_pairs(
    instructions: Sequence[str], chosen: Sequence[str], rejected: Sequence[str], limits: Sequence[int]
) -> dict[str, list]:
    """Length-instructed pairs from preference pairs, as plain columns for a `datasets` or pandas table.

    Args:
        instructions, chosen, rejected: the pairs, as texts.
        limits: words, one for each; one between the lengths of the two answers teaches most.

    Returns:
        columns prompt, chosen, rejected, limit, chosen_words, rejected_words and rule ("keep", "swap" or
        "drop": neither answer keeps the limit), one row for each pair in its order; train on all but "drop".
    """
    columns = {"instructions": instructions, "chosen": chosen, "rejected": rejected, "limits": limits}
    for name, values in columns.items():
        if isinstance(values, str) or len(values) != len(instructions):
            raise ValueError(f"{name}: expected a list of {len(instructions)}, as instructions")
    rows = []
    for instruction, better, worse, limit in zip(*columns.values(), strict=True):
        words = count_words(better), count_words(worse)
        rule = int(lift_relabel(*words, limit))
        if rule == -1:
            better, worse, words = worse, better, words[::-1]
        rows.append((lift_prompt(instruction, limit), better, worse, limit, *words, _RULES[rule]))
    names = ("prompt", "chosen", "rejected", "limit", "chosen_words", "rejected_words", "rule")
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


_RULES = {1: "keep", -1: "swap", 0: "drop"}


def violation_rate(lengths: Tensor, limit: Tensor | float) -> Tensor:
    """Share of answers longer than their limit, a scalar; lengths and limit broadcast, at least one entry."""
    lengths, _, limit = _lengths(lengths, 0, limit, "lengths", "")
    return _mean("lengths", lengths > limit)


def length_instructed_win_rate(wins: Tensor, lengths: Tensor, limit: Tensor | float) -> Tensor:
    """Share of comparisons won against the baseline, where an answer over its limit loses, a scalar.

    Args:
        wins: in [0, 1], what the judge says of each answer against the baseline's: 1 won, 0.5 tied, 0 lost.
        lengths: as wins, >= 0, in words.
        limit: >= 0, a number or a tensor that broadcasts.

    Source: Yuan et al., Following Length Constraints in Instructions, 2025.
    """
    check_numbers("wins", wins)
    if (wins > 1).any():
        raise ValueError(f"wins: expected in [0, 1], got {wins.max().item()}")
    lengths, _, limit = _lengths(lengths, 0, limit, "lengths", "")
    _checks.check_shape("lengths", lengths, wins.shape, "as wins")
    return _mean("wins", torch.where(lengths > limit, 0, wins.double()))


def _mean(name: str, values: Tensor) -> Tensor:
    if values.numel() == 0:
        raise ValueError(f"{name}: expected at least one entry, got none")
    return values.double().mean()


def _lengths(
    first: Tensor | float, second: Tensor | float, limit: Tensor | float, *names: str
) -> tuple[Tensor, ...]:
    """Two lengths and a limit as tensors on one device, checked."""
    given = first, second, limit
    device = next((t.device for t in given if isinstance(t, Tensor)), None)
    found = [torch.as_tensor(t, device=None if isinstance(t, Tensor) else device) for t in given]
    for name, t in zip(names, found, strict=False):
        check_numbers(name, t)
    if found[2].isnan().any() or (found[2] < 0).any():
        raise ValueError(f"limit: expected >= 0, got {found[2].min().item()}")
    try:
        torch.broadcast_shapes(*(t.shape for t in found))
    except RuntimeError:
        shapes = ", ".join(str(list(t.shape)) for t in found)
        raise ValueError(f"limit: lengths and limits do not broadcast: {shapes}") from None
    return tuple(found)
