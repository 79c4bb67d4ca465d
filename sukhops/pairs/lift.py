"""LIFT's pairs: instructions with a word limit, and the answer that wins under the limit."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from sukhops import _checks
from sukhops.pairs._pairs import check_numbers

# Words as in treebanks: contractions are split (do|n't, she|'ll, can|not); hyphens, slashes and periods
# inside a word, and commas inside a number, do not split it. This follows NLTK's tokenizer. NLTK needs
# downloaded data to find the ends of sentences; without the data it takes "character's." inside a text as
# one word.
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
    """Number of words in a text: treebank tokens with a letter or a digit ("the character's." has 3).

    Raises:
        TypeError: text is not a str.

    Source: Yuan et al., Following Length Constraints in Instructions, 2025. They count words; that these are
    treebank tokens without punctuation is inferred from an example in the paper.
    """
    if not isinstance(text, str):
        raise TypeError(f"text: expected a str, got {type(text).__name__}")
    return sum(1 for token in _TOKEN.findall(text) if _WORD.search(token))


def lift_prompt(instruction: str, limit: int) -> str:
    """Puts a sentence with the word limit of the answer (an int > 0) before the instruction.

    Raises:
        TypeError, ValueError: instruction is not a str; limit is not an int > 0.

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
    """Keeps, swaps or drops a preference pair under a length limit.

    The pair is kept (1) if the chosen answer is within the limit, swapped (-1) if only the rejected answer
    is, and dropped (0) if neither is.

    Args:
        len_chosen, len_rejected, limit: >= 0 in the same unit (words), tensors or numbers that broadcast. An
            answer as long as the limit is within it. The limit may be infinite.

    Returns:
        1, -1 or 0 for each pair, int64, in the broadcast shape.

    Raises:
        TypeError, ValueError: a length or a limit is negative or NaN; shapes do not broadcast.

    Source: derived from Yuan et al., Following Length Constraints in Instructions, 2025.
    """
    len_chosen, len_rejected, limit = _lengths(len_chosen, len_rejected, limit, "len_chosen", "len_rejected")
    swapped = torch.where(len_rejected <= limit, -1, 0)
    return torch.where(len_chosen <= limit, 1, swapped)


def lift_pairs(
    instructions: Sequence[str], chosen: Sequence[str], rejected: Sequence[str], limits: Sequence[int]
) -> dict[str, list]:
    """Turns preference pairs into length-instructed pairs, as columns for a `datasets` or pandas table.

    Args:
        instructions, chosen, rejected: the preference pairs, lists of texts.
        limits: word limit of each pair. Limits between the lengths of the two answers are the most useful.

    Returns:
        Columns prompt, chosen, rejected, limit, chosen_words, rejected_words and rule ("keep", "swap", or
        "drop" if neither answer is within the limit), one row per pair in the same order. Train on the rows
        whose rule is not "drop".

    Raises:
        TypeError, ValueError: the lists differ in length; a text is not a str; a limit is not an int > 0.
    """
    columns = {"instructions": instructions, "chosen": chosen, "rejected": rejected, "limits": limits}
    for name, values in columns.items():
        if isinstance(values, str) or len(values) != len(instructions):
            got = f"{type(values).__name__} of length {len(values)}"
            raise ValueError(f"{name}: expected a list of {len(instructions)}, like instructions, got {got}")
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
    """Share of answers that are longer than their limit: a float64 scalar.

    Args:
        lengths: [...], >= 0, at least one, in the same unit as limit (words).
        limit: >= 0, a number or a tensor that broadcasts.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    lengths, _, limit = _lengths(lengths, 0, limit, "lengths", "")
    return _mean("lengths", lengths > limit)


def length_instructed_win_rate(wins: Tensor, lengths: Tensor, limit: Tensor | float) -> Tensor:
    """Share of comparisons won against a baseline, if an answer over its limit loses: a float64 scalar.

    Args:
        wins: [...], in [0, 1], the judge's verdict on each answer against the baseline's: 1 won, 0.5 tied, 0
            lost.
        lengths: shaped as wins, >= 0, in words.
        limit: >= 0, a number or a tensor that broadcasts.

    Raises:
        TypeError, ValueError: an argument is not as above.

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
    """Checks two lengths and a limit, and returns them as tensors on one device."""
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
        raise ValueError(f"limit: expected lengths and limits that broadcast, got shapes {shapes}") from None
    return tuple(found)
