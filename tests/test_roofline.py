"""The roofline model: operations compared with a count in the reference, inequalities, recorded rows."""

import json

import pytest
import report
import roofline
import torch
from roofline import H200, Phase
from torch.utils.flop_counter import FlopCounterMode

from sukhops import losses, reference


def counted(f, *leaves):
    """FLOPs of the matrix products of a forward and backward, counted by PyTorch."""
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(f(), leaves)
    return counter.get_total_flops()


def head(rows=24, d=16, v=50, frozen=False):
    hidden = torch.randn(rows, d).requires_grad_()
    weight = torch.randn(v, d).requires_grad_(not frozen)
    return hidden, weight, torch.randint(0, v, (rows,))


def test_operations_of_the_head_match_the_reference():
    hidden, weight, target = head()
    exact = counted(lambda: reference.linear_logp(hidden, weight, target).sum(), hidden, weight)
    work = roofline.linear_logp(24, 16, 50)
    assert work.floor.flops == exact
    assert sum(phase.flops for phase in work.plan) == exact * 4 / 3  # logits are computed twice
    hidden, weight, target = head(frozen=True)
    exact = counted(lambda: reference.linear_logp(hidden, weight, target).sum(), hidden)
    work = roofline.frozen(24, 16, 50)
    assert work.floor.flops == exact == sum(phase.flops for phase in work.plan)


def test_operations_of_dpo_match_the_reference():
    hidden, weight, target = head()

    def loss():
        logp = reference.linear_logp(hidden, weight, target).view(4, 6)
        with torch.no_grad():
            ref = reference.linear_logp(hidden.flip(0), weight, target).view(4, 6)
        return losses.dpo_loss(logp, target.view(4, 6), ref).loss

    assert roofline.dpo(24, 16, 50).floor.flops == counted(loss, hidden, weight)


@pytest.mark.parametrize("span, ramp", [(3.0, 2.0), (40.0, 8.0)])
def test_pairs_of_attention(span, ramp):
    """Number of query-key pairs whose weight can be positive."""
    x = torch.arange(30).unsqueeze(1) - torch.arange(30)
    pairs = ((x >= 0) & (x < span + ramp)).sum().item()
    assert roofline._seen(30, min(30, span + ramp)) == pairs
    work = roofline.adaptive_span(2, 4, 30, 16, (span,) * 4, ramp)
    assert work.floor.flops == 2 * 7 * 16 * pairs * 8


def test_time_of_a_phase_is_that_of_its_slowest_part():
    device = roofline.Device("one", 2.0, 4.0, 8.0)
    assert Phase("", flops=6.0).seconds(device) == 3.0
    both = Phase("", flops=2.0, bytes=8.0, cycles=8.0)
    assert both.seconds(device) == 2.0 and both.bound(device) == "memory"
    assert Phase("", cycles=80.0).bound(device) == "latency"


def test_plans_are_not_faster_than_their_floors():
    for row in roofline.rows(H200):
        assert row["predicted_ms"] >= row["floor_ms"] > 0, row
    spans = torch.tensor(roofline.SPANS)
    assert len(spans) == roofline.ATTENTION["H"] and spans.mean() == 314


def test_recorded_rows_are_up_to_date():
    assert report.rows("roofline") == [json.loads(json.dumps(row)) for row in roofline.rows(H200)]
