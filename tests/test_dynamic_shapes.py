"""Every operator and loss compiles once for all lengths and can be exported with dynamic shapes."""

from collections.abc import Callable

import pytest
import torch
from budgets import logits_budget
from torch import Tensor, nn
from torch.export import Dim, export

import sukhops
from sukhops.nn import (
    CringeLoss,
    DirectorLoss,
    DPOLoss,
    KTOLoss,
    PairwiseCringeLoss,
    SegmentationLoss,
    StepKTOLoss,
)
from sukhops.ops.director import classifier_terms

V, D, B = 40, 8, 4
LENGTHS = (5, 6, 7, 9, 11, 13, 17)
WEIGHT, OTHER = torch.randn(2, V, D, generator=torch.Generator().manual_seed(0))
LABEL, SPAN = torch.tensor([1, 0, -1, 0]), torch.tensor([3.0, 4.5])
DPO, LD, SIMPO = DPOLoss(), DPOLoss(ld_alpha=0.5, use_weighting=True), DPOLoss(loss_type="simpo")
KTO_LOSS, STEP_KTO = KTOLoss(), StepKTOLoss()
CRINGE, SAMPLED, PAIRWISE = CringeLoss(k=1), CringeLoss(k=3), PairwiseCringeLoss(k=1)
DIRECTOR, SEGMENTATION = DirectorLoss(norm_weight=0.1), SegmentationLoss()
KTO = {"desirable": torch.tensor([True, False, True, True]), "ref_weight": OTHER, "kl": torch.tensor(0.1)}


def hidden(t: int) -> Tensor:
    return torch.randn(B, t, D)


def target(t: int) -> Tensor:
    return torch.randint(0, V, (B, t)).index_fill(1, torch.tensor([0]), -100)


def rows(t: int) -> tuple[Tensor, Tensor]:
    return hidden(t), target(t)


def scores(t: int) -> tuple[Tensor]:
    return (torch.randn(3, t, 4),)


def with_reference(t: int) -> tuple[Tensor, Tensor, Tensor]:
    return *rows(t), hidden(t)


def with_steps(t: int) -> tuple[Tensor, ...]:
    return *with_reference(t), (torch.arange(t) % 2).expand(B, t)


# a function of tensors, and a function that makes its inputs for a length
CASES: dict[str, tuple[Callable, Callable]] = {
    "linear_logp": (lambda h, y: sukhops.linear_logp(h, WEIGHT, y), rows),
    "linear_topk": (lambda h: sukhops.linear_topk(h, WEIGHT, 3).values, lambda t: (hidden(t),)),
    "linear_token_stats": (
        lambda h, y: sukhops.linear_token_stats(h, WEIGHT, y, outputs=("logp", "entropy")).entropy, rows,
    ),
    "director_logp": (lambda h: sukhops.director_logp(h, WEIGHT, OTHER, gamma=1.0), lambda t: (hidden(t),)),
    "director_topk": (
        lambda h: sukhops.director_topk(h, WEIGHT, OTHER, 3, gamma=1.0).values, lambda t: (hidden(t),),
    ),
    "adaptive_span_attention": (
        lambda q: sukhops.adaptive_span_attention(q, q, q, SPAN),
        lambda t: (torch.randn(1, 2, t, D),),
    ),
    "segmentation_logz": (sukhops.segmentation_logz, scores),
    "segmentation_marginals": (sukhops.segmentation_marginals, scores),
    "segmentation_entropy": (sukhops.segmentation_entropy, scores),
    "segmentation_viterbi": (lambda s: sukhops.segmentation_viterbi(s).score, scores),
    "segmentation_sample": (lambda s: sukhops.segmentation_sample(s, 3), scores),
    "classifier_terms": (
        lambda h, y: sum(classifier_terms(h, WEIGHT, y, LABEL.unsqueeze(1).expand(y.shape))), rows,
    ),
    "DPOLoss": (
        lambda h, y, r: DPO(h, WEIGHT, y, ref_hidden=r, ref_weight=OTHER).loss, with_reference,
    ),
    "DPOLoss, by tokens": (
        lambda h, y, r: LD(h, WEIGHT, y, ref_hidden=r, ref_weight=OTHER).loss, with_reference,
    ),
    "DPOLoss, simpo": (lambda h, y: SIMPO(h, WEIGHT, y).loss, rows),
    "KTOLoss": (lambda h, y, r: KTO_LOSS(h, WEIGHT, y, ref_hidden=r, **KTO).loss, with_reference),
    "StepKTOLoss": (
        lambda h, y, r, s: STEP_KTO(
            h, WEIGHT, y, ref_hidden=r, step_ids=s, step_labels=torch.ones(B, 2, dtype=torch.int64), **KTO
        ).loss,
        with_steps,
    ),
    "CringeLoss": (lambda h, y: CRINGE(h, WEIGHT, y, LABEL).loss, rows),
    "CringeLoss, sampled": (lambda h, y: SAMPLED(h, WEIGHT, y, LABEL).loss, rows),
    "PairwiseCringeLoss": (lambda h, y: PAIRWISE(h, WEIGHT, y).loss, rows),
    "SegmentationLoss": (
        lambda h, u: SEGMENTATION(h, WEIGHT, u).loss,
        lambda t: (hidden(t), torch.randint(-1, V, (B, t, 3))),
    ),
    "DirectorLoss": (lambda h, y: DIRECTOR(h, WEIGHT, OTHER, y, LABEL).loss, rows),
}  # fmt: skip
cases = pytest.mark.parametrize("name", CASES)


def seeded(compiled: Callable, call: Callable, given: tuple) -> list[Tensor]:
    """The results of both functions, whose random numbers are the same."""
    results = []
    for f in (compiled, call):
        torch.manual_seed(0)
        results.append(f(*given))
    return results


@cases
def test_compiled_once_for_all_lengths(name):
    call, make = CASES[name]
    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counting)
    for t in LENGTHS:
        given = make(t)
        torch.testing.assert_close(*seeded(compiled, call, given))
    assert len(graphs) == 1


@pytest.mark.parametrize("name, limit", [("linear_logp", 30), ("classifier_terms", 120)])
def test_one_graph_within_the_logits_budget_and_beyond(name, limit):
    """The head keeps up to 30 rows of 20 to 68, and so does the norm, with a quarter of the budget."""
    functions = {
        "linear_logp": lambda h, y, w: sukhops.linear_logp(h, w, y),
        "classifier_terms": lambda h, y, w: sum(classifier_terms(h, w, y, y.clamp(max=1))),
    }
    call, weight, graphs = functions[name], WEIGHT.clone().requires_grad_(), []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counting)
    with logits_budget(4 * V * limit):
        for t in LENGTHS:
            given = (*rows(t), weight)
            torch.testing.assert_close(compiled(*given), call(*given))
    assert len(graphs) == 1


class Call(nn.Module):
    def __init__(self, call: Callable):
        super().__init__()
        self.call = call

    def forward(self, *given: Tensor) -> Tensor:
        return self.call(*given)


@cases
def test_exported_for_all_lengths(name):
    call, make = CASES[name]
    length = Dim("T", min=3, max=4096)
    axis = 2 if name == "adaptive_span_attention" else 1
    given = make(LENGTHS[0])
    shapes = tuple({axis: length} for _ in given)
    program = export(Call(call), given, dynamic_shapes=(shapes,)).module()
    for t in LENGTHS:
        given = make(t)
        torch.testing.assert_close(*seeded(program, call, given))
