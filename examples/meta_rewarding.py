"""Meta-Rewarding: a model judges its own answers and also learns to judge better.

A response reverses the five digits of its prompt, then may add chatter (`!`) before the full stop; its true
quality depends only on the digits. A judgment writes the correct digits, marks each digit of the answer with
`+` or `-`, and gives a score. A small transformer learns both from careless programs; one in six of their
marks is wrong, and their scores reward chatter. Then, in two rounds, the model answers prompts, judges its
answers, and is trained with DPO on pairs from `sukhops.pairs`: pairs of answers (with or without length
control) and, with the meta-judge, pairs of judgments. The meta-judge is a program that sees, with noise,
which of two judgments has fewer wrong marks, and is biased toward the first one.

    python examples/meta_rewarding.py [--seeds 0 1 2] [--quick]

Prints mean ± standard deviation over seeds and saves bench/results/example_meta_rewarding.jsonl: the
percentage of right digits and the number of characters in answers to held-out prompts; the percentage of
right marks in judgments of these answers; the percentage of judge pairs whose chosen judgment has fewer wrong
marks than the rejected one, with position weights and with plain counts of wins.
"""

import copy
import random

import torch
from common import Stages, Transformer, arguments, generate, report, train
from torch import Tensor

import sukhops
from sukhops.pairs import battle_matrix, judge_pairs, length_controlled_pairs, select_judged_response

SYMBOLS = "0123456789=!.#?+-"  # `#` pads an answer, `?` asks for a judgment
DIGITS, CHATTER = 5, 8
PROMPT, ANSWER = DIGITS + 1, DIGITS + CHATTER + 1
JUDGMENT = 2 * DIGITS + 1  # the correct digits, each with a mark; the score
MARKS = slice(1, 2 * DIGITS, 2)
LENGTH = PROMPT + ANSWER + 1 + JUDGMENT
CARELESS, MISJUDGED = 0.25, 1 / 6  # fractions of wrong digits and wrong marks in the demonstrations
BIAS, UNREADABLE = 2.0, 0.5  # meta-judge: bias to the first judgment in nats; fraction of unreadable results
RESPONSES, JUDGMENTS, RHO = 6, 5, 0.4
END, FILL, YES, NO = (SYMBOLS.index(c) for c in ".#+-")


def encode(texts: list[str]) -> Tensor:
    return torch.tensor([[SYMBOLS.index(c) for c in text] for text in texts])


def prompts(count: int, seed: int) -> Tensor:
    numbers = random.Random(seed)
    return encode(["".join(numbers.choices("0123456789", k=DIGITS)) + "=" for _ in range(count)])


def right(prompt: Tensor, answer: Tensor) -> Tensor:
    """Mask [B, DIGITS] of the right digits of the answers [B, ANSWER]."""
    return answer[:, :DIGITS] == prompt[:, :DIGITS].flip(1)


def lengths(answer: Tensor) -> Tensor:
    """Number of characters up to the full stop."""
    ended = (answer == END).int().cumsum(1) > 0
    return (~ended).sum(1) + 1


def demonstrations(count: int, seed: int) -> Tensor:
    """[count, LENGTH] prompts with careless answers and careless judgments."""
    numbers, prompt = random.Random(seed), prompts(count, seed)
    answers = []
    for row in prompt[:, :DIGITS].flip(1).tolist():
        digits = [numbers.randrange(10) if numbers.random() < CARELESS else d for d in row]
        chatter = min(CHATTER, int(numbers.expovariate(0.5)))
        answers.append(("".join(map(str, digits)) + "!" * chatter + ".").ljust(ANSWER, "#"))
    answer = encode(answers)
    judgments = []
    for row, length, marks in zip(prompt.tolist(), lengths(answer), right(prompt, answer), strict=True):
        seen = [bool(mark) != (numbers.random() < MISJUDGED) for mark in marks]
        text = "".join(f"{row[DIGITS - 1 - i]}{'+' if mark else '-'}" for i, mark in enumerate(seen))
        score = sum(seen) + round((length.item() - DIGITS - 1) / 4)  # the score rewards chatter
        judgments.append(f"?{text}{score}")
    return torch.cat([prompt, answer, encode(judgments)], 1)


def targets(ids: Tensor, first: int) -> Tensor:
    """Targets of each row from position `first` on; only the first `#` of the padding is a target."""
    target = ids[:, 1:].clone()
    target[(ids[:, 1:] == FILL) & (ids[:, :-1] == FILL)] = -100
    target[:, : first - 1] = -100
    return target


def answer(model: Transformer, prompt: Tensor, g: torch.Generator) -> Tensor:
    return torch.cat([generate(model, part, ANSWER, generator=g) for part in prompt.split(4096)])


def judge(model: Transformer, prompt: Tensor, answers: Tensor, g: torch.Generator) -> Tensor:
    """One judgment [B, JUDGMENT] of each answer."""
    ask = torch.cat([prompt, answers, encode(["?"]).expand(len(prompt), 1)], 1)
    return torch.cat([generate(model, part, JUDGMENT, generator=g) for part in ask.split(4096)])


def score(judgments: Tensor) -> Tensor:
    """Scores of judgments [..., JUDGMENT]; NaN if a judgment cannot be parsed."""
    marks = judgments[..., MARKS]
    read = (judgments[..., -1] < 10) & ((marks == YES) | (marks == NO)).all(-1)
    return judgments[..., -1].float().masked_fill(~read, torch.nan)


def wrong_marks(judgments: Tensor, truth: Tensor) -> Tensor:
    """Number of wrong marks of judgments [..., JUDGMENT], given the true marks [..., DIGITS]."""
    return (judgments[..., MARKS] != torch.where(truth, YES, NO)).sum(-1)


def meta_judge(wrong: Tensor, g: torch.Generator) -> Tensor:
    """Results [P, J, J] of battles between judgments, given their numbers of wrong marks [P, J]."""
    first = torch.sigmoid(1.5 * (wrong.unsqueeze(1) - wrong.unsqueeze(2)) + BIAS)
    results = torch.where(torch.rand(first.shape, generator=g) < first, 1, -1)
    return results.masked_fill_(torch.rand(first.shape, generator=g) < UNREADABLE, 0)


def iterate(
    reference: Transformer, name: str, count: int, steps: int, seed: int, rho: float, meta: bool
) -> tuple[Transformer, dict]:
    """The model after one round of training on its own pairs, and the percentages of right judge pairs."""
    g = torch.Generator().manual_seed(seed)
    prompt = prompts(count, seed)
    many = prompt.repeat_interleave(RESPONSES, 0)
    answers = answer(reference, many, g)
    judged = judge(reference, *(t.repeat_interleave(JUDGMENTS, 0) for t in (many, answers)), g)
    judged = judged.view(count, RESPONSES, JUDGMENTS, JUDGMENT)
    scores, each = score(judged), answers.view(count, RESPONSES, ANSWER)
    pairs = length_controlled_pairs(scores.nanmean(-1), lengths(answers).view(count, RESPONSES), rho)
    row = torch.arange(count)
    data = [(torch.cat([prompt, each[row, i]], 1)[pairs.keep]) for i in pairs[:2]]
    found, first = {}, [PROMPT]
    sets = [data]
    if meta:
        one = select_judged_response(scores).clamp(min=0)
        chosen_answer, judgments = each[row, one], judged[row, one]  # [P, ANSWER], [P, J, JUDGMENT]
        wrong = wrong_marks(judgments, right(prompt, chosen_answer).unsqueeze(1)).float()
        results = meta_judge(wrong, g)
        counted = ((results == 1) + (results == -1).mT) * (1.0 - torch.eye(JUDGMENTS))
        for kind, battles in (("counted", counted), ("weighted", battle_matrix(results)[0])):
            pairs = judge_pairs(battles)
            gap = (wrong[row, pairs.rejected] - wrong[row, pairs.chosen])[pairs.keep]
            found[f"judge pairs right %, {kind}"] = 100 * ((gap > 0).sum() / (gap != 0).sum()).item()
        ask = torch.cat([prompt, chosen_answer, encode(["?"]).expand(count, 1)], 1)
        sets.append([torch.cat([ask, judgments[row, i]], 1)[pairs.keep] for i in pairs[:2]])
        first.append(PROMPT + ANSWER + 1)
    model, loss = copy.deepcopy(reference), sukhops.nn.DPOLoss(beta=0.1, nll_weight=0.2)

    def step(_: int) -> Tensor:
        total = torch.zeros(())
        for (better, worse), start in zip(sets, first, strict=True):
            some = torch.randint(0, len(better), (64,), generator=g)
            ids = torch.cat([better[some], worse[some]])
            with torch.no_grad():
                before = {"ref_hidden": reference.backbone(ids[:, :-1]), "ref_weight": reference.head.weight}
            hidden = model.backbone(ids[:, :-1])
            total = total + loss(hidden, model.head.weight, targets(ids, start), **before).loss
        return total

    train(model, step, steps, lr=1e-4, name=name)
    return model, found


def measure(model: Transformer, count: int, seed: int) -> dict:
    g, prompt = torch.Generator().manual_seed(seed), prompts(count, 10_000 + seed)
    answers = answer(model, prompt, g)
    truth = right(prompt, answers)
    wrong = wrong_marks(judge(model, prompt, answers, g), truth)
    return {
        "right digits %": 100 * truth.float().mean().item(),
        "characters": lengths(answers).float().mean().item(),
        "right marks %": 100 * (1 - wrong.float().mean().item() / DIGITS),
    }


def run(seed: int, quick: bool) -> list[dict]:
    torch.manual_seed(seed)
    steps, count = (30, 64) if quick else (1500, 384)
    base = Transformer(len(SYMBOLS), 96, layers=2, context=LENGTH)
    learn, rows = demonstrations(20_000, seed), torch.Generator().manual_seed(seed)

    def step(_: int) -> Tensor:
        ids = learn[torch.randint(0, len(learn), (64,), generator=rows)]
        target = targets(ids, PROMPT)
        logp = sukhops.linear_logp(base.backbone(ids[:, :-1]), base.head.weight, target)
        return -logp.sum() / (target != -100).sum()

    train(base, step, steps, name="demonstrations")
    found = [{"variant": "demonstrations", "seed": seed, **measure(base, 4 * count, seed)}]
    for control, rho in (("length control", RHO), ("no length control", 0.0)):
        for judging, meta in (("meta-judge", True), ("no meta-judge", False)):
            model = base
            for number in (1, 2):
                name = f"{control}, {judging}, {number}"
                model, pairs = iterate(model, name, count, steps // 15, 100 * seed + number, rho, meta)
                found.append({"variant": name, "seed": seed, **measure(model, 4 * count, seed), **pairs})
    return found


def main() -> None:
    options = arguments(__doc__).parse_args()
    stages = Stages("meta_rewarding", options)
    rows = []
    for seed in options.seeds:
        rows += stages(f"seed-{seed}", lambda s=seed: run(s, options.quick))
    columns = {
        "right digits %": ".1f", "characters": ".1f", "right marks %": ".1f",
        "judge pairs right %, weighted": ".1f", "judge pairs right %, counted": ".1f",
    }  # fmt: skip
    report("meta_rewarding", rows, columns, save=not options.quick, minutes=stages.end())


if __name__ == "__main__":
    main()
