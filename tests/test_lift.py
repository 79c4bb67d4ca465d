"""LIFT's pairs: the published prompt and word count, the relabeling rules, metrics."""

import ast
import math
import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sukhops.pairs import (
    count_words,
    length_instructed_win_rate,
    lift_pairs,
    lift_prompt,
    lift_relabel,
    violation_rate,
)

# The example in AlpacaEval-LI's description (Yuan et al., 2025); the limit is the length of the answer.
LIMIT = 56
ANSWER = (
    "Superman, the iconic comic book superhero, was created by writer Jerry Siegel and artist Joe Shuster. "
    "Superman first appeared in Action Comics #1, which was published by Detective Comics, Inc. (later DC "
    "Comics) in June 1938. The character's immense popularity established him as one of the most enduring "
    "and recognizable figures in the superhero genre."
)


def test_published_example_has_56_words():
    assert len(ANSWER.split()) == 55
    assert count_words(ANSWER) == LIMIT
    assert violation_rate(torch.tensor([count_words(ANSWER)]), LIMIT) == 0


@pytest.mark.parametrize(
    "text, words",
    [
        ("", 0),
        ("  \n\t ", 0),
        ("-- ... !? '' \"\" () * & #", 0),
        ("one", 1),
        ("character's.", 2),
        ("the character's. Then", 4),
        ("the character’s. Then", 4),
        ("don't can't cannot won't", 8),
        ("I'm she'll they've we're he'd", 10),
        ("gonna wanna gotta gimme lemme", 10),
        ("dogs' bones", 2),
        ("o'clock rock'n'roll", 2),
        ("well-known and/or e.g. U.S. 3.14 1,000", 6),
        ("$5 5% #1 a@b.com", 5),
        ("one,two;three:four", 4),
        ("wait...what -- no—yes", 4),
        ("“quoted” (bracketed) [1] {2} <3>", 5),
        ("Größe naïve 東京 дом", 4),
        ("cannothing ain't", 3),
    ],
)
def test_count_words(text, words):
    assert count_words(text) == words


@given(st.text(), st.text())
def test_word_counts_of_concatenated_texts_add_up(one, two):
    assert count_words(f"{one} \n {two}") == count_words(one) + count_words(two)


def test_word_counts_agree_with_nltk():
    """On each word of the standard library's docstrings alone, which NLTK takes for the end of a sentence."""
    tokenize = pytest.importorskip("nltk.tokenize").NLTKWordTokenizer().tokenize
    chunks = {
        chunk
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-e]*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module)
        for chunk in (ast.get_docstring(node) or "").split()
    }
    differ = [
        chunk
        for chunk in chunks
        if count_words(chunk) != sum(any(c.isalnum() for c in token) for token in tokenize(chunk))
    ]
    assert len(chunks) > 5000
    assert len(differ) < 0.002 * len(chunks), differ


def test_prompt():
    question = "Who created the Superman cartoon character?"
    published = f"Answer the following instruction using 56 words or less.\n\n{question}"
    assert lift_prompt(question, LIMIT) == published


lengths = st.integers(0, 50)


@given(lengths, lengths, st.one_of(lengths, st.just(math.inf)))
def test_relabeling(chosen, rejected, limit):
    rule = lift_relabel(chosen, rejected, limit).item()
    assert (rule == -1) == (rejected <= limit < chosen)
    assert (rule == 0) == (min(chosen, rejected) > limit)
    assert (rule == 1) == (chosen <= limit)
    turned = lift_relabel(rejected, chosen, limit).item()
    if rule == -1:  # the swapped pair is kept
        assert turned == 1
    assert lift_relabel(chosen, rejected, math.inf).item() == 1


def test_relabeling_broadcasts():
    rule = lift_relabel(torch.tensor([[3], [9]]), 5, torch.tensor([2, 4, 7, 9]))
    assert rule.tolist() == [[0, 1, 1, 1], [0, 0, -1, 1]]
    assert rule.dtype == torch.int64


def test_pairs_as_columns():
    columns = lift_pairs(
        ["A?", "B?", "C?", "D?"], ["It's so.", "one two", "one two", "one"], ["so", "one", "one", "one two"],
        [3, 2, 1, 1],
    )  # fmt: skip
    assert columns["rule"] == ["keep", "keep", "swap", "keep"]
    assert columns["prompt"][2] == lift_prompt("C?", 1)
    assert (columns["chosen"][2], columns["rejected"][2]) == ("one", "one two")
    assert columns["chosen_words"] == [3, 2, 1, 1]
    assert columns["rejected_words"] == [1, 1, 2, 2]
    assert columns["limit"] == [3, 2, 1, 1]
    assert lift_pairs(["A?"], ["one two"], ["one two three"], [1])["rule"] == ["drop"]
    assert lift_pairs([], [], [], [])["prompt"] == []


def test_violation_rate():
    length = torch.tensor([3, 5, 7, 9])
    assert violation_rate(length, 5).item() == 0.5  # a length equal to the limit is no violation
    assert violation_rate(length, torch.tensor([2, 5, 8, 8])).item() == 0.5
    rates = [violation_rate(length, n).item() for n in range(12)]
    assert rates == sorted(rates, reverse=True) and rates[0] == 1 and rates[-1] == 0


def test_win_rate():
    wins = torch.tensor([1, 0.5, 1, 0])
    assert length_instructed_win_rate(wins, torch.tensor([3, 3, 9, 9]), 5).item() == 0.375
    assert length_instructed_win_rate(wins, torch.tensor([3, 3, 9, 9]), math.inf).item() == 0.625
    assert length_instructed_win_rate(torch.tensor([True, False]), torch.tensor([5, 5]), 5).item() == 0.5


def test_invalid_arguments():
    good = torch.tensor([3, 5])
    for bad in (-good, good * math.nan):
        for call in (lambda t: lift_relabel(t, good, 4), lambda t: violation_rate(t, 4)):
            with pytest.raises(ValueError, match=r"^(len_chosen|lengths): "):
                call(bad)
        with pytest.raises(ValueError, match=r"^len_rejected: "):
            lift_relabel(good, bad, 4)
        with pytest.raises(ValueError, match=r"^limit: "):
            lift_relabel(good, good, bad)
        with pytest.raises(ValueError, match=r"^wins: "):
            length_instructed_win_rate(bad, good, 4)
    with pytest.raises(ValueError, match=r"^limit: .*broadcast"):
        lift_relabel(good, good, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"^lengths: "):
        violation_rate(good[:0], 4)
    with pytest.raises(ValueError, match=r"^wins: "):
        length_instructed_win_rate(good, good, 4)
    with pytest.raises(ValueError, match=r"^lengths: "):
        length_instructed_win_rate(good / 5, good[:1], 4)
    for limit, error in ((0, ValueError), (-1, ValueError), (2.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match=r"^limit: "):
            lift_prompt("Say it.", limit)
    with pytest.raises(TypeError, match=r"^instruction: "):
        lift_prompt(3, 4)
    with pytest.raises(TypeError, match=r"^text: "):
        count_words(b"bytes")
    with pytest.raises(ValueError, match=r"^rejected: "):
        lift_pairs(["a"], ["b"], [], [1])
    with pytest.raises(ValueError, match=r"^chosen: "):
        lift_pairs(["a"], "b", ["c"], [1])
