"""Director and CRINGE against repetition: a pretrained model that repeats itself when it decodes greedily.

The model continues texts of Django's manual. In its own continuations each token that completes a 4-gram
which the text had before is undesirable. Director learns a classifier of that beside the head. CRINGE trains
LoRA adapters against it and on as much of the manual, twice. Compared on prompts of other pages with the
plain model, with adapters trained on the manual alone, with the best of three samples by the classifier of
Director, and with settings of `generate` against repetition.

    python examples/repetition.py [--model NAME] [--seeds 0 1 2] [--quick]

Prints mean ± deviation over seeds and saves bench/results/example_repetition.jsonl. Perplexity is that of
the manual's own continuations of the prompts, under the distribution that is decoded from.
"""

import argparse
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from common import Stages, held_out, repeats, report, train, windows
from pretrained import arguments, continuations, fit, learned, load, manual, perplexity, with_adapters
from torch import Tensor, nn

import sukhops
from sukhops.integrations.transformers import add_director_head

PROMPT, LENGTH, N = 32, 64, 4
CANDIDATES, TEMPERATURE = 3, 0.7
GAMMAS = (1.0, 2.0, 4.0)


class Task(NamedTuple):
    name: str | None  # of the model
    learn: Tensor  # [N], ids of the manual
    prompts: Tensor  # [P, PROMPT], of other pages
    tests: Tensor  # [P, PROMPT + LENGTH], the same prompts with the manual's own continuations
    texts: int  # of the model's own that CRINGE learns from, and as many plain ones
    first_seed: int  # the one of the samples


def task(options: argparse.Namespace) -> Task:
    learn, test = manual(load(options.model)[1])
    texts, prompts = (8, 4) if options.quick else (64, 200)
    tests = held_out(test, PROMPT + LENGTH, prompts)
    return Task(options.model, learn, tests[:, :PROMPT], tests, texts, options.seeds[0])


def repeated(prompts: Tensor, text: Tensor) -> Tensor:
    """Which tokens of the continuations [B, LENGTH] complete an n-gram that the text had before."""
    return repeats(torch.cat([prompts, text], 1), N)[:, PROMPT:]


def rate(prompts: Tensor, text: Tensor) -> float:
    """Per cent of repeated tokens."""
    return 100 * repeated(prompts, text).double().mean().item()


def rows_to_learn(task: Task, seed: int, model: nn.Module | None) -> list[dict]:
    """Texts of the manual and as many of the model's own, whose repeated tokens alone count, with label 0.

    Without a model all texts are the manual's.
    """
    batches = windows(task.learn, PROMPT + LENGTH, task.texts, seed)
    plain, prompts = next(batches), next(batches)
    found = torch.cat([plain, prompts]) if model is None else plain
    rows = [{"input_ids": row, "labels": row, "label": -1} for row in found.tolist()]
    if model is not None:
        prompts = prompts[:, :PROMPT]
        text = continuations(model, prompts, LENGTH)
        negative = torch.cat([torch.zeros_like(prompts).bool(), repeated(prompts, text)], 1)
        ids = torch.cat([prompts, text], 1)[negative.any(1)]
        labels = ids.masked_fill(~negative[negative.any(1)], -100)
        rows += [
            {"input_ids": i, "labels": y, "label": 0}
            for i, y in zip(ids.tolist(), labels.tolist(), strict=True)
        ]
    return rows


def director(task: Task, seed: int, stages: Stages) -> transformers.PreTrainedModel:
    """The model with Director's head. The language model is frozen, so its hidden states are computed once.

    The classifier's weight is lm_weight @ M with a learned M [D, D]: what it learns of a token holds for
    tokens like it, also for those that the few texts to learn from do not have.
    """
    model, _ = load(task.name)
    head = add_director_head(model)

    @torch.no_grad()
    def prepare() -> tuple[Tensor, Tensor, Tensor]:
        prompts = next(windows(task.learn, PROMPT, 4 * task.texts, seed))  # its classifier learns fast
        text = continuations(load(task.name)[0], prompts, LENGTH)
        parts = torch.cat([prompts, text], 1)[:, :-1].split(16)
        hidden = [model.base_model(part).last_hidden_state[:, PROMPT - 1 :] for part in parts]
        return torch.cat(hidden), text, (~repeated(prompts, text)).long()

    hidden, text, label = stages(f"texts-{seed}", prepare)

    def learn() -> dict:
        torch.manual_seed(seed)
        mix = nn.Linear(hidden.shape[-1], hidden.shape[-1], bias=False)
        nn.init.zeros_(mix.weight)
        loss = sukhops.nn.DirectorLoss(gamma=1.0)
        lm_weight = head.weight.detach()

        def step(_: int) -> Tensor:
            some = torch.randint(0, len(text), (64,))
            weight = mix(lm_weight)
            return loss(hidden[some], lm_weight, weight, text[some], label[some]).loss

        train(mix, step, 60, lr=1e-3, name="Director")
        return {"cls_weight": mix(lm_weight).detach(), "cls_bias": torch.zeros_like(head.cls_bias)}

    head.load_state_dict(stages(f"director-{seed}", learn), strict=False)
    return model


def adapters(
    task: Task, seed: int, stages: Stages, name: str, before: dict | None = None, own: bool = True
) -> dict:
    """LoRA after one more iteration: on the manual, and on the model's own texts unless `own` is False."""

    def train() -> dict:
        adapted = with_adapters(load(task.name)[0], seed, before)
        rows = rows_to_learn(task, seed + (0 if before is None else 100), adapted if own else None)
        fit(adapted, sukhops.nn.CringeLoss(alpha=1.0, k=5), rows, stages.folder, seed, 5e-4)
        return learned(adapted)

    return stages(f"{name}-{seed}", train)


@torch.no_grad()
def desirable(model: transformers.PreTrainedModel, prompts: Tensor, text: Tensor) -> Tensor:
    """Mean log-probability of Director's classifier over the tokens of each continuation: [B]."""
    head, ids = model.lm_head, torch.cat([prompts, text], 1)
    hidden = model.base_model(ids[:, :-1]).last_hidden_state[:, PROMPT - 1 :]
    logit = (hidden * head.cls_weight[text]).sum(-1) + head.cls_bias[text]
    return F.logsigmoid(logit).mean(1)


def best_of(plain: nn.Module, gated: nn.Module, prompts: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """All samples [CANDIDATES * P, LENGTH] of the plain model, and the best one of each prompt."""
    torch.manual_seed(seed)
    many = prompts.repeat(CANDIDATES, 1)
    text = continuations(plain, many, LENGTH, do_sample=True, temperature=TEMPERATURE, top_k=0)
    scores = torch.cat([desirable(gated, p, t) for p, t in zip(many.split(50), text.split(50), strict=True)])
    best = scores.unflatten(0, (CANDIDATES, -1)).argmax(0)
    return text, text.unflatten(0, (CANDIDATES, -1))[best, torch.arange(len(prompts))]


def measure(task: Task, model: nn.Module, process: Callable | None = None, **options) -> dict:
    began = time.perf_counter()
    text = continuations(model, task.prompts, LENGTH, **options)
    speed = text.numel() / (time.perf_counter() - began)
    found = {"repeats %": rate(task.prompts, text), "tokens/s": speed}
    expected = perplexity(model, task.tests, PROMPT, process)
    return found | ({"perplexity": expected} if math.isfinite(expected) else {})


def run_without_seed(task: Task, stages: Stages) -> list[dict]:
    """What no training changes: the manual, the plain model, and the settings of generate."""
    model, _ = load(task.name)
    settings = {
        "plain": (None, {}),
        "plain, repetition_penalty 1.1": (
            transformers.RepetitionPenaltyLogitsProcessor(1.1), {"repetition_penalty": 1.1},
        ),
        f"plain, no_repeat_ngram_size {N}": (
            transformers.NoRepeatNGramLogitsProcessor(N), {"no_repeat_ngram_size": N},
        ),
    }  # fmt: skip
    rows = [{"variant": "the manual", "repeats %": rate(task.prompts, task.tests[:, PROMPT:])}]
    for i, (variant, (process, given)) in enumerate(settings.items()):
        found = stages(f"settings-{i}", lambda p=process, g=given: measure(task, model, p, **g))
        rows.append({"variant": variant, **found})
    return rows


def run(task: Task, seed: int, stages: Stages) -> list[dict]:
    rows = []
    gated = director(task, seed, stages)

    def measure_gated(gamma: float) -> dict:
        gated.lm_head.gamma = gamma
        return measure(task, gated)

    for gamma in GAMMAS:
        found = stages(f"gamma-{gamma:g}-{seed}", lambda g=gamma: measure_gated(g))
        rows.append({"variant": f"Director, gamma {gamma:g}", **found})

    def sample() -> list[dict]:
        plain, _ = load(task.name)
        every, best = best_of(plain, gated, task.prompts, seed)
        return [
            {"repeats %": rate(task.prompts.repeat(CANDIDATES, 1), every)},
            {"repeats %": rate(task.prompts, best)},
        ]

    if seed == task.first_seed:  # samples take long
        names = (f"plain, samples at temperature {TEMPERATURE}", f"best of {CANDIDATES} samples")
        rows += [{"variant": v, **found} for v, found in zip(names, stages("samples", sample), strict=True)]
    first = adapters(task, seed, stages, "cringe-1")
    for variant, state in (
        ("LoRA on the manual alone", adapters(task, seed, stages, "manual", own=False)),
        ("CRINGE, iteration 1", first),
        ("CRINGE, iteration 2", adapters(task, seed, stages, "cringe-2", first)),
    ):
        found = stages(f"{variant}-{seed}", lambda s=state: measure_adapted(task, seed, s))
        rows.append({"variant": variant, **found})
    return [row | {"seed": seed} for row in rows]


def measure_adapted(task: Task, seed: int, state: dict) -> dict:
    return measure(task, with_adapters(load(task.name)[0], seed, state).merge_and_unload())


def main() -> None:
    options = arguments(__doc__).parse_args()
    stages, work = Stages("repetition", options), task(options)
    rows = run_without_seed(work, stages)
    for seed in options.seeds:
        rows += run(work, seed, stages)
    columns = {"repeats %": ".1f", "perplexity": ".1f", "tokens/s": ",.0f"}
    report(
        "repetition", rows, columns, plot=("repeats %", "perplexity"), save=not options.quick,
        minutes=stages.end(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
