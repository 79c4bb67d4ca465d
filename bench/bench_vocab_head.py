"""vocab_head: DPO with a reference model, log-probs in four modes and by rows, a frozen head, growth with V.

`python bench/bench_vocab_head.py` runs the main cases, with `--all` all cases; `pytest bench` runs them with
pytest-benchmark.
"""

import harness
import torch
import torch.nn.functional as F
from harness import Case, Inputs, Provider, test_provider  # noqa: F401  (pytest bench runs it)

import sukhops
from sukhops import reference

BETA = 0.1


def make(
    rows: int, d: int, v: int, dtype: torch.dtype, *, pairs: bool = False, frozen: bool = False,
    sequences: int = 8, prompt: float = 0.25, device: str = "cpu",
) -> Inputs:  # fmt: skip
    """`rows` tokens in sequences; the first part of each, the prompt, is ignored."""
    g = torch.Generator(device).manual_seed(0)
    sequences = min(sequences, rows)
    t = rows // sequences
    shape = (sequences, t)
    target = torch.randint(0, v, shape, generator=g, device=device)
    target[:, : int(t * prompt)] = -100

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g, device=device)

    inputs = {
        "hidden": normal(*shape, d).to(dtype).requires_grad_(),
        "weight": (normal(v, d) * d**-0.5).to(dtype).requires_grad_(not frozen),
        "target": target,
    }
    if pairs:
        inputs["ref_hidden"] = normal(*shape, d).to(dtype)
        inputs["ref_weight"] = (normal(v, d) * d**-0.5).to(dtype)
    return inputs


def products(inputs: Inputs, count: int):
    """`count` bare products of rows that are not ignored: forwards, dhidden, dweight; buffers are reused."""
    kept = inputs["target"] != -100
    h, w = inputs["hidden"].detach()[kept], inputs["weight"].detach()
    z = h.new_ones(h.shape[0], w.shape[0])
    dh, dw = torch.ones_like(h), torch.ones_like(w)

    def call():
        for _ in range(count - 2):
            torch.mm(h, w.T, out=z)
        torch.mm(z, w, out=dh)
        torch.mm(z.T, h, out=dw)

    return call


def dpo(logp):
    """DPO computed with a log-prob function."""

    def provider(i: Inputs):
        def call():
            policy = logp(i["hidden"], i["weight"], i["target"]).sum(-1)
            with torch.no_grad():
                base = logp(i["ref_hidden"], i["ref_weight"], i["target"]).sum(-1)
            chosen, rejected = (policy - base).chunk(2)
            return -F.logsigmoid(BETA * (chosen - rejected)).mean()

        return call

    return provider


def weighted(logp):
    """Log-probs with a random upstream gradient."""

    def provider(i: Inputs):
        upstream = torch.randn(i["target"].shape, generator=torch.Generator().manual_seed(1))
        upstream = upstream.to(i["target"].device)
        return lambda: (logp(i["hidden"], i["weight"], i["target"]) * upstream).sum()

    return provider


def linear_cross_entropy(hidden, weight, target):
    loss = F.linear_cross_entropy(
        hidden.flatten(0, 1), weight, target.flatten(), reduction="none", ignore_index=-100,
        options=torch.nn.LinearCrossEntropyOptions(),
    )  # fmt: skip
    return -loss.reshape(target.shape).float()


def ignored_dropped(hidden, weight, target):
    """Eager log-probs; drops ignored rows before the product."""
    kept = target != -100
    return torch.zeros(target.shape).masked_scatter(
        kept, reference.linear_logp(hidden[kept], weight, target[kept])
    )


def trl_logp(hidden, weight, target):
    """The function that TRL's trainers call, with its defaults; it also computes ignored rows."""
    from trl.kernels import ChunkedLogProbFunction

    rows = hidden.flatten(0, 1), weight, None, target.flatten().clamp(min=0)
    logp = ChunkedLogProbFunction.apply(*rows, 1.0, 8192, None, 1.0, ())[0]
    return logp.reshape(target.shape).masked_fill(target == -100, 0.0)


FIVE = ("logp", "entropy", "log_sum_sq", "mean_logit", "top1")


def statistics(stats):
    """The five numbers per token of FIVE; the first two get random upstream gradients."""

    def provider(i: Inputs):
        g = torch.Generator().manual_seed(1)
        upstream, of_entropy = (torch.randn(i["target"].shape, generator=g) for _ in range(2))

        def call():
            logp, entropy, *others = stats(i["hidden"], i["weight"], i["target"])
            return (logp * upstream + entropy * of_entropy).sum() + sum(t.double().mean() for t in others)

        return call

    return provider


def ours(stats):
    def call(hidden, weight, target):
        found = stats(hidden, weight, target, outputs=FIVE)
        return [getattr(found, name) for name in FIVE]

    return call


def trl_stats(hidden, weight, target):
    from trl.kernels import ChunkedLogProbFunction

    names = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    rows = hidden.flatten(0, 1), weight, None, target.flatten()
    return [t.reshape(target.shape) for t in ChunkedLogProbFunction.apply(*rows, 1.0, 8192, None, 1.0, names)]


def statistics_case(name: str, rows: int, d: int = 576, v: int = 49152) -> Case:
    """Five numbers per token; the floor is the call that returns log-probs only."""
    dtype = torch.float32

    def logp_alone(i: Inputs):
        call = weighted(sukhops.linear_logp)(i)
        return lambda: torch.autograd.grad(call(), (i["hidden"], i["weight"]))

    return Case(
        "vocab_head", name, {"rows": rows, "D": d, "V": v}, dtype,
        lambda: make(rows, d, v, dtype, prompt=0.0), lambda: make(256, d, v // 16, dtype, prompt=0.0),
        statistics(ours(reference.linear_token_stats)),
        {
            "sukhops": Provider(statistics(ours(sukhops.linear_token_stats)), ours=True),
            "eager": Provider(statistics(ours(reference.linear_token_stats)), 40.0 * rows * v, "torch"),
            "TRL": Provider(statistics(trl_stats), 8.0 * rows * 8192, "trl"),
        },
        logp_alone, rounds=5,
    )  # fmt: skip


def offset_case(offset: float = 1e4, rows: int = 256, v: int = 32768) -> Case:
    """Logits are small integers plus an offset, so that rounding in an implementation shows as error."""

    def inputs() -> Inputs:
        weight = torch.stack([torch.arange(v) % 7, torch.ones(v)], 1).float()
        hidden = torch.tensor([1.0, offset]).repeat(1, rows, 1)
        target = torch.arange(rows).unsqueeze(0)
        return {"hidden": hidden, "weight": weight, "target": target}

    def one(logp):
        return lambda i: lambda: logp(i["hidden"], i["weight"], i["target"]).mean()

    return Case(
        "vocab_head", "a log-prob with an offset of 10,000", {"rows": rows, "D": 2, "V": v}, torch.float32,
        inputs, inputs, one(reference.linear_logp),
        {
            "sukhops": Provider(one(sukhops.linear_logp), ours=True),
            "eager": Provider(one(reference.linear_logp), 20.0 * rows * v, "torch"),
            "TRL": Provider(one(trl_logp), 8.0 * rows * 8192, "trl"),
        },
        modes=("fwd_nograd",), rounds=5,
    )  # fmt: skip


def weighting_case(rows: int = 2048, d: int = 576, v: int = 49152) -> Case:
    """DPO with pairs weighted by the policy's likelihood (WPO); the floor is DPO without weights."""
    dtype = torch.float32

    def with_weighting(i: Inputs):
        loss = sukhops.nn.DPOLoss(beta=BETA, use_weighting=True)
        head = [i[n] for n in ("hidden", "weight", "target")]
        return lambda: loss(*head, ref_hidden=i["ref_hidden"], ref_weight=i["ref_weight"]).loss

    def eager(i: Inputs):
        loss = sukhops.losses.dpo_loss

        def call():
            stats = reference.linear_token_stats(
                i["hidden"], i["weight"], i["target"], outputs=("logp", "log_sum_sq")
            )
            with torch.no_grad():
                ref = reference.linear_logp(i["ref_hidden"], i["ref_weight"], i["target"])
            squares = stats.log_sum_sq
            return loss(
                stats.logp, i["target"], ref, beta=BETA, use_weighting=True, log_sum_squares=squares
            ).loss

        return call

    def without(i: Inputs):
        call = sukhops_dpo(i)
        return lambda: torch.autograd.grad(call(), (i["hidden"], i["weight"]))

    return Case(
        "vocab_head", "DPO with use_weighting, over DPO", {"rows": rows, "D": d, "V": v}, dtype,
        lambda: make(rows, d, v, dtype, pairs=True, prompt=0.0),
        lambda: make(256, d, v // 16, dtype, pairs=True, prompt=0.0), eager,
        {
            "sukhops": Provider(with_weighting, ours=True),
            "eager": Provider(eager, 40.0 * rows * v, "torch"),
        },
        without, rounds=5,
    )  # fmt: skip


def liger_dpo(i: Inputs):
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=BETA)
    return lambda: loss(
        i["weight"], i["hidden"], i["target"], ref_input=i["ref_hidden"], ref_weight=i["ref_weight"]
    )[0]


def sukhops_dpo(i: Inputs):
    loss = sukhops.nn.DPOLoss(beta=BETA)
    return lambda: (
        loss(
            i["hidden"], i["weight"], i["target"], ref_hidden=i["ref_hidden"], ref_weight=i["ref_weight"]
        ).loss
    )


def dpo_case(
    dtype: torch.dtype, rows: int = 4096, name: str = "DPO with a reference model", d: int = 512,
    v: int = 32768,
) -> Case:  # fmt: skip
    logits = 4.0 * rows * v
    chunked = Provider(dpo(linear_cross_entropy), logits, "torch", seconds=15)
    return Case(
        "vocab_head", name, {"rows": rows, "D": d, "V": v}, dtype,
        lambda: make(rows, d, v, dtype, pairs=True),
        lambda: make(256, d, v // 4, dtype, pairs=True),
        dpo(reference.linear_logp),
        {
            "sukhops": Provider(sukhops_dpo, ours=True),
            "eager": Provider(dpo(reference.linear_logp), 5 * logits, "torch"),
            "torch.compile": harness.compiled(dpo(reference.linear_logp), 3 * logits),
            "Liger": Provider(liger_dpo, logits, "liger-kernel"),
            "TRL": Provider(dpo(trl_logp), 8.0 * rows * 8192, "trl"),
        }
        | ({"F.linear_cross_entropy": chunked} if dtype == torch.float32 else {}),
        lambda i: products(i, 5),
    )  # fmt: skip


def logp_case(
    name: str, dtype: torch.dtype, rows: int, d: int, v: int, modes: tuple[str, ...] = ("fwd_bwd",),
    prompt: float = 0.25,
) -> Case:  # fmt: skip
    providers = {
        "sukhops": Provider(weighted(sukhops.linear_logp), ours=True),
        "eager": Provider(weighted(reference.linear_logp), 20.0 * rows * v, "torch"),
        "TRL": Provider(weighted(trl_logp), 8.0 * rows * 8192, "trl"),
    }
    if prompt:
        providers["eager, ignored dropped"] = Provider(weighted(ignored_dropped), 20.0 * rows * v, "torch")
    return Case(
        "vocab_head", name, {"rows": rows, "D": d, "V": v}, dtype,
        lambda: make(rows, d, v, dtype, prompt=prompt),
        lambda: make(min(rows, 256), d, v // 4, dtype, prompt=prompt),
        weighted(reference.linear_logp), providers, lambda i: products(i, 3), rounds=5, modes=modes,
    )  # fmt: skip


def by_rows(dtype: torch.dtype, d: int, v: int = 32768) -> list[Case]:
    """Forward and backward of log-probs, no row ignored. The floor is the three products of eager PyTorch."""
    name = f"by rows D {d} {str(dtype).removeprefix('torch.')}"
    return [logp_case(name, dtype, rows, d, v, prompt=0.0) for rows in (1, 4, 16, 64, 256, 1024, 4096)]


def by_budget(rows: int = 1024, d: int = 512, v: int = 32768) -> list[Case]:
    """The same call with logits budgets from 1 MiB to the size of all logits."""
    dtype = torch.float32

    def with_budget(mib: int):
        def provider(i: Inputs):
            call = weighted(sukhops.linear_logp)(i)

            def budgeted():
                before = sukhops.set_logits_budget(mib << 20)
                try:
                    return call()
                finally:
                    sukhops.set_logits_budget(before)

            return budgeted

        return provider

    return [
        Case(
            "vocab_head", "by budget", {"rows": rows, "D": d, "V": v, "MiB of logits": mib}, dtype,
            lambda: make(rows, d, v, dtype, prompt=0.0), lambda: make(256, d, v // 4, dtype, prompt=0.0),
            weighted(reference.linear_logp),
            {
                "sukhops": Provider(with_budget(mib), ours=True),
                "eager": Provider(weighted(reference.linear_logp), 20.0 * rows * v, "torch"),
            },
            lambda i: products(i, 3), rounds=5,
        )
        for mib in (1, 32, 64, 96, 128)
    ]  # fmt: skip


def unfrozen(inputs: Inputs):
    """The same log-probs with a weight that requires a gradient."""
    given = inputs | {"weight": inputs["weight"].detach().requires_grad_()}
    call = weighted(sukhops.linear_logp)(given)
    return lambda: torch.autograd.grad(call(), (given["hidden"], given["weight"]))


def frozen_case(rows: int = 4096, d: int = 512, v: int = 32768) -> Case:
    dtype = torch.float32
    return Case(
        "vocab_head", "frozen weight, over one that learns", {"rows": rows, "D": d, "V": v}, dtype,
        lambda: make(rows, d, v, dtype, frozen=True), lambda: make(256, d, v // 4, dtype, frozen=True),
        weighted(reference.linear_logp),
        {"sukhops": Provider(weighted(sukhops.linear_logp), ours=True)}, unfrozen,
    )  # fmt: skip


def cases() -> list[Case]:
    both = (torch.float32, torch.bfloat16)
    return [
        *(dpo_case(dtype) for dtype in both),
        *(
            dpo_case(dtype, rows, f"DPO, {rows:,} rows")._replace(
                main=dtype == torch.float32 and rows == 1024
            )
            for dtype in both
            for rows in (256, 1024)
        ),
        frozen_case(),
        logp_case("log-probs in four modes", torch.float32, 512, 512, 32768, harness.MODES)._replace(
            main=True
        ),
        *(logp_case("growth with V", torch.float32, 256, 512, v) for v in (8192, 32768, 131072)),
        *(c for d in (512, 2048) for dtype in both for c in by_rows(dtype, d)),
        *by_budget(),
        statistics_case("five numbers per token, over log-probs alone", 2048),
        statistics_case("five numbers per token, 256 rows", 256)._replace(main=True),
        weighting_case(),
        offset_case(),
        *(
            logp_case("growth with V, D = 1,024", dtype, 2048, 1024, v)
            for dtype in both
            for v in (32768, 65536, 131072, 262144)
        ),
    ]


if __name__ == "__main__":
    harness.main("vocab_head", cases())
