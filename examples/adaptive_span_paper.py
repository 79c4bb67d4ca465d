"""The published adaptive-span model of 12 layers, on enwik8.

    python examples/adaptive_span_paper.py --data enwik8 [--steps N] [--split N] [--checkpoint DIR]

The model has post-norm blocks with ReLU, one table of relative positions for all layers and heads, and spans
that do not include the token itself. It is trained with Adagrad, a linear warm-up, and gradient clipping of
each tensor, on consecutive blocks of text with a cache of the previous ones. Differences from the published
run: dropout only on the residuals (the operator has no dropout on attention weights); the cache holds keys
and values instead of hidden states, so the projections get no gradient through it; symbols are bytes. Source:
Sukhbaatar et al. 2019.

The example is meant for a GPU. On 2 CPU cores a step takes one to two minutes while spans are short, and 7 GB
of memory with the batch in 8 parts; the caches of all 64 sequences grow to 26 GB over the first 16 steps.
"""

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import sukhops


class Paper(NamedTuple):
    layers: int
    width: int
    inner: int  # width of the feed-forward layer
    heads: int
    max_span: int
    block: int  # tokens of each sequence in a step
    batch: int
    coef: float  # coefficient of the penalty, in nats per token of mean span
    dropout: float
    lr: float
    warmup: int
    clip: float  # limit of the gradient norm of each tensor
    steps: int


ENWIK8 = Paper(
    layers=12, width=512, inner=2048, heads=8, max_span=8192, block=512, batch=64, coef=5e-7, dropout=0.3,
    lr=0.07, warmup=32_000, clip=0.03, steps=600_000,
)  # fmt: skip


class Block(nn.Module):
    def __init__(self, paper: Paper, table: nn.Parameter):
        super().__init__()
        self.attention = sukhops.nn.AdaptiveSpanAttention(
            paper.width, paper.heads, paper.max_span, rel_pos=table, include_self=False
        )
        self.norm1, self.norm2 = nn.LayerNorm(paper.width), nn.LayerNorm(paper.width)
        self.mlp = nn.Sequential(
            nn.Linear(paper.width, paper.inner), nn.ReLU(), nn.Linear(paper.inner, paper.width)
        )
        self.dropout = nn.Dropout(paper.dropout)

    def forward(self, x: Tensor, cache=None):
        y, cache = self.attention(x, cache)
        x = self.norm1(x + self.dropout(y))
        return self.norm2(x + self.dropout(self.mlp(x))), cache


class PaperModel(nn.Module):
    def __init__(self, paper: Paper):
        super().__init__()
        self.embedding = nn.Embedding(256, paper.width)
        table = nn.Parameter(torch.randn(paper.max_span, paper.width // paper.heads))
        self.blocks = nn.ModuleList(Block(paper, table) for _ in range(paper.layers))
        self.head = nn.Linear(paper.width, 256, bias=False)

    def forward(self, ids: Tensor, caches: list | None) -> tuple[Tensor, list]:
        """Mean cross entropy of ids [B, T + 1] in nats, and the caches after the first T tokens."""
        x, new = self.embedding(ids[:, :-1]), []
        for i, block in enumerate(self.blocks):
            x, cache = block(x, caches[i] if caches else None)
            new.append(cache)
        return -sukhops.linear_logp(x, self.head.weight, ids[:, 1:]).mean(), new

    def penalty(self, coef: float) -> Tensor:
        return sum(block.attention.adaptive_span.penalty(coef) for block in self.blocks)


class Text:
    """Bytes as parallel sequences, read block by block; a batch of them is processed in `split` parts."""

    def __init__(self, text: Tensor, paper: Paper, split: int, device: torch.device):
        length = len(text) // paper.batch
        self.block, self.count, self.device = paper.block, (length - 1) // paper.block, device
        if self.count < 1:
            raise SystemExit(f"the text is too short for {paper.batch} sequences of {paper.block} bytes")
        self.parts = text[: length * paper.batch].view(paper.batch, length).chunk(split)
        self.caches: list = [None] * len(self.parts)

    def step(self, model: PaperModel, step: int):
        """Yields the loss of each part, weighted so that their sum is the mean over the batch."""
        start = step % self.count * self.block
        rows = sum(len(part) for part in self.parts)
        for i, part in enumerate(self.parts):
            ids = part[:, start : start + self.block + 1].to(self.device, torch.int64)
            loss, self.caches[i] = model(ids, self.caches[i] if start else None)
            yield loss * (len(part) / rows)


@torch.no_grad()
def bits_per_byte(model: PaperModel, text: Text, blocks: int) -> float:
    model.eval()
    total = sum(sum(part.item() for part in text.step(model, step)) for step in range(blocks))
    model.train()
    return total / blocks / math.log(2)


def train(data: Path, steps: int, split: int, directory: Path | None) -> None:
    """Trains, saves a checkpoint every 1,000 steps, and prints held-out bits per byte and the spans."""
    paper, device = ENWIK8, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = torch.frombuffer(bytearray(data.read_bytes()), dtype=torch.uint8)
    learn, held = text[: int(0.9 * len(text))], text[int(0.9 * len(text)) : int(0.95 * len(text))]
    torch.manual_seed(0)
    model = PaperModel(paper).to(device)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=paper.lr)
    first, saved = 0, directory and directory / "enwik8.pt"
    if saved and saved.exists():  # the caches are not saved and start empty
        state = torch.load(saved, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    batches = Text(learn, paper, split, device)
    with tqdm(range(first, steps), initial=first, total=steps, desc="enwik8") as bar:
        for step in bar:
            optimizer.param_groups[0]["lr"] = paper.lr * min(1.0, (step + 1) / paper.warmup)
            optimizer.zero_grad()
            loss = 0.0
            for part in batches.step(model, step):
                part.backward()
                loss += part.item()
            model.penalty(paper.coef).backward()
            for parameter in model.parameters():
                nn.utils.clip_grad_norm_([parameter], paper.clip)
            optimizer.step()
            bar.set_postfix(bits=f"{loss / math.log(2):.3f}")
            if saved and ((step + 1) % 1000 == 0 or step + 1 == steps):
                fresh = saved.with_suffix(".new")
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                torch.save(state, fresh)
                fresh.replace(saved)
    test = Text(held, paper, split, device)
    blocks = min(test.count, steps)  # measure a short trial on fewer blocks
    print(f"{bits_per_byte(model, test, blocks):.3f} bits per byte on {blocks} held-out blocks")
    for i, block in enumerate(model.blocks):
        print(f"layer {i:2}: spans", *(f"{t:.0f}" for t in block.attention.adaptive_span.report().tokens))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the file enwik8, or another text")
    parser.add_argument("--steps", type=int, default=ENWIK8.steps, help="default: as published")
    parser.add_argument("--split", type=int, default=8, help="number of parts in which a batch is processed")
    parser.add_argument("--checkpoint", type=Path, help="directory to save to and resume from")
    options = parser.parse_args()
    if options.checkpoint:
        options.checkpoint.mkdir(parents=True, exist_ok=True)
    train(options.data, options.steps, options.split, options.checkpoint)


if __name__ == "__main__":
    main()
