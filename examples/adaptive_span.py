"""Adaptive spans in a pretrained model: how little of its context does each attention head need?

Every head of the model gets a span that starts at the 1,024 tokens of a training text. Only the spans are
trained, with the published penalty: first a weak penalty, then a stronger one from there. The weights of the
model are frozen. The results are compared with the original model, and with one fixed window for all heads
that reads as many keys. The text is Django's manual; every fifth page is used for testing.

    python examples/adaptive_span.py [--model NAME] [--seeds 0 1 2] [--quick]

Prints mean ± standard deviation over seeds; saves bench/results/example_adaptive_span.jsonl and a plot of
the spans by layer and head. Keys per query are the mean over a text. The last column is the time to decode a
token after 8,000 tokens of context. examples/adaptive_span_paper.py trains the published model.
"""

import argparse
import math
import statistics
import time

import torch
import transformers
from common import Stages, held_out, report, train, windows
from pretrained import arguments, load, manual
from report import spans as span_plot
from torch import Tensor, nn
from tqdm import tqdm

import sukhops
from sukhops.integrations.transformers import AdaptiveSpans, adaptive_spans, add_adaptive_spans

LENGTH, CONTEXT, NEW = 1024, 8000, 32
PENALTIES = (3e-5, 1e-4)  # nats per token of a layer's mean span
LR = 2e-2


def token_loss(model: transformers.PreTrainedModel, ids: Tensor) -> Tensor:
    """Mean cross entropy of texts [B, T], in nats."""
    hidden = model.base_model(ids, use_cache=False).last_hidden_state
    return -sukhops.linear_logp(hidden[:, :-1], model.get_output_embeddings().weight, ids[:, 1:]).mean()


def bits(model: transformers.PreTrainedModel, tests: Tensor) -> float:
    with torch.no_grad():
        losses = [token_loss(model, text.unsqueeze(0)).item() for text in tqdm(tests, desc="bits per token")]
    return statistics.mean(losses) / math.log(2)


def keys_per_query(spans: AdaptiveSpans) -> float:
    """Mean number of keys over the queries of a text and over all heads."""
    seen = torch.arange(1, LENGTH + 1)
    reads = [seen.clamp(max=keys).double().mean() for layer in spans.report() for keys in layer.keys]
    return torch.stack(reads).mean().item()


def fixed(spans: AdaptiveSpans, keys: float) -> None:
    """Sets one span for all heads: the longest one that reads at most `keys` keys per query."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        for layer in spans.layers:
            nn.init.constant_(layer.ratio, middle)
        low, high = (middle, high) if keys_per_query(spans) <= keys else (low, middle)
    for layer in spans.layers:
        nn.init.constant_(layer.ratio, low)


def measure(variant: str, seed: int, model: transformers.PreTrainedModel, tests: Tensor) -> dict:
    spans = adaptive_spans(model)
    tokens = [layer.tokens for layer in spans.report()]
    return {
        "variant": variant, "seed": seed, "bits per token": bits(model, tests),
        "keys per query": keys_per_query(spans), "mean span": statistics.mean(map(statistics.mean, tokens)),
        "spans": tokens,
    }  # fmt: skip


def learn(
    name: str | None, state: dict | None, text: Tensor, tests: Tensor, coef: float, steps: int, seed: int
) -> tuple[dict, list[dict]]:
    """Trains spans from `state`; returns the new state, and rows of these spans and of a fixed window."""
    model = with_spans(name, state)
    batches, spans = windows(text, LENGTH, 1, seed), adaptive_spans(model)

    def loss(_: int) -> Tensor:
        return token_loss(model, next(batches)) + spans.penalty(coef)

    train(model, loss, steps, lr=LR, name=f"penalty {coef:g}, seed {seed}", weight_decay=0.0)
    found = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    learned = measure(f"spans, penalty {coef:g}", seed, model, tests)
    fixed(spans, learned["keys per query"])
    window = measure(f"one window, keys of {coef:g}", seed, model, tests)
    del window["spans"]  # the plot shows only learned spans
    return found, [learned, window]


@torch.no_grad()
def decoding(models: tuple, context: Tensor, steps: int) -> list[float]:
    """Milliseconds per decoded token after a context [N] for each model; the models take turns."""
    caches = [transformers.StaticCache(model.config, max_cache_len=len(context) + steps) for model in models]
    for model, cache in zip(models, caches, strict=True):
        model(context.unsqueeze(0), cache=cache, logits_to_keep=1)
    found = [[] for _ in models]
    for token in context[:steps].reshape(-1, 1, 1):
        for model, cache, times in zip(models, caches, found, strict=True):
            began = time.perf_counter()
            model(token, cache=cache)
            times.append(1000 * (time.perf_counter() - began))
    return [statistics.median(times) for times in found]


def with_spans(name: str | None, state: dict | None = None) -> transformers.PreTrainedModel:
    """The model with spans; only the spans require gradients."""
    model = load(name)[0].requires_grad_(False)
    add_adaptive_spans(model, LENGTH)
    for layer in adaptive_spans(model).layers:
        layer.ratio.requires_grad_(True)
    model.load_state_dict(state or {}, strict=False)
    return model


def run(options: argparse.Namespace, stages: Stages) -> list[dict]:
    text, test = manual(load(options.model)[1])
    steps, tests, context = (2, 2, 1100) if options.quick else (50, 12, CONTEXT)
    tests = held_out(test, LENGTH, tests)
    rows = [stages("full", lambda: measure("full attention", 0, with_spans(options.model), tests))]
    del rows[0]["spans"]
    for seed in options.seeds:
        state = None
        for coef in PENALTIES:
            arguments = options.model, state, text, tests, coef, steps, seed
            state, found = stages(f"{coef:g}-{seed}", lambda given=arguments: learn(*given))
            rows += found
    models = load(options.model)[0], with_spans(options.model, state)
    times = stages("decoding", lambda: decoding(models, text[:context], NEW))
    rows[0]["ms per token"], rows[-2]["ms per token"] = times
    return rows


def main() -> None:
    options = arguments(__doc__).parse_args()
    stages = Stages("adaptive_span", options)
    rows = run(options, stages)
    columns = {
        "bits per token": ".3f", "keys per query": ",.0f", "mean span": ",.0f", "ms per token": ",.0f",
    }  # fmt: skip
    report("adaptive_span", rows, columns, save=not options.quick, minutes=stages.end())
    if not options.quick:
        span_plot("example_adaptive_span", rows)


if __name__ == "__main__":
    main()
