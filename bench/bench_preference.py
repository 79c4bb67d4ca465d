"""KTO and CRINGE with the head, and the cost of all losses on given log-probs relative to the head.

`python bench/bench_preference.py` runs the main case, with `--all` all cases.
"""

import bench_vocab_head
import harness
import torch
from harness import Case, Inputs, Provider, test_provider  # noqa: F401  (pytest bench runs it)

import sukhops
from sukhops import losses, reference

ROWS, D, V, K = 4096, 512, 32768, 5
SMALL = (256, 64, 4096)


def labels(inputs: Inputs) -> torch.Tensor:
    """One label per sequence: 1 positive (desirable), 0 negative."""
    return torch.arange(len(inputs["target"]), device=inputs["target"].device) % 2


def make_kto(rows: int, d: int, v: int, dtype: torch.dtype = torch.float32, **where) -> Inputs:
    inputs = bench_vocab_head.make(rows, d, v, dtype, pairs=True, **where)
    hidden = inputs["hidden"].detach()
    other = {"kl_hidden": hidden.flip(0), "kl_ref_hidden": inputs["ref_hidden"].flip(0)}
    return (
        inputs | other | {"kl_target": losses.mismatched(inputs["target"]), "desirable": labels(inputs) == 1}
    )


def kto(i: Inputs):
    loss = sukhops.nn.KTOLoss()
    return lambda: loss(**i).loss


def eager_kto(i: Inputs):
    def call():
        logp = reference.linear_logp(i["hidden"], i["weight"], i["target"])
        with torch.no_grad():
            ref = reference.linear_logp(i["ref_hidden"], i["ref_weight"], i["target"])
            kl = reference.linear_logp(i["kl_hidden"], i["weight"], i["kl_target"])
            kl_ref = reference.linear_logp(i["kl_ref_hidden"], i["ref_weight"], i["kl_target"])
        point = losses.Mismatched(i["kl_target"], kl, kl_ref)
        return losses.kto_loss(logp, i["target"], i["desirable"], ref, kl=point).loss

    return call


def make_cringe(rows: int, d: int, v: int, k: int, dtype: torch.dtype = torch.float32, **where) -> Inputs:
    inputs = bench_vocab_head.make(rows, d, v, dtype, **where)
    return inputs | {"k": torch.tensor(k), "label": labels(inputs)}


def cringe(i: Inputs):
    loss = sukhops.nn.CringeLoss(k=int(i["k"]))
    return lambda: loss(i["hidden"], i["weight"], i["target"], i["label"]).loss


def eager_cringe(i: Inputs):
    """Computes all logits, then log-softmax, top k + 1 of every row, and a gather."""

    def call():
        logits = i["hidden"] @ i["weight"].T
        target = i["target"].clamp(min=0).unsqueeze(-1)
        logp = logits.log_softmax(-1).gather(-1, target).squeeze(-1)
        values, indices = logits.topk(int(i["k"]) + 1)
        index = losses.cringe.sample_rival(values, indices, i["target"]).unsqueeze(-1)
        gap = logits.gather(-1, target) - values.gather(-1, index)
        return losses.cringe_loss(logp, gap.squeeze(-1), i["target"], i["label"]).loss

    return call


def cringe_products(i: Inputs):
    """Four products of the positive rows, one of the negative rows."""
    kept, negative = i["target"] != -100, (i["label"] == 0).unsqueeze(1)
    four = bench_vocab_head.products(i | {"target": i["target"].masked_fill(negative, -100)}, 4)
    h, w = i["hidden"].detach()[kept & negative], i["weight"].detach()
    z = h.new_ones(h.shape[0], w.shape[0])

    def call():
        four()
        torch.mm(h, w.T, out=z)

    return call


def make_epilogues(rows: int, d: int, v: int) -> Inputs:
    inputs = bench_vocab_head.make(rows, d, v, torch.float32)
    g = torch.Generator().manual_seed(1)
    inputs["logp"], inputs["ref"], inputs["gap"] = (
        torch.randn(inputs["target"].shape, generator=g) for _ in range(3)
    )
    frozen = {n: t.detach() if t.is_floating_point() else t for n, t in inputs.items()}
    return frozen | {"logp": frozen["logp"].requires_grad_(), "gap": frozen["gap"].requires_grad_()}


def epilogues(i: Inputs):
    """Computes every loss from the same log-probs."""
    target, ref = i["target"], i["ref"]
    steps = (torch.arange(target.shape[1]) // 32).expand(target.shape)
    label = labels(i)
    step_labels = label.unsqueeze(1).expand(-1, int(steps.max()) + 1)

    def call():
        logp, gap = i["logp"], i["gap"]
        return (
            losses.dpo_loss(logp, target, ref).loss
            + losses.step_kto_loss(logp, target, label == 1, steps, step_labels, ref, kl=0.1).loss
            + losses.cringe_loss(logp, gap, target, label).loss
            + losses.pairwise_cringe_loss(logp, gap, target).loss
        )

    return call


def head(i: Inputs):
    """Forward and backward of the head that computes the log-probs."""
    hidden, weight = (i[n].detach().requires_grad_() for n in ("hidden", "weight"))
    return lambda: torch.autograd.grad(
        sukhops.linear_logp(hidden, weight, i["target"]).sum(), (hidden, weight)
    )


def cringe_case(name: str, rows: int) -> Case:
    return Case(
        "preference", name, {"rows": rows, "D": D, "V": V}, torch.float32,
        lambda: make_cringe(rows, D, V, K), lambda: make_cringe(*SMALL, 1), eager_cringe,
        {
            "sukhops": Provider(cringe, ours=True),
            "eager": Provider(eager_cringe, 20.0 * rows * V, "torch"),
        },
        cringe_products,
    )  # fmt: skip


def kto_case(name: str, rows: int) -> Case:
    return Case(
        "preference", name, {"rows": rows, "D": D, "V": V}, torch.float32,
        lambda: make_kto(rows, D, V), lambda: make_kto(*SMALL), eager_kto,
        {"sukhops": Provider(kto, ours=True)}, lambda i: bench_vocab_head.products(i, 7),
    )  # fmt: skip


def cases() -> list[Case]:
    return [
        cringe_case("CRINGE, k = 5", ROWS),
        *(cringe_case(f"CRINGE, {rows:,} rows", rows)._replace(main=rows == 1024) for rows in (256, 1024)),
        kto_case("KTO with its mismatched batch", ROWS),
        *(kto_case(f"KTO, {rows:,} rows", rows) for rows in (256, 1024)),
        Case(
            "preference", "epilogues of all losses, over one head", {"rows": ROWS, "D": D, "V": V},
            torch.float32, lambda: make_epilogues(ROWS, D, V), lambda: make_epilogues(*SMALL), epilogues,
            {"sukhops": Provider(epilogues, ours=True)}, head, rounds=3,
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    harness.main("preference", cases())
