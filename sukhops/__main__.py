"""`python -m sukhops info` prints the build and each operator's backends; `check` tests every operator."""

import argparse
import platform
import sys
from collections.abc import Callable
from importlib import metadata, util
from typing import Any

import torch
from torch import Tensor

import sukhops
from sukhops import _checks, _library, losses, nn, reference, testing
from sukhops.losses.director import lm_target
from sukhops.ops import director as ops
from sukhops.reference import director as plain

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def vocab_head_inputs() -> dict:
    target = torch.randint(0, 1000, (65,))
    target[::4] = -100
    return {
        "hidden": torch.randn(65, 48).requires_grad_(),
        "weight": (0.2 * torch.randn(1000, 48)).requires_grad_(),
        "target": target,
        "bias": torch.randn(1000).requires_grad_(),
    }


def token_stats_inputs() -> dict:
    outputs = ("logp", "lse", "entropy", "log_sum_sq", "mean_logit")
    return vocab_head_inputs() | {"outputs": outputs, "softcap": 30.0, "temperature": 0.7}


def director_inputs() -> dict:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return 0.2 * torch.randn(*shape, generator=generator)

    return {
        "hidden": (5 * normal(9, 48)).requires_grad_(),
        "lm_weight": normal(1000, 48).requires_grad_(),
        "cls_weight": normal(1000, 48).requires_grad_(),
        "cls_bias": normal(1000).requires_grad_(),
        "gamma": normal(9).abs().requires_grad_(),
    }


def director_topk_inputs() -> dict:
    return {n: t.detach() for n, t in director_inputs().items()} | {
        "k": 5,
        "lm_bias": topk_inputs()["bias"].detach(),
    }


def topk_inputs() -> dict:
    given = vocab_head_inputs()
    del given["target"]
    bias = torch.zeros(1000)
    bias[::200] = 20.0 + 10.0 * torch.arange(5)  # far apart, so that rounding does not change their order
    return given | {"k": 5, "bias": bias.requires_grad_()}


def classifier_inputs() -> dict:
    inputs = vocab_head_inputs()
    return inputs | {"label": torch.arange(65) % 3 - 1}


def dpo_inputs() -> dict:
    inputs = vocab_head_inputs()
    rows = {n: inputs[n].detach()[:64].unflatten(0, (4, 16)) for n in ("hidden", "target")}
    return inputs | {
        "hidden": rows["hidden"].requires_grad_(),
        "target": rows["target"],
        "ref_logp": -5 * torch.rand(4),
    }


def kto_inputs() -> dict:
    desirable = torch.tensor([True, False, True, False])
    return dpo_inputs() | {"desirable": desirable, "ref_logp": -5 * torch.rand(4, 16), "kl": 0.1}


def step_kto_inputs() -> dict:
    steps = {"step_ids": (torch.arange(16) // 4).expand(4, 16)}
    return kto_inputs() | steps | {"step_labels": torch.arange(16).view(4, 4) % 3 - 1}


def on_log_probs(loss: Callable) -> Callable:
    """The reference of a loss module, from its function of log-probs and target."""

    def call(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor, **given: Any) -> Tensor:
        return loss(reference.linear_logp(hidden, weight, target, bias), target, **given).loss

    return call


def cringe_inputs() -> dict:
    given = topk_inputs() | {"target": vocab_head_inputs()["target"], "label": torch.arange(65) % 3 - 1}
    del given["k"]
    return given


def pairwise_inputs() -> dict:
    given = dpo_inputs() | {"temperature": 10.0}
    del given["ref_logp"]
    return given


def on_gaps(loss: Callable) -> Callable:
    """The reference of a CRINGE module, from its function of log-probs, gaps and target."""

    def call(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor, **given: Any) -> Tensor:
        logp = reference.linear_logp(hidden, weight, target, bias)
        best = reference.linear_topk(hidden, weight, 2, bias)
        rival = torch.where(best.indices[..., 0] == target, best.values[..., 1], best.values[..., 0])
        return loss(logp, logp + best.lse - rival, target, **given).loss

    return call


def director_loss_inputs() -> dict:
    given = classifier_inputs()
    return given | {"cls_weight": (0.2 * torch.randn(1000, 48)).requires_grad_()}


def director_loss_reference(
    hidden: Tensor, weight: Tensor, cls_weight: Tensor, target: Tensor, label: Tensor, bias: Tensor
) -> Tensor:
    logp = reference.linear_logp(hidden, weight, lm_target(target, label))
    logit, norm = plain.classifier_terms(hidden, cls_weight, target, label, bias)
    return losses.director_loss(logp, logit, target, label, norm=norm, norm_weight=0.3).loss


def span_inputs() -> dict:
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = {"q": normal(2, 4, 70, 48), "k": normal(2, 2, 90, 48), "v": normal(2, 2, 90, 48)}
    inputs |= {"span": torch.tensor([-9.0, 0.0, 20.5, 90.0]), "rel_pos": normal(80, 48)}
    return {n: t.requires_grad_() for n, t in inputs.items()}


def span_attention(op: Callable) -> Callable:
    def call(span: Tensor, **given: Any) -> Tensor:
        spans = span if span.dtype == torch.float64 else span.float()
        return op(span=spans, ramp=16.0, key_start=torch.tensor([0, 30], device=span.device), **given)

    return call


def segmentation_inputs() -> dict:
    scores = torch.randn(4, 60, 6)
    scores[torch.rand(scores.shape) < 0.2] = -torch.inf
    scores[..., 0] = 0.0  # every sequence has a segmentation
    return {"scores": scores.requires_grad_(), "lengths": torch.tensor([60, 0, 17, 59])}


def samples_covered(scores: Tensor, lengths: Tensor) -> Tensor:
    """Number of positions that each of three samples covers: [3, B]. The reference is `lengths_covered`."""
    samples = sukhops.segmentation_sample(scores, 3, lengths)
    return samples.sum(-1).to(_checks.accumulation_dtype(scores.dtype))


def lengths_covered(scores: Tensor, lengths: Tensor) -> Tensor:
    return lengths.expand(3, -1).to(_checks.accumulation_dtype(scores.dtype))


def segmentation_loss_inputs() -> dict:
    inputs = vocab_head_inputs()
    units = torch.randint(-1, 1000, (4, 16, 3))
    units[..., 0] = units[..., 0].abs()  # every character is a unit
    return {
        "hidden": inputs["hidden"].detach()[:64].unflatten(0, (4, 16)).requires_grad_(),
        "weight": inputs["weight"],
        "unit_ids": units,
        "bias": inputs["bias"],
        "lengths": torch.tensor([16, 0, 7, 12]),
    }


def segmentation_loss_reference(
    hidden: Tensor, weight: Tensor, unit_ids: Tensor, bias: Tensor, lengths: Tensor
) -> Tensor:
    logp = reference.linear_logp(hidden, weight, losses.unit_targets(unit_ids, lengths), bias)
    return losses.segmentation_loss(logp, unit_ids, lengths=lengths).loss


# name, registered operators that it calls, function under test, its reference, function that makes the inputs
OPS: list[tuple[str, list[str], Callable, Callable, Callable[[], dict]]] = [
    ("linear_logp", ["vocab_head", "vocab_head_backward"], sukhops.linear_logp, reference.linear_logp,
     vocab_head_inputs),
    ("linear_token_stats", ["vocab_head", "vocab_head_backward"],
     sukhops.linear_token_stats, reference.linear_token_stats, token_stats_inputs),
    ("linear_topk", ["vocab_head", "vocab_head_backward"], sukhops.linear_topk, reference.linear_topk,
     topk_inputs),
    ("DPOLoss", ["vocab_head", "vocab_head_backward"],
     lambda **given: nn.DPOLoss()(**given).loss, on_log_probs(losses.dpo_loss), dpo_inputs),
    ("KTOLoss", ["vocab_head", "vocab_head_backward"],
     lambda **given: nn.KTOLoss()(**given).loss, on_log_probs(losses.kto_loss), kto_inputs),
    ("StepKTOLoss", ["vocab_head", "vocab_head_backward"],
     lambda **given: nn.StepKTOLoss()(**given).loss, on_log_probs(losses.step_kto_loss), step_kto_inputs),
    ("CringeLoss", ["vocab_head", "vocab_head_backward"],
     lambda **given: nn.CringeLoss()(**given).loss, on_gaps(losses.cringe_loss), cringe_inputs),
    ("PairwiseCringeLoss", ["vocab_head", "vocab_head_backward"],
     lambda temperature, **given: nn.PairwiseCringeLoss(temperature=temperature)(**given).loss,
     on_gaps(losses.pairwise_cringe_loss), pairwise_inputs),
    ("DirectorLoss", ["vocab_head", "vocab_head_backward", "director_norm", "director_norm_backward"],
     lambda weight, bias, **given: nn.DirectorLoss(norm_weight=0.3)(
         lm_weight=weight, cls_bias=bias, **given
     ).loss,
     director_loss_reference, director_loss_inputs),
    ("SegmentationLoss", ["vocab_head", "vocab_head_backward", "segmentation_logz", "segmentation_marginals"],
     lambda **given: nn.SegmentationLoss()(**given).loss, segmentation_loss_reference,
     segmentation_loss_inputs),
    ("director_logp", ["director", "director_backward"],
     sukhops.director_logp, reference.director_logp, director_inputs),
    ("director_topk", ["director_topk"],
     sukhops.director_topk, reference.director_topk, director_topk_inputs),
    ("classifier_logit", ["director_dot", "director_dot_backward"],
     ops.classifier_logit, plain.classifier_logit, classifier_inputs),
    ("classifier_terms", ["director_norm", "director_norm_backward"],
     ops.classifier_terms, plain.classifier_terms, classifier_inputs),
    ("adaptive_span_attention", ["adaptive_span", "adaptive_span_backward"],
     span_attention(sukhops.adaptive_span_attention), span_attention(reference.adaptive_span_attention),
     span_inputs),
    ("segmentation_logz", ["segmentation_logz", "segmentation_marginals"],
     sukhops.segmentation_logz, reference.segmentation_logz, segmentation_inputs),
    ("segmentation_marginals", ["segmentation_marginals", "segmentation_marginals_backward"],
     sukhops.segmentation_marginals, reference.segmentation_marginals, segmentation_inputs),
    ("segmentation_entropy", ["segmentation_entropy", "segmentation_entropy_backward"],
     sukhops.segmentation_entropy, reference.segmentation_entropy, segmentation_inputs),
    ("segmentation_viterbi", ["segmentation_viterbi"],
     sukhops.segmentation_viterbi, reference.segmentation_viterbi, segmentation_inputs),
    ("segmentation_sample", ["segmentation_sample"], samples_covered, lengths_covered, segmentation_inputs),
]  # fmt: skip


def backend(operator: str, device: str) -> str:
    """The implementation of `operator` on `device` ("cpu" or "cuda") in this installation."""
    if device == "cpu":
        return "C++" if torch._C._dispatch_has_kernel_for_dispatch_key(f"sukhops::{operator}", "CPU") else "-"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"sukhops::{operator}", "CUDA"):
        return "-"
    if not torch.cuda.is_available():
        return "no CUDA device"
    if operator not in _library.launched:
        return "CUDA C++"
    return "Triton" if util.find_spec("triton") else "Triton is not installed"


def info() -> int:
    print(f"sukhops   {sukhops.__version__} in {sukhops.__path__[0]}")
    print(f"python    {platform.python_version()} on {platform.machine()}")
    print(f"torch     {torch.__version__}, {torch.get_num_threads()} threads")
    for package in ("triton", "numpy"):
        try:
            print(f"{package:<9} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"{package:<9} not installed")
    print(f"cuda      {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no device'}")
    print(f"_C        built, CPU kernels for {torch.ops.sukhops.cpu_capability()}")
    print(f"_C_cuda   {'built' if _library.has_cuda_library else 'not built'}")
    operators = sorted({o for _, operators, *_ in OPS for o in operators})
    width = max(map(len, operators)) + 2
    print(f"\n{'op':<{width}}{'cpu':<10}cuda")
    for operator in operators:
        print(f"{operator:<{width}}{backend(operator, 'cpu'):<10}{backend(operator, 'cuda')}")
    return 0


def check() -> int:
    """Compares each op and its gradients with the reference. Returns 1 if any error exceeds its budget."""
    compared = failed = 0
    print(f"{'op':<26}{'device':<8}{'dtype':<10}{'result':<18}{'max error':>12}{'budget':>12}")
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        for name, _, op, ref, make in OPS:
            for dtype in DTYPES:
                torch.manual_seed(0)
                inputs = {
                    n: t.detach().to(device).requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t
                    for n, t in make().items()
                }
                for row in testing.compare(op, ref, inputs, dtype):
                    compared, failed = compared + 1, failed + (not row.ok)
                    print(
                        f"{name:<26}{device:<8}{str(dtype).removeprefix('torch.'):<10}{row.name:<18}"
                        f"{row.error:>12.2e}{row.budget:>12.2e}  {'pass' if row.ok else 'FAIL'}"
                    )
    print(f"{failed} of {compared} FAILED" if failed else f"all {compared} pass")
    return int(failed > 0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sukhops", description=__doc__)
    parser.add_argument("command", choices=["info", "check"])
    return {"info": info, "check": check}[parser.parse_args().command]()


if __name__ == "__main__":
    sys.exit(main())
