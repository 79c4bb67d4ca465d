"""Trains adaptive spans in a pretrained model, and measures bits per token, spans and decoding time.

Only the spans are trained, from ratio 1, on Python's documentation; the weights are frozen. Bits per token
are measured on held-out text. Decoding continues a long context with a StaticCache; the models with and
without spans take turns. `--record` writes to bench/results instead of bench/own.
"""

import argparse
import pydoc_data.topics
from pathlib import Path

import harness
import real_model
import torch
import transformers
from tqdm import trange

from sukhops.integrations.transformers import add_adaptive_spans

NEW = 16  # tokens that a timed call decodes


def load(name: str) -> transformers.PreTrainedModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def bits(model: transformers.PreTrainedModel, texts: torch.Tensor) -> float:
    """Mean bits per token of texts [N, T]."""
    losses = [model(t.unsqueeze(0), labels=t.unsqueeze(0), use_cache=False).loss for t in texts]
    return torch.stack(losses).mean().item() / torch.tensor(2.0).log().item()


def decoding(models: dict, context: torch.Tensor, rounds: int) -> dict[str, float]:
    """Milliseconds per decoded token after a context [N] for each model; the models take turns."""

    def seconds(model: transformers.PreTrainedModel, new: int) -> float:
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        cache = transformers.StaticCache(model.config, max_cache_len=len(context) + NEW)
        call = lambda: model.generate(context.unsqueeze(0), cache=cache, **options)  # noqa: E731
        return harness.clock(call)

    found = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            found[name].append((seconds(model, NEW) - seconds(model, 1)) / (NEW - 1))
    return {name: round(1e3 * harness.quantile(values, 50), 2) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder or hub name of a model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens per training text, and max_span")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--coef", type=float, default=3e-5, help="of the penalty, in nats per token of a layer's mean span"
    )
    parser.add_argument("--context", type=int, default=4096, help="tokens before the first decoded token")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="write to bench/results, for the documentation")
    args = parser.parse_args()
    name = real_model.path(args.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[key] for key in sorted(topics))
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    texts = ids[: len(ids) // args.tokens * args.tokens].view(-1, args.tokens)
    held, texts = texts[-16:], texts[:-16]

    plain, model = load(name), load(name)
    spans = add_adaptive_spans(model, args.tokens)
    before = {"without spans": bits(plain, held), "spans of ratio 1": bits(model, held)}
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    optimizer = torch.optim.Adam([layer.ratio for layer in spans.layers], 1e-2)
    model.activation_checkpointing_enable()
    model.train()
    for step in trange(args.steps):
        batch = texts[order[step % len(order)]].unsqueeze(0)
        optimizer.zero_grad()
        (model(batch, labels=batch, use_cache=False).loss + spans.penalty(args.coef)).backward()
        optimizer.step()
    model.activation_checkpointing_disable()
    model.eval()
    learned = bits(model, held)
    report = spans.freeze().report()
    context = ids[: args.context]
    times = decoding({"without spans": plain, "learned spans": model}, context, args.rounds)
    base = {
        "case": f"{Path(name).name}, {args.tokens} tokens", **harness.machine(), "steps": args.steps,
        "coef": args.coef, "context": args.context, "transformers": transformers.__version__,
    }  # fmt: skip
    layers = [round(sum(layer.tokens) / len(layer.tokens), 1) for layer in report]
    means = {"spans of ratio 1": float(args.tokens), "learned spans": round(sum(layers) / len(layers), 1)}
    rows = [
        base
        | {"provider": key, "bits": round(value, 4), "mean_span": means.get(key), "token_ms": times.get(key)}
        for key, value in (before | {"learned spans": learned}).items()
    ]
    rows[-1]["layer_spans"] = layers
    for row in rows:
        print({k: row[k] for k in ("provider", "bits", "mean_span", "token_ms")})
    print("mean span of each layer:", layers)
    harness.save("real_spans", rows, args.record)


if __name__ == "__main__":
    main()
