"""Shared by the examples: stages of a run, a small transformer, a training loop, a report over seeds."""

import argparse
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import sukhops

sys.path.append(str(Path(__file__).parent.parent / "bench"))
from harness import machine
from report import RESULTS
from report import example as summary

CACHE = Path(__file__).parent.parent / ".cache" / "examples"


class Parser(argparse.ArgumentParser):
    """Without --seeds, a quick run takes one seed and a whole run three."""

    def parse_args(self, *given, **named) -> argparse.Namespace:
        options = super().parse_args(*given, **named)
        options.seeds = options.seeds or ([0] if options.quick else [0, 1, 2])
        return options


def arguments(description: str) -> argparse.ArgumentParser:
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2; with --quick: 0")
    parser.add_argument("--quick", action="store_true", help="run 3 minutes at most, as a check")
    return parser


class Stages:
    """Caches the stages of a run in .cache until the run ends, so that an interrupted run can be resumed.

    Args:
        example: name of the example.
        options: command-line options. All except the seeds are part of the folder's name; the names of stages
            contain the seeds.
    """

    def __init__(self, example: str, options: argparse.Namespace):
        given = {name: value for name, value in vars(options).items() if name != "seeds" and value}
        words = [example, *(f"{name}_{value}" for name, value in sorted(given.items()))]
        self.folder = CACHE / "-".join(re.sub(r"\W+", "_", word) for word in words)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.seconds = 0.0

    def __call__(self, name: str, make: Callable):
        """The result of `make()`, cached: tensors, numbers, strings, or containers of them."""
        path = self.folder / f"{name}.pt"
        if not path.exists():
            began = time.perf_counter()
            found = make()
            fresh = path.with_suffix(".new")
            torch.save({"found": found, "seconds": time.perf_counter() - began}, fresh)
            fresh.replace(path)
        kept = torch.load(path)
        self.seconds += kept["seconds"]
        return kept["found"]

    def end(self) -> float:
        """Deletes the cached stages and returns the minutes of all stages."""
        shutil.rmtree(self.folder)
        return self.seconds / 60


def windows(ids: Tensor, length: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Yields random windows [batch, length] of ids [N] forever; they depend only on the seed."""
    g = torch.Generator().manual_seed(seed)
    span = torch.arange(length)
    while True:
        start = torch.randint(0, len(ids) - length + 1, (batch, 1), generator=g)
        yield ids[start + span]


class Attention(nn.Module):
    def __init__(self, d_model: int, heads: int):
        super().__init__()
        self.heads = heads
        self.inputs = nn.Linear(d_model, 3 * d_model, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, cache: Tensor | None = None) -> tuple[Tensor, Tensor]:
        qkv = self.inputs(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [3, B, H, T, d]
        q, kv = qkv[0], qkv[1:]
        if cache is not None:
            kv = torch.cat([cache, kv], dim=3)
        # with a cache there is one query, which sees every key
        y = F.scaled_dot_product_attention(q, *kv, is_causal=cache is None)
        return self.output(y.transpose(1, 2).flatten(2)), kv


class Block(nn.Module):
    def __init__(self, d_model: int, attention: nn.Module):
        super().__init__()
        self.attention = attention
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))

    def forward(self, x: Tensor, cache=None):
        y, cache = self.attention(self.norm1(x), cache)
        x = x + y
        return x + self.mlp(self.norm2(x)), cache


class Transformer(nn.Module):
    """A small causal transformer: `backbone(ids [B, T]) -> hidden [B, T, D]`, and a head [V, D]."""

    def __init__(
        self,
        vocab: int,
        d_model: int = 128,
        layers: int = 3,
        heads: int = 4,
        context: int = 256,
    ):
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(vocab, d_model)
        self.position = nn.Embedding(context, d_model)
        self.blocks = nn.ModuleList(Block(d_model, Attention(d_model, heads)) for _ in range(layers))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab, bias=False)
        for module in (self.embedding, self.position, self.head):
            nn.init.normal_(module.weight, std=0.02)

    def backbone(self, ids: Tensor) -> Tensor:
        return self.extend(ids, None)[0]

    def extend(self, ids: Tensor, caches: list | None, start: int = 0) -> tuple[Tensor, list]:
        """Hidden states of `ids`, which follow `start` tokens in the caches, and the new caches."""
        x, new = self.embedding(ids) + self.position.weight[start : start + ids.shape[1]], []
        for i, block in enumerate(self.blocks):
            x, cache = block(x, caches[i] if caches else None)
            new.append(cache)
        return self.norm(x), new


def language_model_loss(model: Transformer, ids: Tensor) -> Tensor:
    """Mean cross entropy of windows [B, T + 1]."""
    return -sukhops.linear_logp(model.backbone(ids[:, :-1]), model.head.weight, ids[:, 1:]).mean()


@torch.no_grad()
def generate(
    model: Transformer,
    prompt: Tensor,
    length: int,
    *,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    scores: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Generates `length` tokens after each prompt [B, P] -> [B, length]; greedy without a generator.

    `scores` maps the last hidden states [B, D] to logits [B, V]; None: the model's head.
    """
    scores = scores or model.head
    hidden, caches = model.extend(prompt, None)
    out = []
    for i in range(length):
        logits = scores(hidden[:, -1])
        if generator is None:
            token = logits.argmax(-1, keepdim=True)
        else:
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        out.append(token)
        if i + 1 < length:
            hidden, caches = model.extend(token, caches, prompt.shape[1] + i)
    return torch.cat(out, dim=1)


def repeats(ids: Tensor, n: int) -> Tensor:
    """Mask [B, T] of the tokens of ids that complete an n-gram that occurred earlier in their sequence."""
    found = torch.zeros(ids.shape, dtype=torch.bool)
    for row, sequence in enumerate(ids.tolist()):
        seen = set()
        for i in range(n - 1, len(sequence)):
            gram = tuple(sequence[i - n + 1 : i + 1])
            found[row, i] = gram in seen
            seen.add(gram)
    return found


def train(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    steps: int,
    *,
    lr: float = 2e-3,
    name: str = "",
    weight_decay: float = 0.01,
) -> None:
    """Trains with AdamW, warm-up and a cosine decay to lr / 10; `loss(step)` returns the loss of a step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)
    warm = max(1, steps // 20)
    for step in (bar := tqdm(range(steps), desc=name, mininterval=1.0)):
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warm) * cosine
        optimizer.zero_grad(set_to_none=True)
        value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{value.item():.3f}", refresh=False)


def held_out(ids: Tensor, length: int, count: int) -> Tensor:
    """`count` windows [count, length], evenly spaced in ids [N]."""
    start = torch.linspace(0, len(ids) - length, count).long()
    return ids[start[:, None] + torch.arange(length)]


def report(
    name: str,
    rows: list[dict],
    columns: dict[str, str],
    *,
    plot: tuple[str, str] | None = None,
    minutes: float | None = None,
    save: bool = True,
) -> None:
    """Prints mean ± standard deviation over seeds for each variant, and saves the rows.

    columns: field -> format. plot: the two columns to plot against each other. minutes: duration of the whole
    run. The file is bench/results/example_<name>.jsonl; bench/report.py makes the table and the plot from it.
    """
    found = [{"columns": columns, "plot": plot, "minutes": minutes, **machine()}, *rows]
    print(summary(found))
    if not save:
        return
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"example_{name}.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in found)
