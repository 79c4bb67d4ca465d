"""The cases of the GPU benchmark: shapes of real models, installed peers, and a goal for each case.

bench/gpu_run.py runs them. It skips operations that this build does not have, and says so.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import bench_director
import bench_preference
import bench_vocab_head
import harness
import roofline
import torch
import torch.nn.functional as F
from harness import Case, Inputs, Provider

import sukhops
from sukhops import reference

BF16 = torch.bfloat16
SMALL = {"rows": 256, "D": 256, "V": 4096}


class Goal(NamedTuple):
    """`field` of sukhops is at most `ratio` times that of the provider `against`. If `against` is empty,
    `ratio` limits the time relative to the case's floor, or the memory in MiB."""

    ratio: float
    against: str = ""
    field: str = "p50_ms"

    def verdict(self, found: dict[str, dict]) -> str:
        """The goal and whether it is met; `found` has the rows of the case by provider."""
        quantity = {"p50_ms": "time", "memory_mib": "memory"}.get(self.field, self.field)
        ours, theirs = found.get("sukhops", {}), found.get(self.against, {})
        if self.against:
            unit = f"x {self.against}"
            got = (
                ours[self.field] / theirs[self.field] if self.field in ours and self.field in theirs else None
            )
        else:
            unit = "x floor" if quantity == "time" else "MiB"
            got = ours.get("ratio_p50" if quantity == "time" else self.field)
        goal = f"{quantity} <= {self.ratio:g} {unit}"
        if got is None:
            return f"{goal}: not measured"
        return f"{goal}: {got:.3g}, {'reached' if got <= self.ratio else 'MISSED'}"


class Measured(NamedTuple):
    case: Case
    goals: Sequence[Goal] = ()


def mean(logp: Callable) -> Callable:
    """Cross entropy, computed with a log-prob function."""
    return lambda i: lambda: -logp(i["hidden"], i["weight"], i["target"]).mean()


def liger(i: Inputs):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda: loss(i["weight"], i["hidden"].flatten(0, 1), i["target"].flatten())


def cut_cross_entropy(**options):
    def provider(i: Inputs):
        from cut_cross_entropy import linear_cross_entropy

        return lambda: linear_cross_entropy(i["hidden"], i["weight"], i["target"], **options)

    return provider


def head_inputs(shape: dict, device: str, **more) -> Inputs:
    rows, d, v = shape.values()
    return bench_vocab_head.make(rows, d, v, BF16, prompt=0.0, device=device, **more)


def logp_case(name: str, shape: dict, device: str, modes: tuple[str, ...] = ("fwd_bwd",)) -> Case:
    logits = 1.0 * shape["rows"] * shape["V"]
    return Case(
        "vocab_head", name, shape, BF16,
        lambda: head_inputs(shape, device), lambda: head_inputs(SMALL, device),
        mean(reference.linear_logp),
        {
            "sukhops": Provider(mean(sukhops.linear_logp), ours=True),
            "eager": Provider(mean(reference.linear_logp), 16 * logits, "torch"),
            "torch.compile": harness.compiled(mean(reference.linear_logp), 12 * logits),
            "Liger": Provider(liger, 0, "liger-kernel", compiles=True),
            "CCE": Provider(cut_cross_entropy(), 0, "cut-cross-entropy", compiles=True),
            "CCE, unfiltered": Provider(
                cut_cross_entropy(filter_eps=None), 0, "cut-cross-entropy", compiles=True
            ),
        },
        lambda i: bench_vocab_head.products(i, 4), modes=modes, device=device,
    )  # fmt: skip


def unfrozen(i: Inputs):
    given = i | {"weight": i["weight"].detach().requires_grad_()}
    call = mean(sukhops.linear_logp)(given)
    return lambda: torch.autograd.grad(call(), (given["hidden"], given["weight"]))


def vocab_head(device: str) -> list[Measured]:
    shape, llama = roofline.LOGP, roofline.LLAMA
    frozen = logp_case("linear_logp, frozen weight", shape, device)._replace(
        make=lambda: head_inputs(shape, device, frozen=True),
        small=lambda: head_inputs(SMALL, device, frozen=True),
        providers={"sukhops": Provider(mean(sukhops.linear_logp), ours=True)}, products=unfrozen,
    )  # fmt: skip
    dpo, logits = bench_vocab_head.dpo, 1.0 * llama["rows"] * llama["V"]
    preference = Case(
        "vocab_head", "DPO with a reference model", llama, BF16,
        lambda: head_inputs(llama, device, pairs=True, sequences=16),
        lambda: head_inputs(SMALL, device, pairs=True),
        dpo(reference.linear_logp),
        {
            "sukhops": Provider(bench_vocab_head.sukhops_dpo, ours=True),
            "eager": Provider(dpo(reference.linear_logp), 16 * logits, "torch"),
            "torch.compile": harness.compiled(dpo(reference.linear_logp), 12 * logits),
            "Liger": Provider(bench_vocab_head.liger_dpo, 0, "liger-kernel", compiles=True),
        },
        lambda i: bench_vocab_head.products(i, 5), device=device,
    )  # fmt: skip
    growth = [
        logp_case("growth with V", shape | {"V": v}, device) for v in (32_768, 65_536, 131_072, 262_144)
    ]
    growth = [
        case._replace(providers={n: case.providers[n] for n in ("sukhops", "eager", "Liger")})
        for case in growth
    ]
    return [
        Measured(logp_case("linear_logp", shape, device),
                 [Goal(1.15), Goal(1.0, "Liger"), Goal(1.0, "CCE"), Goal(1.0, "CCE, unfiltered"),
                  Goal(1.0, "eager", "error"), Goal(1.5e9 / 2**20, field="memory_mib")]),
        Measured(frozen, [Goal(0.6)]),
        Measured(preference, [Goal(0.6, "Liger"), Goal(0.2, "Liger", "memory_mib")]),
        *map(Measured, growth),
    ]  # fmt: skip


def preference(device: str) -> list[Measured]:
    shape, small = tuple(roofline.LLAMA.values()), tuple(SMALL.values())
    where, logits = {"dtype": BF16, "device": device, "prompt": 0.0}, 1.0 * shape[0] * shape[2]
    kto = Case(
        "preference", "KTO with its mismatched batch", roofline.LLAMA, BF16,
        lambda: bench_preference.make_kto(*shape, **where, sequences=16),
        lambda: bench_preference.make_kto(*small, **where), bench_preference.eager_kto,
        {"sukhops": Provider(bench_preference.kto, ours=True),
         "eager": Provider(bench_preference.eager_kto, 24 * logits, "torch")},
        lambda i: bench_vocab_head.products(i, 7), device=device,
    )  # fmt: skip
    cringe = Case(
        "preference", "CRINGE, k = 5", roofline.LLAMA, BF16,
        lambda: bench_preference.make_cringe(*shape, 5, **where, sequences=16),
        lambda: bench_preference.make_cringe(*small, 1, **where), bench_preference.eager_cringe,
        {"sukhops": Provider(bench_preference.cringe, ours=True),
         "eager": Provider(bench_preference.eager_cringe, 24 * logits, "torch")},
        bench_preference.cringe_products, device=device,
    )  # fmt: skip
    return [Measured(kto, [Goal(1.25)]), Measured(cringe, [Goal(1.25)])]


def decoding_inputs(shape: dict, device: str) -> Inputs:
    g = torch.Generator(device).manual_seed(0)
    rows, d, v = (shape[n] for n in ("rows", "D", "V"))
    sizes = {"hidden": rows, "lm_weight": v, "cls_weight": v}
    return {
        n: (torch.randn(size, d, generator=g, device=device) * d ** (-0.5 if size == v else 0.0)).to(BF16)
        for n, size in sizes.items()
    }


def decoding_case(name: str, shape: dict, device: str) -> Case:
    decoding, logits = bench_director.decoding, 1.0 * shape["rows"] * shape["V"]
    return Case(
        "director", name, shape, BF16,
        lambda: decoding_inputs(shape, device), lambda: decoding_inputs(SMALL | {"rows": 8}, device),
        decoding(reference.director_topk),
        {
            "sukhops": Provider(decoding(sukhops.director_topk), ours=True),
            "eager": Provider(decoding(reference.director_topk), 24 * logits, "torch"),
            "torch.compile": harness.compiled(decoding(reference.director_topk), 16 * logits),
        },
        bench_director.copy, 21, ("fwd_nograd",), device,
    )  # fmt: skip


def director(device: str) -> list[Measured]:
    shape, small = tuple(roofline.LLAMA.values()), tuple(SMALL.values())
    eager = bench_director.eager_training(0.0)
    training = Case(
        "director", "Director training", roofline.LLAMA, BF16,
        lambda: bench_director.make_training(*shape, BF16, 1024, device),
        lambda: bench_director.make_training(*small, BF16, device=device), eager,
        {"sukhops": Provider(bench_director.training(0.0), ours=True),
         "eager": Provider(eager, 32.0 * shape[0] * shape[2], "torch")},
        bench_director.products(False), device=device,
    )  # fmt: skip
    decode = {"rows": 32, "D": 4096, "V": 128_256, "k": bench_director.K}
    by_rows = [decoding_case("decoding by rows", decode | {"rows": n}, device) for n in (1, 4, 16, 64, 256)]
    return [
        Measured(training, [Goal(1.25)]),
        Measured(decoding_case("director_topk", decode, device), [Goal(1 / 0.85)]),
        *map(Measured, by_rows),
    ]


def attention_inputs(shape: dict, device: str, learn_span: bool) -> Inputs:
    g = torch.Generator(device).manual_seed(0)
    size = [shape[n] for n in ("B", "H", "T", "d")]
    given = {n: torch.randn(*size, generator=g, device=device).to(BF16).requires_grad_() for n in "qkv"}
    span = torch.tensor(shape["spans"], device=device).requires_grad_(learn_span)
    return given | {"span": span, "ramp": torch.tensor(shape["ramp"])}


def adaptive(op: Callable) -> Callable:
    return lambda i: lambda: op(i["q"], i["k"], i["v"], i["span"], ramp=float(i["ramp"]))


def causal(i: Inputs):
    """Causal attention without spans by PyTorch's fused kernel: a different function, for comparison only."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(i["q"], i["k"], i["v"], is_causal=True)

    return call


def causal_step(i: Inputs):
    call, params = causal(i), [i[n] for n in "qkv"]
    return lambda: torch.autograd.grad(out := call(), params, torch.ones_like(out))


def flex(i: Inputs):
    """The same attention with FlexAttention: a block mask for each head's window, the ramp as score_mod."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    span, ramp, (_, heads, length, _) = i["span"], float(i["ramp"]), i["q"].shape
    window, hard = span.detach() + ramp, not span.requires_grad

    def seen(b, h, q, k):
        return (q >= k) & (q - k < window[h])

    def soft(score, b, h, q, k):
        return score + torch.log(((ramp + span[h] - (q - k)) / ramp).clamp(max=1.0))

    mask = create_block_mask(seen, None, heads, length, length, device=i["q"].device)
    attend = torch.compile(flex_attention)
    return lambda: attend(i["q"], i["k"], i["v"], score_mod=None if hard else soft, block_mask=mask)


def flex_step(i: Inputs):
    call, params = flex(i), [i[n] for n in "qkv"]
    return lambda: torch.autograd.grad(out := call(), params, torch.ones_like(out))


def attention_case(name: str, shape: dict, device: str, learn_span: bool, floor: Callable) -> Case:
    small = shape | {"B": 1, "T": 512, "H": 4, "spans": (20.0, 60.0, 100.0, 300.0)}
    if not learn_span:
        small["spans"] = (127.0,) * 4
    return Case(
        "adaptive_span", name, shape, BF16,
        lambda: attention_inputs(shape, device, learn_span),
        lambda: attention_inputs(small, device, learn_span), adaptive(reference.adaptive_span_attention),
        {
            "sukhops": Provider(adaptive(sukhops.adaptive_span_attention), ours=True),
            "FlexAttention": Provider(flex, 0, "torch", compiles=True),
            "SDPA, causal": Provider(causal, 0, "torch", same=False),
        },
        floor, 21, device=device,
    )  # fmt: skip


def adaptive_span(device: str) -> list[Measured]:
    window = roofline.ATTENTION
    soft, hard = (
        window | {"spans": roofline.SPANS, "ramp": 32.0},
        window | {"spans": (511.0,) * 16, "ramp": 1.0},
    )
    return [
        Measured(attention_case("adaptive spans", soft, device, True, causal_step),
                 [Goal(1 / 8), Goal(1 / 5, "FlexAttention")]),
        Measured(attention_case("one hard window", hard, device, False, flex_step), [Goal(1 / 0.85)]),
    ]  # fmt: skip


def segmentation_inputs(shape: dict, device: str) -> Inputs:
    g = torch.Generator(device).manual_seed(0)
    scores = torch.randn(*shape.values(), generator=g, device=device) - 3.0
    return {"scores": scores.requires_grad_()}


def torch_struct(i: Inputs):
    """Semi-Markov CRF with one class (C = 1) and lengths 1 to K; index 0 of its length axis is unused."""
    from torch_struct import SemiMarkovCRF

    length = i["scores"].shape[1]
    crosses = torch.arange(length).unsqueeze(1) + torch.arange(i["scores"].shape[2]) >= length
    crosses = crosses.to(i["scores"].device)

    def call():
        edges = F.pad(i["scores"].masked_fill(crosses, -1e5), (1, 0), value=-1e5)
        return SemiMarkovCRF(edges[..., None, None]).partition.flatten()

    return call


def segmentation_floor(i: Inputs):
    """Copies with the same memory traffic: scores are read twice, posteriors are written once."""
    scores, out = i["scores"].detach(), torch.ones_like(i["scores"])
    half = scores.flatten()[: scores.numel() // 2]
    return lambda: (out.copy_(scores), out.flatten()[: len(half)].copy_(half))


def segmentation_case(name: str, shape: dict, small: dict, device: str, **eager: Provider) -> Case:
    tree = 4.0 * shape["B"] * shape["T"] * shape["K"] ** 2 * 4  # bytes: K x K per position
    return Case(
        "segmentation", name, shape, torch.float32,
        lambda: segmentation_inputs(shape, device), lambda: segmentation_inputs(small, device),
        lambda i: lambda: reference.segmentation_logz(i["scores"]),
        {
            "sukhops": Provider(lambda i: lambda: sukhops.segmentation_logz(i["scores"]), ours=True),
            **eager,
            "torch-struct": Provider(torch_struct, 2 * math.log2(shape["T"]) * tree, "torch-struct"),
        },
        segmentation_floor, 21, device=device,
    )  # fmt: skip


def segmentation(device: str) -> list[Measured]:
    eager = Provider(lambda i: lambda: reference.segmentation_logz(i["scores"]), 0, "torch")
    batch, one = {"B": 32, "T": 8192, "K": 16}, {"B": 1, "T": 65_536, "K": 16}
    case = segmentation_case("segmentation_logz", batch, {"B": 3, "T": 50, "K": 4}, device, eager=eager)
    long = segmentation_case("one long sequence, in chunks", one, {"B": 1, "T": 1000, "K": 4}, device)
    return [
        Measured(case, [Goal(2.0), Goal(0.01, "torch-struct")]),
        Measured(long, [Goal(0.01, "torch-struct")]),
    ]


# operation: (function of sukhops that must exist, cases)
OPS: dict[str, tuple[str, Callable[[str], list[Measured]]]] = {
    "vocab_head": ("linear_logp", vocab_head),
    "preference": ("linear_logp", preference),
    "director": ("director_topk", director),
    "adaptive_span": ("adaptive_span_attention", adaptive_span),
    "segmentation": ("segmentation_logz", segmentation),
}


def missing(op: str) -> str | None:
    """Why an operation cannot be measured in this build, or None."""
    function = OPS[op][0]
    return None if hasattr(sukhops, function) else f"sukhops.{function} is not in this build"
