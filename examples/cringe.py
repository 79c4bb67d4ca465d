"""CRINGE against repetition: a small transformer on the source of Python's standard library.

Left alone, a small model repeats itself. In its own text every token that completes an n-gram which occurred
before in the same text is a negative; the other generated tokens do not count. CRINGE trains on that beside
plain text, then again on the text of the model it has made. Compared with the model trained as long on plain
text alone.

    python examples/cringe.py [--seeds 0 1 2] [--quick]

Prints mean ± deviation over seeds and saves bench/results/example_cringe.jsonl.
"""

import copy

import torch
from common import arguments, bits_per_token, language_model_loss, repeats, report, train, windows
from repetition import LENGTH, PROMPT, N, Transformer, rate, sample, task
from torch import Tensor

import sukhops


def cringe(model: Transformer, plain: Tensor, steps: int, texts: int, seed: int) -> Transformer:
    """A copy of the model after one round on plain windows and on the repetitions in its own text."""
    prompts = next(windows(plain, PROMPT, texts, seed + 1))
    text = sample(model, prompts, seed)
    ids = torch.cat([prompts, text], 1)
    negative = torch.cat([torch.zeros_like(prompts, dtype=torch.bool), repeats(text, N)], 1)
    model = copy.deepcopy(model)
    loss = sukhops.nn.CringeLoss(alpha=1.0, k=5)
    batches = windows(plain, PROMPT + LENGTH, 16, seed)
    generator = torch.Generator().manual_seed(seed)

    def step(_: int) -> Tensor:
        some = torch.randint(0, texts, (16,), generator=generator)
        both = torch.cat([next(batches), ids[some]])
        label = torch.full(both.shape, -1)
        label[16:] = torch.where(negative[some], 0, -1)
        target = both.clone()
        target[16:].masked_fill_(~negative[some], -100)
        hidden = model.backbone(both[:, :-1])
        return loss(hidden, model.head.weight, target[:, 1:], label[:, 1:], generator=generator).loss

    train(model, step, steps, lr=1e-3, name="CRINGE")
    return model


def run(seed: int, quick: bool) -> list[dict]:
    base, learn, batches, prompts, tests, steps, texts = task(seed, quick)
    rows = [{"variant": "held-out text", "repeats %": rate(tests[:, PROMPT:])}]

    def measure(variant: str, model: Transformer) -> None:
        rows.append({
            "variant": variant, "repeats %": rate(sample(model, prompts, seed)),
            "bits per token": bits_per_token(model, tests),
        })  # fmt: skip

    measure("plain", base)
    more, trained = copy.deepcopy(base), base
    for part in (1, 2):
        train(more, lambda _: language_model_loss(more, next(batches)), steps // 2, lr=1e-3, name="plain")
        measure(f"plain, trained on, {part}", more)
        trained = cringe(trained, learn, steps // 2, 2 * texts, seed + part)
        measure(f"CRINGE, iteration {part}", trained)
    return [row | {"seed": seed} for row in rows]


def main() -> None:
    options = arguments(__doc__).parse_args()
    rows = [row for seed in options.seeds for row in run(seed, options.quick)]
    report("cringe", rows, {"repeats %": ".1f", "bits per token": ".3f"}, save=not options.quick)


if __name__ == "__main__":
    main()
