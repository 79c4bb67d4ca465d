"""Step-KTO compared with KTO: addition written digit by digit, where a program checks each step.

A problem is `347+285=`. Its solution has one step per digit, from the last to the first, such as `7+5+0=12,`
(the third summand is the carry), and ends with the sum. A small transformer learns this from careless
demonstrations, in which some steps are wrong although the answer is right. Then the model is trained in two
rounds on its own solutions, which a program judges: with KTO, which sees only whether the answer is right,
and with Step-KTO, which also sees whether each step is right.

    python examples/step_kto.py [--seeds 0 1 2] [--quick]

Prints mean ± standard deviation over seeds and saves bench/results/example_step_kto.jsonl.
"""

import copy
import random

import torch
from common import Stages, Transformer, arguments, generate, language_model_loss, report, train
from torch import Tensor

import sukhops
from sukhops.losses import mismatched

SYMBOLS = "0123456789+=,."
DIGITS = 3
PROMPT, STEP = 2 * DIGITS + 2, 9  # characters of a problem and of one step
LENGTH = DIGITS * STEP + DIGITS + 2  # characters of a solution: the steps, the sum, a full stop
CARELESS, WRONG = 0.1, 0.2  # fractions of wrong steps and of wrong answers in the demonstrations
ROUNDS, BATCH = 2, 64


def encode(texts: list[str]) -> Tensor:
    return torch.tensor([[SYMBOLS.index(c) for c in text] for text in texts])


def solution(a: int, b: int, careless: random.Random | None = None) -> str:
    """The steps and the sum; with `careless`, some steps and sums are wrong."""
    parts, carry = [], 0
    for digit in range(DIGITS):
        x, y = a // 10**digit % 10, b // 10**digit % 10
        total = written = x + y + carry
        if careless and careless.random() < CARELESS:
            written = careless.randrange(20)
        parts.append(f"{x}+{y}+{carry}={written:02d},")
        carry = total // 10
    answer = a + b
    if careless and careless.random() < WRONG:
        answer = careless.randrange(2 * 10**DIGITS)
    return "".join(parts) + f"{answer:0{DIGITS + 1}d}."


def problems(count: int, seed: int) -> list[tuple[int, int]]:
    numbers = random.Random(seed)
    return [(numbers.randrange(10**DIGITS), numbers.randrange(10**DIGITS)) for _ in range(count)]


def prompts(pairs: list[tuple[int, int]]) -> Tensor:
    return encode([f"{a:0{DIGITS}d}+{b:0{DIGITS}d}=" for a, b in pairs])


def judge(pairs: list[tuple[int, int]], text: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the answer is right [B], and whether each step is right [B, DIGITS]."""
    right = text == encode([solution(a, b) for a, b in pairs])
    steps = right[:, : DIGITS * STEP].unflatten(1, (DIGITS, STEP)).all(-1)
    return right[:, DIGITS * STEP :].all(-1), steps


def sample(model: Transformer, pairs: list[tuple[int, int]], seed: int) -> Tensor:
    return generate(model, prompts(pairs), LENGTH, generator=torch.Generator().manual_seed(seed))


def shifted(ids: Tensor) -> Tensor:
    """The targets of each row; the problem is ignored."""
    target = ids[:, 1:].clone()
    target[:, : PROMPT - 1] = -100
    return target


def preference(model: Transformer, kind: str, steps: int, texts: int, seed: int) -> Transformer:
    """A copy of the model, trained on judgments of the model's solutions; the model is the reference."""
    pairs = problems(texts, seed)
    text = sample(model, pairs, seed)
    prompt, (right, right_steps) = prompts(pairs), judge(pairs, text)
    reference, model = model, copy.deepcopy(model)
    step_loss, loss = sukhops.nn.StepKTOLoss(beta=0.1), sukhops.nn.KTOLoss(beta=0.1)
    position = torch.arange(PROMPT + LENGTH - 1) - (PROMPT - 1)
    ids_of_steps = torch.where((position >= 0) & (position < DIGITS * STEP), position // STEP, -1)
    step_ids = ids_of_steps.expand(BATCH, -1)
    rows = torch.Generator().manual_seed(seed)

    def step(_: int) -> Tensor:
        some = torch.randint(0, texts, (BATCH,), generator=rows)
        ids = torch.cat([prompt[some], text[some]], 1)
        # for the reference point: each problem with the solution of another
        other = torch.cat([prompt[some], mismatched(text[some])], 1)
        with torch.no_grad():
            given = {
                "ref_hidden": reference.backbone(ids[:, :-1]),
                "ref_weight": reference.head.weight,
                "kl_hidden": model.backbone(other[:, :-1]),
                "kl_target": shifted(other),
                "kl_ref_hidden": reference.backbone(other[:, :-1]),
            }
        policy = model.backbone(ids[:, :-1]), model.head.weight, shifted(ids), right[some]
        if kind == "KTO":
            return loss(*policy, **given).loss
        labels = right_steps[some].long()
        return step_loss(*policy, step_ids, labels, kl_step_ids=step_ids, **given).loss

    train(model, step, steps, lr=3e-4, name=kind)
    return model


def run(seed: int, quick: bool) -> list[dict]:
    torch.manual_seed(seed)
    steps, texts = (30, 128) if quick else (1500, 2048)
    base = Transformer(len(SYMBOLS), 96, layers=2, context=PROMPT + LENGTH)
    demonstrations, careless = problems(20_000, 7 + seed), random.Random(seed)
    texts_of = encode([solution(a, b, careless) for a, b in demonstrations])
    learn = torch.cat([prompts(demonstrations), texts_of], 1)
    rows = torch.Generator().manual_seed(seed)

    def step(_: int) -> Tensor:
        return language_model_loss(base, learn[torch.randint(0, len(learn), (64,), generator=rows)])

    train(base, step, steps, lr=2e-3, name="demonstrations")
    found = []
    tests = problems(texts, 10_000 + seed)

    def measure(variant: str, model: Transformer) -> None:
        right, right_steps = judge(tests, sample(model, tests, seed))
        flawed = (right & ~right_steps.all(1)).sum() / right.sum().clamp(min=1)
        found.append({
            "variant": variant, "seed": seed, "right answers %": 100 * right.float().mean().item(),
            "right answers with a wrong step %": 100 * flawed.item(),
            "right steps %": 100 * right_steps.float().mean().item(),
        })  # fmt: skip

    measure("demonstrations", base)
    for kind in ("KTO", "Step-KTO"):
        model = base
        for number in range(1, ROUNDS + 1):
            model = preference(model, kind, steps // 10, texts, 100 * seed + number)
            measure(f"{kind}, round {number}", model)
    return found


def main() -> None:
    options = arguments(__doc__).parse_args()
    stages = Stages("step_kto", options)
    rows = []
    for seed in options.seeds:
        rows += stages(f"seed-{seed}", lambda s=seed: run(s, options.quick))
    columns = {
        "right answers %": ".1f", "right answers with a wrong step %": ".1f", "right steps %": ".1f",
    }  # fmt: skip
    report("step_kto", rows, columns, save=not options.quick, minutes=stages.end())


if __name__ == "__main__":
    main()
