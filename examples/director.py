"""Director against repetition: a small transformer on the source of Python's standard library.

Left alone, a small model repeats itself. Its own text is labelled: a token that completes an n-gram which
occurred before in the same text is undesirable, every other token desirable. Director trains a classifier
head beside the language model's head on that, and decodes from both; the strength of the gate, gamma, is
chosen at decoding. Compared with the plain model trained as long, and with choosing the best of four texts of
the plain model by the classifier afterwards.

    python examples/director.py [--seeds 0 1 2] [--quick]

Prints mean ± deviation over seeds and saves bench/results/example_director.jsonl.
"""

import copy
import time

import torch
import torch.nn.functional as F
from common import arguments, bits_per_token, language_model_loss, repeats, report, train, windows
from repetition import LENGTH, PROMPT, N, Transformer, rate, sample, task
from torch import Tensor

import sukhops

CANDIDATES, GAMMAS = 4, (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
UNSEEN = -2  # the mark of prompts before labelled text, which do not count


def director(model: Transformer, plain: Tensor, labelled: Tensor, label: Tensor, steps: int, seed: int):
    """A copy of the model trained on plain windows and on labelled text [M, T], its head a DirectorHead."""
    model = copy.deepcopy(model)
    model.head = head = sukhops.nn.DirectorHead.from_linear(model.head)
    torch.nn.init.zeros_(head.cls_weight)  # an open gate: every token as good as any other
    loss = sukhops.nn.DirectorLoss(gamma=0.5)
    batches = windows(plain, PROMPT + LENGTH, 16, seed)
    rows = torch.Generator().manual_seed(seed)

    def step(_: int) -> Tensor:
        some = torch.randint(0, len(labelled), (16,), generator=rows)
        ids = torch.cat([next(batches), labelled[some]])
        marks = torch.cat([torch.full((16, PROMPT + LENGTH), -1), label[some]])[:, 1:]
        target = ids[:, 1:].masked_fill(marks == UNSEEN, -100)
        return loss(
            model.backbone(ids[:, :-1]), head.weight, head.cls_weight, target, marks.clamp(min=-1),
            lm_bias=head.bias, cls_bias=head.cls_bias,
        ).loss  # fmt: skip

    train(model, step, steps, lr=1e-3, name="Director")
    return model


@torch.no_grad()
def desirable(model: Transformer, prompts: Tensor, text: Tensor) -> Tensor:
    """Mean log-probability of the classifier over the tokens of each text: [B]."""
    ids = torch.cat([prompts, text], 1)
    hidden = model.backbone(ids[:, :-1])[:, PROMPT - 1 :]
    logit = (hidden * model.head.cls_weight[text]).sum(-1) + model.head.cls_bias[text]
    return F.logsigmoid(logit).mean(1)


def best_of(model: Transformer, classifier: Transformer, prompts: Tensor, seed: int) -> Tensor:
    many = prompts.repeat(CANDIDATES, 1)
    text = sample(model, many, seed)
    best = desirable(classifier, many, text).unflatten(0, (CANDIDATES, -1)).argmax(0)
    return text.unflatten(0, (CANDIDATES, -1))[best, torch.arange(len(prompts))]


def run(seed: int, quick: bool) -> list[dict]:
    base, learn, batches, prompts, tests, steps, texts = task(seed, quick)
    own = next(windows(learn, PROMPT, 2 * texts, seed + 1))
    text = sample(base, own, seed)
    label = torch.cat([torch.full_like(own, UNSEEN), (~repeats(text, N)).long()], 1)
    gated = director(base, learn, torch.cat([own, text], 1), label, steps // 2, seed)
    plain = copy.deepcopy(base)
    train(plain, lambda _: language_model_loss(plain, next(batches)), steps // 2, lr=1e-3, name="plain")
    rows = [{"variant": "held-out text", "repeats %": rate(tests[:, PROMPT:])}]

    def measure(variant: str, model: Transformer, decode) -> None:
        began = time.perf_counter()
        text = decode()
        speed = text.numel() / (time.perf_counter() - began)
        rows.append({
            "variant": variant, "repeats %": rate(text), "bits per token": bits_per_token(model, tests),
            "tokens/s": speed,
        })  # fmt: skip

    measure("plain", plain, lambda: sample(plain, prompts, seed))
    measure(f"plain, best of {CANDIDATES}", plain, lambda: best_of(plain, gated, prompts, seed))
    for gamma in GAMMAS:
        gated.head.gamma = gamma
        measure(f"Director, gamma {gamma:g}", gated, lambda: sample(gated, prompts, seed))
    return [row | {"seed": seed} for row in rows]


def main() -> None:
    options = arguments(__doc__).parse_args()
    rows = [row for seed in options.seeds for row in run(seed, options.quick)]
    columns = {"repeats %": ".1f", "bits per token": ".3f", "tokens/s": ",.0f"}
    report("director", rows, columns, plot=("repeats %", "bits per token"), save=not options.quick)


if __name__ == "__main__":
    main()
