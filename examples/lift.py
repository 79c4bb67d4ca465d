"""LIFT-DPO: a model that keeps the number of words it is told to keep.

An instruction is the first words of one of the standard library's docstrings, the answer is the rest. A small
transformer learns to answer, with and without a limit of words that the answer keeps. Preference pairs, the
docstring's own answer over a sample of the model's, then train it four ways: not at all, with DPO, with R-DPO
(which pays for length), and with LIFT-DPO, which adds each pair once more under a limit between the lengths
of its two answers, so that the shorter one wins. All three have the same options, among them a share of the
chosen answers' likelihood, without which DPO forgets what it was taught. Some limits are in no training text.

    python examples/lift.py [--seeds 0 1 2] [--quick]

Prints mean ± deviation over seeds and saves bench/results/example_lift.jsonl: per cent of answers to held-out
instructions that are longer than their limit, for limits seen and unseen in training; words of answers
without a limit; bits per token of the docstrings' own answers.
"""

import ast
import copy
import math
import random
import re
import sysconfig
from collections import Counter
from pathlib import Path

import torch
from common import Transformer, arguments, generate, report, train
from torch import Tensor
from tqdm import tqdm

import sukhops
from sukhops.pairs import count_words, lift_pairs, lift_prompt, violation_rate

OPENING, ANSWER, VOCABULARY = 3, 56, 4096  # tokens of an instruction, of an answer; kinds of tokens
CONTEXT = 80
WORDS = range(4, 41)  # of an answer
UNSEEN = (5, 9, 13, 17, 21, 25)  # limits in no training text
TESTED = (7, 11, 15, 19, 23, 27)
SEEN = [n for n in WORDS if n not in UNSEEN]
END = 1  # token 0 is any other word


def tokens(text: str) -> list[str]:
    return re.findall(r"\d|[^\W\d]+|[^\w\s]", text)


def docstrings() -> list[tuple[str, str]]:
    """(instruction, answer) of the standard library's docstrings, tokens parted by single spaces."""
    root, found = Path(sysconfig.get_path("stdlib")), {}
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests", "lib2to3"} & set(path.relative_to(root).parts):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                parts = tokens(ast.get_docstring(node) or "")
                answer = " ".join(parts[OPENING:])
                if count_words(answer) in WORDS and len(parts) < OPENING + ANSWER:
                    found[" ".join(parts[:OPENING]), answer] = None
    return list(found)


class Text:
    """Texts as ids, and back."""

    def __init__(self, texts: list[tuple[str, str]]):
        counts = Counter(token for pair in texts for text in pair for token in tokens(text))
        template = [*tokens(lift_prompt("", 1)), *"0123456789"]
        common = [token for token, _ in counts.most_common(VOCABULARY) if token not in template]
        self.units = ["other", "", *dict.fromkeys(template), *common][:VOCABULARY]
        self.index = {unit: i for i, unit in enumerate(self.units)}

    def ids(self, text: str) -> list[int]:
        return [self.index.get(token, 0) for token in tokens(text)]

    def answer(self, ids: list[int]) -> str:
        """Up to the end."""
        cut = ids.index(END) if END in ids else len(ids)
        return " ".join(self.units[i] for i in ids[:cut])

    def rows(self, pairs: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
        """(prompt, answer) pairs as inputs and targets [B, T], the prompts not counted."""
        texts = [(self.ids(prompt), [*self.ids(answer), END]) for prompt, answer in pairs]
        width = max(len(before) + len(after) for before, after in texts)
        ids, target = torch.full((len(pairs), width), END), torch.full((len(pairs), width), -100)
        for row, (before, after) in enumerate(texts):
            whole = torch.tensor(before + after)
            ids[row, : len(whole)] = whole
            target[row, len(before) : len(whole)] = whole[len(before) :]
        return ids[:, :-1], target[:, 1:]


def sample(model: Transformer, text: Text, prompts: list[str], seed: int) -> list[str]:
    """One answer to each prompt."""
    g, ids = torch.Generator().manual_seed(seed), [text.ids(prompt) for prompt in prompts]
    answers = [""] * len(prompts)
    for length in sorted({len(row) for row in ids}):
        alike = torch.tensor([i for i, row in enumerate(ids) if len(row) == length])
        for part in tqdm(alike.split(512), desc=f"prompts of {length} tokens"):
            prompt = torch.tensor([ids[i] for i in part])
            found = generate(model, prompt, ANSWER, generator=g, temperature=0.8)
            for i, row in zip(part, found.tolist(), strict=True):
                answers[i] = text.answer(row)
    return answers


def supervised(text: Text, learn: list[tuple[str, str]], steps: int, numbers: random.Random) -> Transformer:
    model = Transformer(len(text.units), 128, context=CONTEXT)

    def step(_: int) -> Tensor:
        batch = numbers.sample(learn, 32)
        for i, (instruction, answer) in enumerate(batch[:16]):
            kept = [n for n in SEEN if n >= count_words(answer)]
            if kept:
                batch[i] = lift_prompt(instruction, numbers.choice(kept)), answer
        ids, target = text.rows(batch)
        logp = sukhops.linear_logp(model.backbone(ids), model.head.weight, target)
        return -logp.sum() / (target != -100).sum()

    train(model, step, steps, name="supervised")
    return model


def preference(
    reference: Transformer, text: Text, pairs: list[tuple[str, str, str]], steps: int, name: str,
    numbers: random.Random, **options: float,
) -> Transformer:  # fmt: skip
    """A copy of the model after DPO on (prompt, chosen, rejected)."""
    model = copy.deepcopy(reference)
    loss = sukhops.nn.DPOLoss(beta=0.1, nll_weight=1.0, **options)

    def step(_: int) -> Tensor:
        batch = numbers.sample(pairs, 24)
        ids, target = text.rows([(p, c) for p, c, _ in batch] + [(p, r) for p, _, r in batch])
        with torch.no_grad():
            before = {"ref_hidden": reference.backbone(ids), "ref_weight": reference.head.weight}
        return loss(model.backbone(ids), model.head.weight, target, **before).loss

    train(model, step, steps, lr=2e-4, name=name)
    return model


def lifted(pairs: list[tuple[str, str, str]], numbers: random.Random) -> list[tuple[str, str, str]]:
    """The pairs, and each again under a limit that one of its two answers breaks."""
    limits = []
    for _, *answers in pairs:
        short, long = sorted(map(count_words, answers))
        limits.append([n for n in SEEN if short <= n < long])
    some = [i for i, n in enumerate(limits) if n]
    instructions, chosen, rejected = ([pairs[i][part] for i in some] for part in range(3))
    table = lift_pairs(instructions, chosen, rejected, [numbers.choice(limits[i]) for i in some])
    return pairs + list(zip(table["prompt"], table["chosen"], table["rejected"], strict=True))


@torch.no_grad()
def measure(model: Transformer, text: Text, tests: list[tuple[str, str]], seed: int) -> dict:
    limits = torch.tensor([*TESTED, *UNSEEN])
    limited = [lift_prompt(instruction, n) for n in limits.tolist() for instruction, _ in tests]
    lengths = torch.tensor([count_words(answer) for answer in sample(model, text, limited, seed)])
    lengths = lengths.view(len(limits), len(tests))

    def violations(rows: slice) -> float:
        return 100 * violation_rate(lengths[rows], limits[rows].unsqueeze(1)).item()

    free = sample(model, text, [instruction for instruction, _ in tests], seed)
    ids, target = text.rows(tests)
    logp = sukhops.linear_logp(model.backbone(ids), model.head.weight, target)
    return {
        "violations %, limits seen": violations(slice(len(TESTED))),
        "violations %, limits unseen": violations(slice(len(TESTED), None)),
        "words without a limit": sum(map(count_words, free)) / len(free),
        "bits per token": -(logp.sum() / (target != -100).sum()).item() / math.log(2),
    }


def run(seed: int, quick: bool) -> list[dict]:
    torch.manual_seed(seed)
    numbers = random.Random(seed)
    texts = docstrings()
    random.Random(7).shuffle(texts)
    tests, learn = texts[:128], texts[128:]
    steps, count = (20, 100) if quick else (500, 1500)
    tests = tests[:20] if quick else tests
    text = Text(learn)
    base = supervised(text, learn, steps, numbers)
    own = numbers.sample(learn, count)
    answers = sample(base, text, [instruction for instruction, _ in own], seed)
    pairs = [(i, better, worse) for (i, better), worse in zip(own, answers, strict=True) if better != worse]
    rows = [{"variant": "supervised", "seed": seed, **measure(base, text, tests, seed)}]
    for name, data, options in (
        ("DPO", pairs, {}),
        ("R-DPO", pairs, {"length_alpha": 0.05}),
        ("LIFT-DPO", lifted(pairs, numbers), {}),
    ):
        model = preference(base, text, data, steps // 4, name, numbers, **options)
        rows.append({"variant": name, "seed": seed, **measure(model, text, tests, seed)})
    return rows


def main() -> None:
    options = arguments(__doc__).parse_args()
    rows = [row for seed in options.seeds for row in run(seed, options.quick)]
    columns = {
        "violations %, limits seen": ".1f", "violations %, limits unseen": ".1f",
        "words without a limit": ".1f", "bits per token": ".3f",
    }  # fmt: skip
    report("lift", rows, columns, save=not options.quick)


if __name__ == "__main__":
    main()
