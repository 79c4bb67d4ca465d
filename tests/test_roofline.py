"""The roofline: operations against a count of the reference's, orders that must hold, the recorded rows."""

import json

import pytest
import report
import roofline
import torch
from roofline import H200, Phase
from torch.utils.flop_counter import FlopCounterMode

from sukhops import losses, reference


def counted(f, *leaves):
    """Operations of the matrix products of a forward and backward, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(f(), leaves)
    return counter.get_total_flops()


def head(rows=24, d=16, v=50, frozen=False):
    hidden = torch.randn(rows, d).requires_grad_()
    weight = torch.randn(v, d).requires_grad_(not frozen)
    return hidden, weight, torch.randint(0, v, (rows,))


def test_operations_of_the_head_are_those_of_the_reference():
    hidden, weight, target = head()
    exact = counted(lambda: reference.linear_logp(hidden, weight, target).sum(), hidden, weight)
    work = roofline.linear_logp(24, 16, 50)
    assert work.floor.flops == exact
    assert sum(phase.flops for phase in work.plan) == exact * 4 / 3  # logits are computed twice
    hidden, weight, target = head(frozen=True)
    exact = counted(lambda: reference.linear_logp(hidden, weight, target).sum(), hidden)
    work = roofline.frozen(24, 16, 50)
    assert work.floor.flops == exact == sum(phase.flops for phase in work.plan)


def test_operations_of_dpo_are_those_of_the_reference():
    hidden, weight, target = head()

    def loss():
        logp = reference.linear_logp(hidden, weight, target).view(4, 6)
        with torch.no_grad():
            ref = reference.linear_logp(hidden.flip(0), weight, target).view(4, 6)
        return losses.dpo_loss(logp, target.view(4, 6), ref).loss

    assert roofline.dpo(24, 16, 50).floor.flops == counted(loss, hidden, weight)


@pytest.mark.parametrize("span, ramp", [(3.0, 2.0), (40.0, 8.0)])
def test_pairs_of_attention(span, ramp):
    """Keys with a weight that can be positive, counted one by one."""
    x = torch.arange(30).unsqueeze(1) - torch.arange(30)
    pairs = ((x >= 0) & (x < span + ramp)).sum().item()
    assert roofline._seen(30, min(30, span + ramp)) == pairs
    work = roofline.adaptive_span(2, 4, 30, 16, (span,) * 4, ramp)
    assert work.floor.flops == 2 * 7 * 16 * pairs * 8


def test_a_phase_lasts_as_long_as_its_slowest_part():
    device = roofline.Device("one", 2.0, 4.0, 8.0)
    assert Phase("", flops=6.0).seconds(device) == 3.0
    both = Phase("", flops=2.0, bytes=8.0, cycles=8.0)
    assert both.seconds(device) == 2.0 and both.bound(device) == "memory"
    assert Phase("", cycles=80.0).bound(device) == "latency"


def test_no_plan_is_faster_than_its_floor():
    for row in roofline.rows(H200):
        assert row["predicted_ms"] >= row["floor_ms"] > 0, row
    spans = torch.tensor(roofline.SPANS)
    assert len(spans) == roofline.ATTENTION["H"] and spans.mean() == 314


def test_recorded_rows_are_those_of_the_model():
    assert report.rows("roofline") == [json.loads(json.dumps(row)) for row in roofline.rows(H200)]
