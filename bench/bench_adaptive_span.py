"""adaptive_span_attention: spans like those learned in the paper, full spans, growth with T, decoding.

Ratios are relative to PyTorch's causal attention, without spans, on the same tensors. `python
bench/bench_adaptive_span.py` runs the main case; with `--all` every case and the slow peers.
"""

import math

import harness
import torch
import torch.nn.functional as F
from harness import Case, Inputs, Provider, test_provider  # noqa: F401  (pytest bench runs it)
from torch import Tensor

import sukhops
from sukhops import reference

RAMP = 32.0
SPANS = (16, 32, 48, 64, 96, 160, 700, 1400)  # mean 314, the paper's average


def make(t: int, *, keys: int | None = None, full: bool = False, learn: bool = True) -> Inputs:
    g = torch.Generator().manual_seed(0)
    inputs = {n: torch.randn(1, 8, t if n == "q" else keys or t, 64, generator=g) for n in "qkv"}
    inputs["span"] = torch.tensor([keys or t] * 8 if full else SPANS).float()
    return {n: x.requires_grad_(learn) for n, x in inputs.items()}


def attention(f):
    return lambda i: lambda: f(*(i[n] for n in ("q", "k", "v", "span")), ramp=RAMP)


def soft_mask(span: Tensor, x: Tensor) -> Tensor:
    return ((RAMP + span.view(-1, 1, 1) - x) / RAMP).clamp(0, 1)


def masked_sdpa(q: Tensor, k: Tensor, v: Tensor, span: Tensor, ramp: float) -> Tensor:
    """SDPA with the log of the mask as bias: only as a bias does the mask get a gradient for the span."""
    t = torch.arange(k.shape[2])
    x = t[-q.shape[2] :].unsqueeze(1) - t
    seen = (x >= 0) & (x <= span.view(-1, 1, 1) + ramp)
    # 1e-30 keeps the gradient finite where the weight is 0
    bias = torch.where(seen, (soft_mask(span, x) + 1e-30).log(), -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def published_scheme(q: Tensor, k: Tensor, v: Tensor, span: Tensor, ramp: float, block: int = 512) -> Tensor:
    """The algorithm of the paper: blocks of queries attend to the window of the head with the longest span.

    The paper's code adds 1e-8 to the sum of the weights; this function does not, because it costs two digits.
    """
    length = min(k.shape[2], math.ceil(span.max().item() + ramp))
    x = torch.arange(length - 1, -1, -1)
    k, v = (F.pad(t, (0, 0, length - 1, 0)) for t in (k, v))
    out = []
    for start in range(0, q.shape[2], block):
        rows = q[:, :, start : start + block]
        m = rows.shape[2]
        keys, values = (t[:, :, start : start + m + length - 1] for t in (k, v))
        s = F.pad(rows @ keys.mT * q.shape[-1] ** -0.5, (0, 1)).flatten(2)  # [B, H, m (m + length)]
        s = F.pad(s, (0, m)).unflatten(2, (m, -1))[..., :length]  # indexed by distance
        known = torch.arange(start, start + m).unsqueeze(1) >= x
        weight = s.softmax(-1) * soft_mask(span, x) * known
        weight = weight / weight.sum(-1, keepdim=True)
        weight = F.pad(weight, (0, m + 1)).flatten(2)[..., : m * (m + length)]
        out.append(weight.unflatten(2, (m, -1))[..., :-1] @ values)
    return torch.cat(out, 2)


def flex_attention(i: Inputs):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v, span = (i[n] for n in ("q", "k", "v", "span"))

    def mask_mod(b, h, row, key):
        return (row >= key) & (row - key < span[h] + RAMP)

    def score_mod(score, b, h, row, key):
        return score + ((RAMP + span[h] - (row - key)) / RAMP).clamp(1e-30, 1).log()

    blocks = create_block_mask(mask_mod, 1, q.shape[1], q.shape[2], k.shape[2], device="cpu")
    run = torch.compile(flex_attention)
    return lambda: run(q, k, v, score_mod=score_mod, block_mask=blocks)


def causal_sdpa(i: Inputs):
    """Causal attention of the same tensors; with the backward if a tensor requires a gradient."""
    learns = [i[n].detach().requires_grad_(i[n].requires_grad) for n in "qkv"]
    causal = i["q"].shape[2] == i["k"].shape[2]

    def call():
        out = F.scaled_dot_product_attention(*learns, is_causal=causal)
        if out.requires_grad:
            torch.autograd.grad(out.sum(), learns)

    return call


def case(
    name: str, mode: str, peers: dict[str, Provider], t: int = 4096, floor=causal_sdpa, **options
) -> Case:
    learn = mode == "fwd_bwd"
    shape = {"B": 1, "H": 8, "T": t, "d": 64}
    return Case(
        "adaptive_span", name, shape | ({"N": options["keys"]} if "keys" in options else {}), torch.float32,
        lambda: make(t, learn=learn, **options),
        lambda: make(min(t, 256), learn=learn, **{n: min(o, 300) for n, o in options.items()}),
        attention(reference.adaptive_span_attention),
        {"sukhops": Provider(attention(sukhops.adaptive_span_attention), ours=True)} | peers,
        floor, modes=(mode,), rounds=7 if t <= 4096 else 3,
    )  # fmt: skip


def cases() -> list[Case]:
    scores = 4.0 * 8 * 4096 * 4096  # bytes of the scores of all heads
    published = {"published scheme": Provider(attention(published_scheme), 2 * scores, "torch")}
    slow = {
        "SDPA, mask as bias": Provider(attention(masked_sdpa), 7 * scores, "torch"),
        "eager": Provider(attention(reference.adaptive_span_attention), 10 * scores, "torch"),
    }
    flex = {"FlexAttention": Provider(flex_attention, scores, "torch", compiles=True)}
    return [
        case("learned spans", "fwd_nograd", published | slow | flex),
        case("learned spans", "fwd_bwd", published)._replace(main=True),
        case("learned spans, slow peers", "fwd_bwd", slow | flex),
        case("full spans", "fwd_bwd", {}, full=True),
        case("one decoding step", "fwd_nograd", {}, t=1, keys=8192),
        *(case("growth with T", "fwd_bwd", published if t <= 8192 else {}, t=t, floor=None)
          for t in (2048, 4096, 8192, 16384, 32768)),
    ]  # fmt: skip


if __name__ == "__main__":
    harness.main("adaptive_span", cases())
