"""A short training run with the reference head and with sukhops: compares losses, time and memory.

A small byte-level transformer is trained on the source code of Python's standard library and predicts the
next two bytes at once: its input vocabulary is 256 and its output vocabulary 65,536. `--record` writes to
bench/results instead of bench/own.
"""

import multiprocessing
import sys
import sysconfig
import time
from pathlib import Path

import harness
import torch
import torch.nn as nn
from tqdm import tqdm

import sukhops

BATCH, LENGTH, WIDTH, LAYERS, HEADS, STEPS = 8, 256, 256, 2, 4, 3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):  # [B, T, WIDTH]
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, WIDTH))
        return x + self.mlp(self.norm2(x))


class TwoByteModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.bytes, self.position = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Parameter(torch.randn(65536, WIDTH) * WIDTH**-0.5)

    def forward(self, x):  # [B, T] -> [B, T, WIDTH]
        return self.norm(self.blocks(self.bytes(x) + self.position.weight))


def batches(count: int):
    """Yields (input [B, T], target [B, T]); a target is the next two bytes as one number."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        starts = torch.randint(0, len(text) - LENGTH - 2, (BATCH, 1), generator=generator)
        index = starts + torch.arange(LENGTH)
        yield text[index], 256 * text[index + 1] + text[index + 2]


def train(head: str, results) -> None:
    """Trains for STEPS steps; puts losses, gradient norms, tokens per second and peak memory into results."""
    torch.manual_seed(0)
    logp = sukhops.linear_logp if head == "sukhops" else sukhops.reference.linear_logp
    model = TwoByteModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses, seconds, before = [], [], harness.resident("VmRSS")
    for x, y in tqdm(batches(STEPS), total=STEPS, desc=f"{head:>9}", unit="step"):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = -logp(model(x), model.head, y).mean()
        loss.backward()
        if not losses:
            gradient = {n: p.grad.norm().item() for n, p in model.named_parameters()}
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    peak = harness.resident("VmHWM") - before
    median = sorted(seconds[1:])[len(seconds[1:]) // 2]
    results.put((losses, gradient, BATCH * LENGTH / median, peak))


def main() -> None:
    # a new process for each head, so that its memory is measured alone
    context = multiprocessing.get_context("spawn")
    outcome = {}
    for head in ("reference", "sukhops"):
        results = context.SimpleQueue()
        process = context.Process(target=train, args=(head, results))
        process.start()
        outcome[head] = results.get()
        process.join()
    (losses, gradient, *_), (our_losses, our_gradient, *_) = outcome["reference"], outcome["sukhops"]
    worst = max(abs(a - b) / b for a, b in zip(our_losses, losses, strict=True))
    gap = max(abs(our_gradient[n] - g) / (g + 1e-12) for n, g in gradient.items())
    rows = []
    for head, (loss, _, rate, peak) in outcome.items():
        row = {
            "op": "train_step", "case": "two-byte transformer on the standard library", "provider": head,
            "shape": {"rows": BATCH * LENGTH, "D": WIDTH, "V": 65536}, "dtype": "float32",
            "losses": [round(x, 6) for x in loss], "tokens_per_second": round(rate),
            "memory_mib": round(peak / 2**20, 1), "loss_difference": worst, "gradient_difference": gap,
            **harness.machine(),
        }  # fmt: skip
        rows.append(row)
        print(f"{head:>9}: {rate:,.0f} tokens/s, peak {peak / 2**20:,.0f} MiB, ", end="")
        print(f"loss {loss[0]:.4f} to {loss[-1]:.4f}")
    print(f"largest relative difference: loss {worst:.1e}, gradient norms {gap:.1e}")
    if worst > 1e-4 or gap > 1e-3:
        raise SystemExit("the two heads disagree")
    harness.save("train_step", rows, "--record" in sys.argv)


if __name__ == "__main__":
    main()
