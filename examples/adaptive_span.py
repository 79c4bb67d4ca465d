"""Adaptive spans against full attention: a byte-level transformer on the source of the standard library.

Both models are the same, relative positions included, and start from the same weights. In one the span of
each head starts at 0, learns, and pays the published penalty; in the other it is fixed at all of the 1024
bytes that a model sees. Compared at equal steps and, with the full model trained for fewer, at equal time.

    python examples/adaptive_span.py [--seeds 0 1 2] [--data FILE] [--checkpoint DIR] [--tune] [--quick]
    python examples/adaptive_span.py --paper enwik8 --data FILE [--steps N] [--split N] [--checkpoint DIR]

The first prints mean ± deviation over seeds, saves bench/results/example_adaptive_span.jsonl and a plot of
the spans by layer and head beside it. Keys per query are counted in the kernels, over the held-out text. The
second trains the published model of 12 layers, see examples/adaptive_span_paper.py.
"""

import statistics
from pathlib import Path

import torch
from adaptive_span_paper import PAPERS, train_paper
from common import (
    Transformer,
    arguments,
    as_bytes,
    bits_per_token,
    corpus,
    held_out,
    language_model_loss,
    report,
    train,
    windows,
)
from report import spans as span_plot
from torch import Tensor, nn

import sukhops

LENGTH, BATCH, WIDTH, LAYERS, HEADS = 1024, 1, 128, 3, 4
COEF = 2e-6  # of the penalty, in nats per token of mean span, as published for a small model
ADAPTIVE, FULL = "adaptive spans", "full attention"
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
LR = 2e-3  # the best of RATES for each variant, by --tune: on a seed and a piece of text not reported


def transformer(seed: int, init: float) -> Transformer:
    """Spans start at init * LENGTH; one table of relative positions for all layers, as published."""
    torch.manual_seed(seed)
    table = nn.Parameter(torch.randn(LENGTH, WIDTH // HEADS))
    return Transformer(
        256,
        WIDTH,
        LAYERS,
        attention=lambda: sukhops.nn.AdaptiveSpanAttention(WIDTH, HEADS, LENGTH, init=init, rel_pos=table),
        positions=False,
    )


def spans(model: Transformer) -> list[sukhops.nn.AdaptiveSpan]:
    return [block.attention.adaptive_span for block in model.blocks]


def pieces(ids: Tensor, tests: int) -> tuple[Tensor, Tensor, Tensor]:
    """Text to learn from, windows of the text behind it to choose by, and of the last to report."""
    tenth = len(ids) // 10
    held = (held_out(part, LENGTH + 1, tests) for part in (ids[-2 * tenth : -tenth], ids[-tenth:]))
    return ids[: -2 * tenth], *held


def trained(variant: str, seed: int, text: Tensor, steps: int, lr: float, saved: Path | None = None):
    """A model of the variant, and the seconds that it took."""
    adaptive = variant == ADAPTIVE
    model = transformer(seed, 0.0 if adaptive else 1.0)
    for span in spans(model):
        span.requires_grad_(adaptive)

    def loss(step: int) -> Tensor:
        batch = next(windows(text, LENGTH + 1, BATCH, seed * 1_000_000 + step))
        penalty = sum(s.penalty(COEF) for s in spans(model)) if adaptive else 0.0
        return language_model_loss(model, batch) + penalty

    name = f"{variant}, seed {seed}, lr {lr:g}"
    run = train(model, loss, steps, lr=lr, name=name, weight_decay=0.0, checkpoint=saved)
    return model, run.seconds


def tune(ids: Tensor, steps: int, tests: int) -> None:
    """Prints what LR is chosen by."""
    learn, choose, _ = pieces(ids, tests)
    for variant in (ADAPTIVE, FULL):
        for lr in RATES:
            model, _ = trained(variant, 3, learn, steps, lr)
            print(f"{variant}, lr {lr:g}: {bits_per_token(model, choose):.3f} bits per byte", flush=True)


def run(seed: int, ids: Tensor, steps: int, tests: int, directory: Path | None) -> list[dict]:
    learn, _, test = pieces(ids, tests)
    rows = []

    def measure(variant: str, label: str, steps: int) -> float:
        """Trains a model, adds its row, returns the seconds."""
        saved = directory and directory / f"adaptive_span_{label.replace(' ', '_')}_{seed}.pt"
        model, seconds = trained(variant, seed, learn, steps, LR, saved)
        before = torch.ops.sukhops.adaptive_span_pairs()
        bits = bits_per_token(model, test)
        pairs = torch.ops.sukhops.adaptive_span_pairs() - before
        learned = [s.report().tokens for s in spans(model)]
        rows.append({
            "variant": label, "seed": seed, "bits per byte": bits,
            "mean span": statistics.mean(t for layer in learned for t in layer),
            "keys per query": pairs / (len(test) * LENGTH * LAYERS * HEADS),
            "steps": steps, "seconds": seconds, "ms per step": 1000 * seconds / steps,
        })  # fmt: skip
        if variant == ADAPTIVE:
            rows[-1]["spans"] = learned
        return seconds

    short = measure(ADAPTIVE, ADAPTIVE, steps)
    long = measure(FULL, f"{FULL}, equal steps", steps)
    measure(FULL, f"{FULL}, equal time", max(1, round(steps * short / long)))
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, help="a text file, for instance enwik8 or text8")
    parser.add_argument("--checkpoint", type=Path, help="a directory to save to, and to go on from")
    parser.add_argument("--tune", action="store_true", help="compare learning rates: LR is chosen so")
    parser.add_argument("--paper", choices=sorted(PAPERS), help="train the published model instead")
    parser.add_argument("--steps", type=int, help="of the published model, fewer than published")
    parser.add_argument("--split", type=int, default=8, help="parts that its batch is computed in")
    options = parser.parse_args()
    if options.checkpoint:
        options.checkpoint.mkdir(parents=True, exist_ok=True)
    if options.paper:
        train_paper(options.paper, options.data, options.steps, options.split, options.checkpoint)
        return
    ids = as_bytes(corpus(options.data))
    steps, tests = (6, 2) if options.quick else (500, 64)
    if options.tune:
        tune(ids, steps, tests)
        return
    rows = [row for seed in options.seeds for row in run(seed, ids, steps, tests, options.checkpoint)]
    columns = {
        "bits per byte": ".3f", "mean span": ",.0f", "keys per query": ",.0f", "ms per step": ",.0f",
        "steps": ",.0f", "seconds": ",.0f",
    }  # fmt: skip
    report("adaptive_span", rows, columns, save=not options.quick)
    if not options.quick:
        span_plot("example_adaptive_span", rows)


if __name__ == "__main__":
    main()
