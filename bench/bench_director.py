"""Director. Floors: a read of both weights for decoding, the products of the LM rows for training.

`python bench/bench_director.py` runs the main cases, with `--all` all cases; `pytest bench` runs them with
pytest-benchmark.
"""

import functools

import harness
import torch
import torch.nn.functional as F
from harness import Case, Inputs, Provider, test_provider  # noqa: F401  (pytest bench runs it)

import sukhops
from sukhops import reference

K = 50
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@functools.lru_cache(maxsize=2)
def weights(d: int, v: int, dtype: torch.dtype) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(v, d, generator=g) * d**-0.5).to(dtype) for _ in range(2)]


def make_decoding(rows: int, d: int, v: int, dtype: torch.dtype) -> Inputs:
    lm, cls = weights(d, v, dtype)
    hidden = torch.randn(rows, d, generator=torch.Generator().manual_seed(1)).to(dtype)
    return {"hidden": hidden, "lm_weight": lm, "cls_weight": cls}


def decoding(topk):
    return lambda i: lambda: topk(i["hidden"], i["lm_weight"], i["cls_weight"], K).values


def read(inputs: Inputs):
    """Reads both weights once, on all threads."""
    return lambda: inputs["lm_weight"].sum() + inputs["cls_weight"].sum()


def copy(inputs: Inputs):
    """Copies one weight, which moves as many bytes as reading both."""
    out = torch.ones_like(inputs["lm_weight"])
    return lambda: out.copy_(inputs["cls_weight"])


def reading_case(dtype: torch.dtype) -> Case:
    """Compares the read with a copy, to see whether the read is limited by memory bandwidth."""
    d, v = 1024, 50264
    return Case(
        "director", "a read of both weights, over a copy of one", {"D": d, "V": v}, dtype,
        lambda: make_decoding(1, d, v, dtype), lambda: make_decoding(1, d, v // 8, dtype),
        read, {"torch.sum": Provider(read, package="torch")}, copy, 15, ("fwd_nograd",),
    )  # fmt: skip


def decoding_case(name: str, rows: int, dtype: torch.dtype, rounds: int = 15) -> Case:
    d, v = 1024, 50264
    logits = 4.0 * rows * v
    providers = {
        "sukhops": Provider(decoding(sukhops.director_topk), ours=True),
        "eager": Provider(decoding(reference.director_topk), 6 * logits, "torch"),
    }
    return Case(
        "director", name, {"rows": rows, "D": d, "V": v, "k": K}, dtype,
        lambda: make_decoding(rows, d, v, dtype), lambda: make_decoding(rows, d, v // 8, dtype),
        decoding(reference.director_topk), providers, read, rounds, ("fwd_nograd",),
    )  # fmt: skip


def make_training(
    rows: int, d: int, v: int, dtype: torch.dtype, length: int = 256, device: str = "cpu"
) -> Inputs:
    """Sequences of up to `length` tokens; the second half of the batch has classifier labels 0 and 1."""
    g = torch.Generator(device).manual_seed(0)
    t = min(length, rows // 4)
    b = rows // t
    label = torch.full((b,), -1, device=device)
    label[b // 2 :] = torch.arange(b - b // 2) % 2

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g, device=device)

    heads = {n: (normal(v, d) * d**-0.5).to(dtype).requires_grad_() for n in ("lm_weight", "cls_weight")}
    hidden = normal(b, t, d).to(dtype).requires_grad_()
    target = torch.randint(0, v, (b, t), generator=g, device=device)
    return {"hidden": hidden, **heads, "target": target, "label": label}


def training(norm_weight: float):
    loss = sukhops.nn.DirectorLoss(norm_weight=norm_weight)
    return lambda i: lambda: loss(**i).loss


def eager_training(norm_weight: float):
    """Like the published training code: computes the logits of both heads for every row, then masks."""

    def provider(i: Inputs):
        def call():
            h, target, label = i["hidden"], i["target"], i["label"][:, None].expand(i["target"].shape)
            lm, cls = (h @ i["lm_weight"].T), (h @ i["cls_weight"].T)
            if lm.dtype != torch.float64:
                lm, cls = lm.float(), cls.float()
            plain = label == -1
            nll = F.cross_entropy(lm.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
            picked = cls.gather(-1, target.unsqueeze(-1)).squeeze(-1)
            bce = F.binary_cross_entropy_with_logits(
                picked, label.clamp(min=0).to(picked.dtype), reduction="none"
            )
            if norm_weight:
                square = (cls.sigmoid() - 0.5).square()
                others = square.sum(-1) - square.gather(-1, target.unsqueeze(-1)).squeeze(-1)
                bce = bce + norm_weight * others / (cls.shape[-1] - 1)
            return (nll.where(plain, 0.0).sum() + 0.5 * bce.where(~plain, 0.0).sum()) / target.numel()

        return call

    return provider


def products(norm: bool):
    """The four bare products of the LM rows; with norm, also those of the classifier rows."""

    def make(i: Inputs):
        plain = i["label"] == -1
        parts = []
        for rows, name in [(plain, "lm_weight"), (~plain, "cls_weight")][: 1 + norm]:
            h, w = i["hidden"].detach()[rows].flatten(0, 1), i[name].detach()
            z = h.new_ones(h.shape[0], w.shape[0])
            parts.append((h, w, z, torch.ones_like(h), torch.ones_like(w)))

        def call():
            for h, w, z, dh, dw in parts:
                torch.mm(h, w.T, out=z)
                torch.mm(h, w.T, out=z)
                torch.mm(z, w, out=dh)
                torch.mm(z.T, h, out=dw)

        return call

    return make


def training_case(
    name: str, dtype: torch.dtype, norm_weight: float = 0.0, rounds: int = 7, rows: int = 2048
) -> Case:
    d, v = 512, 32768
    eager = {"eager": Provider(eager_training(norm_weight), 32.0 * rows * v, "torch")}
    return Case(
        "director", name, {"rows": rows, "D": d, "V": v}, dtype,
        lambda: make_training(rows, d, v, dtype), lambda: make_training(128, d, v // 8, dtype),
        eager_training(norm_weight),
        {
            "sukhops": Provider(training(norm_weight), ours=True),
        }
        | (eager if not norm_weight else {}),
        products(norm_weight > 0), rounds,
    )  # fmt: skip


def cases() -> list[Case]:
    both = (torch.float32, torch.bfloat16)
    return [
        *(reading_case(dtype) for dtype in both),
        *(decoding_case("decoding", 8, dtype)._replace(main=True) for dtype in both),
        training_case("training", torch.float32),
        *(
            training_case(f"training, {rows:,} rows", torch.float32, rows=rows)._replace(main=rows == 1024)
            for rows in (256, 1024, 4096)
        ),
        training_case("training", torch.bfloat16),
        training_case("training with the norm", torch.float32, 1.0, rounds=3),
        *(decoding_case("decoding by rows", n, dtype, rounds=7) for dtype in both for n in ROWS),
    ]


if __name__ == "__main__":
    harness.main("director", cases())
