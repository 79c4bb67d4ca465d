"""The README's table of papers: one claim per paper, and the effect measured in the recorded example."""

import statistics
from collections.abc import Callable
from typing import NamedTuple

from tables import markdown


class Effect(NamedTuple):
    paper: str
    claim: str
    example: str  # bench/results/example_<name>.jsonl
    before: str  # variant before the effect
    after: str  # variant after it
    fields: dict[str, str]  # column of the example: its name in the README
    section: str  # anchor in docs/examples.md


EFFECTS = [
    Effect(
        "Adaptive spans, 2019", "a span per head loses less than one window for all", "adaptive_span",
        "one window, keys of 0.0001", "spans, penalty 0.0001",
        {"keys per query": "keys per query", "bits per token": "bits per token"}, "adaptive-spans",
    ),
    Effect(
        "Hybrid language models, 2019", "units help a character model in equal time", "hybrid_lm",
        "characters, in the time of a hybrid", "hybrid",
        {"bits per character": "bits per character", "parameters": "parameters"}, "hybrid-language-model",
    ),
    Effect(
        "Director, 2022", "fewer repetitions by a classifier at decoding", "repetition", "plain",
        "Director, gamma 2", {"repeats %": "repeated tokens, %", "perplexity": "perplexity"},
        "director-and-cringe-repetition",
    ),
    Effect(
        "CRINGE, 2023", "fewer repetitions than by training on text alone", "repetition",
        "LoRA on the manual alone", "CRINGE, iteration 2",
        {"repeats %": "repeated tokens, %", "perplexity": "perplexity"}, "director-and-cringe-repetition",
    ),
    Effect(
        "Step-KTO, 2025", "labels of steps make right answers right all the way", "step_kto", "KTO, round 2",
        "Step-KTO, round 2", {"right answers with a wrong step %": "right answers with a wrong step, %"},
        "step-kto",
    ),
    Effect(
        "LIFT-DPO, 2025", "the model keeps word limits", "lift", "the model as it is", "LIFT-DPO",
        {"violations %, limits unseen": "answers over a limit, %"}, "lift-dpo-word-limits",
    ),
    Effect(
        "Meta-Rewarding, 2025", "a meta-judge makes the model a better judge", "meta_rewarding",
        "length control, no meta-judge, 2", "length control, meta-judge, 2",
        {"right marks %": "right marks, %", "characters": "characters of an answer"}, "meta-rewarding",
    ),
]  # fmt: skip


def table(rows: Callable[[str], list[dict]]) -> str:
    """One line per effect; `rows(name)` returns the rows of bench/results/<name>.jsonl."""
    body = []
    for effect in EFFECTS:
        found = rows(f"example_{effect.example}")
        link = f"[{effect.paper}](docs/examples.md#{effect.section})"
        body.append([link, effect.claim, _measured(effect, found) if found else "not recorded yet"])
    return markdown(["paper", "claim", "measured: before → after"], body)


def _measured(effect: Effect, found: list[dict]) -> str:
    parts = []
    for field, name in effect.fields.items():
        form = found[0]["columns"][field]
        sides = []
        for variant in (effect.before, effect.after):
            values = [r[field] for r in found[1:] if r["variant"] == variant]
            spread = f" ± {statistics.stdev(values):{form}}" if len(set(values)) > 1 else ""
            sides.append(f"{statistics.mean(values):{form}}{spread}")
        parts.append(f"{name}: {' → '.join(sides)}")
    return "; ".join(parts)
