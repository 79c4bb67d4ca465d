"""SegmentationLoss: compared with log_softmax and enumeration; lengths, sequences without segmentation."""

import math
import subprocess
import sys
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

import sukhops
from sukhops import reference, segmentation_logz
from sukhops.losses import segmentation_loss, unit_targets
from sukhops.nn import SegmentationLoss
from sukhops.testing import assert_close

TEXTS = ["abbabb", "", "ba", "ccabca", "a"]


def batch(d=5, dtype=torch.float64, texts=TEXTS):
    """Units of a few texts, K = 3; the last vocabulary entry is not used."""
    lexicon = sukhops.Lexicon.from_text(TEXTS, 3, 1)
    ids, lengths = lexicon.unit_ids(texts)
    v = len(lexicon) + 1
    return {
        "hidden": torch.randn(*ids.shape[:2], d, dtype=dtype).requires_grad_(),
        "weight": torch.randn(v, d, dtype=dtype).requires_grad_(),
        "unit_ids": ids,
        "bias": torch.randn(v, dtype=dtype).requires_grad_(),
        "lengths": lengths,
    }


def leaves(batch):
    return [t for t in batch.values() if t is not None and t.is_floating_point()]


def segmentations(length, k):
    """All segmentations of `length` symbols into units of at most k, as lists of (start, length)."""
    for cuts in product([False, True], repeat=max(0, length - 1)):
        ends = [i + 1 for i, cut in enumerate(cuts) if cut] + [length] * (length > 0)
        units = list(zip([0, *ends], ends, strict=False))
        if all(end - start <= k for start, end in units):
            yield [(start, end - start) for start, end in units]


def oracle(hidden, weight, unit_ids, bias=None, lengths=None, flat=False):
    """By enumeration: loss, bits per symbol, number of sequences without a segmentation."""
    b, t, k = unit_ids.shape
    logp = (hidden @ weight.T + (0 if bias is None else bias)).log_softmax(-1)
    lengths = [t] * b if lengths is None else lengths.tolist()
    total, symbols, unreachable, units = logp.new_zeros(()), 0, 0, logp.new_zeros(())
    for i, length in enumerate(lengths):
        scores = []
        for segments in segmentations(length, k):
            ids = [int(unit_ids[i, start, n - 1]) for start, n in segments]
            if all(unit >= 0 for unit in ids):
                scores.append(
                    sum((logp[i, s, u] for (s, _), u in zip(segments, ids, strict=True)), logp.new_zeros(()))
                )
        for start in range(length):
            for n in range(1, min(k, length - start) + 1):
                if unit_ids[i, start, n - 1] >= 0:
                    units = units + logp[i, start, unit_ids[i, start, n - 1]]
        if scores:
            total, symbols = total + torch.stack(scores).logsumexp(0), symbols + length
        unreachable += not scores
    nats = -total / max(1, symbols)
    loss = -units / max(1, k * sum(lengths)) if flat else nats
    return loss, nats.detach() / math.log(2), unreachable


def assert_matches(given, flat):
    out = SegmentationLoss(flat=flat)(**given)
    loss, bits, unreachable = oracle(**given, flat=flat)
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(
        torch.autograd.grad(out.loss, leaves(given)),
        [g if g is not None else torch.zeros_like(t) for t, g in zip(
            leaves(given), torch.autograd.grad(loss, leaves(given), allow_unused=True) if loss.requires_grad
            else [None] * len(leaves(given)), strict=True)],
    )  # fmt: skip
    torch.testing.assert_close(out.metrics["bits_per_symbol"], bits)
    assert out.metrics["unreachable"].item() == unreachable
    assert not any(m.requires_grad for m in out.metrics.values())


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_sum_over_all_segmentations(padded, flat):
    given = batch() if padded else batch(texts=["abbabb", "ccabca"]) | {"lengths": None}
    assert_matches(given, flat)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_pattern_of_units_and_lengths(data):
    b, t, k = (data.draw(st.integers(*bounds)) for bounds in ((1, 3), (1, 6), (1, 4)))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    ids = data.draw(st.lists(st.integers(-1, 6), min_size=b * t * k, max_size=b * t * k))
    lengths = data.draw(st.none() | st.lists(st.integers(0, t), min_size=b, max_size=b))
    given = {
        "hidden": torch.randn(b, t, 3, dtype=torch.float64).requires_grad_(),
        "weight": torch.randn(7, 3, dtype=torch.float64).requires_grad_(),
        "unit_ids": torch.tensor(ids).view(b, t, k),
        "lengths": None if lengths is None else torch.tensor(lengths),
    }
    assert_matches(given, data.draw(st.booleans()))


@pytest.mark.parametrize("flat", [False, True])
def test_gradcheck(flat):
    given = batch(d=2, texts=["abb", "", "ca"])
    loss = SegmentationLoss(flat=flat)

    def f(hidden, weight, bias):
        return loss(**(given | {"hidden": hidden, "weight": weight, "bias": bias})).loss

    assert gradcheck(f, (given["hidden"], given["weight"], given["bias"]))


def eager(flat):
    def f(hidden, weight, unit_ids, bias, lengths):
        logp = reference.linear_logp(hidden, weight, unit_targets(unit_ids, lengths), bias)
        return segmentation_loss(logp, unit_ids, lengths=lengths, flat=flat).loss

    return f


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("flat", [False, True])
def test_precisions(dtype, flat):
    given = batch(d=32)
    given["weight"] = (0.2 * given["weight"].detach()).requires_grad_()
    loss = SegmentationLoss(flat=flat)
    out = loss(**{n: t.to(dtype) if t.is_floating_point() else t for n, t in given.items()}).loss
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(lambda **g: loss(**g).loss, eager(flat), given, dtype)


def test_autocast_is_bfloat16():
    given = {n: t.detach().float() if t.is_floating_point() else t for n, t in batch(d=32).items()}
    with torch.autocast("cpu", torch.bfloat16):
        out = SegmentationLoss()(**given).loss
    low = {n: t.bfloat16() if t.is_floating_point() else t for n, t in given.items()}
    assert out.dtype == torch.float32 and torch.equal(out, SegmentationLoss()(**low).loss)


@pytest.mark.parametrize("how", ["K = 1", "no n-gram"])
def test_only_characters_give_cross_entropy(how):
    given = batch()
    ids = given["unit_ids"]
    given["unit_ids"] = ids[..., :1] if how == "K = 1" else ids.where(torch.arange(3) == 0, -1)
    logits = given["hidden"] @ given["weight"].T + given["bias"]
    expected = F.cross_entropy(logits.flatten(0, 1), ids[..., 0].flatten(), ignore_index=-1)
    ours = SegmentationLoss()(**given).loss
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves(given)), torch.autograd.grad(expected, leaves(given))
    )


@pytest.mark.parametrize("flat", [False, True])
def test_inputs_after_the_length_do_not_matter(flat):
    """Units that cross the end, and ids and hidden states after it, may be invalid or NaN."""
    given = batch()
    loss = SegmentationLoss(flat=flat)
    clean = loss(**given).loss
    grads = torch.autograd.grad(clean, leaves(given))
    ends = torch.arange(6)[:, None] + torch.arange(3)
    outside = ends >= given["lengths"][:, None, None]
    given["unit_ids"] = given["unit_ids"].masked_fill(outside, -77)
    dirty = given["hidden"].detach().masked_fill(outside[..., :1], torch.nan).requires_grad_()
    given["hidden"] = dirty
    again = loss(**given).loss
    assert torch.equal(again, clean)
    for a, b in zip(torch.autograd.grad(again, leaves(given)), grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("flat", [False, True])
def test_lengths_default_to_the_whole_block(flat):
    given = batch(texts=["abbabb", "ccabca"])
    loss = SegmentationLoss(flat=flat)
    assert torch.equal(loss(**given).loss, loss(**(given | {"lengths": None})).loss)
    cut = {n: given[n][:, :4] for n in ("hidden", "unit_ids")}
    shorter = loss(**(given | cut | {"lengths": None})).loss
    fewer = loss(**(given | {"lengths": torch.full((2,), 4)})).loss  # with other shapes of the products
    torch.testing.assert_close(shorter, fewer, rtol=64 * torch.finfo(torch.float64).eps, atol=0)


def test_sequences_without_segmentation_are_excluded():
    given = batch()
    given["unit_ids"][0, 2] = -1
    given["unit_ids"][0, 1, 1:] = -1
    given["unit_ids"][0, 0, 2] = -1  # no unit covers position 2 of the first text
    out = SegmentationLoss()(**given)
    rest = SegmentationLoss()(**{n: t if n in ("weight", "bias") else t[1:] for n, t in given.items()})
    assert out.metrics["unreachable"] == 1 and rest.metrics["unreachable"] == 0
    torch.testing.assert_close(out.loss, rest.loss)
    hidden, *_ = torch.autograd.grad(out.loss, leaves(given))
    assert not hidden[0].any() and hidden[3].all()


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("empty", [False, True])
def test_no_symbols_or_no_units_give_zero(empty, flat):
    given = batch()
    if empty:
        given["lengths"] = torch.zeros(5, dtype=torch.int64)
    else:
        given["unit_ids"] = torch.full_like(given["unit_ids"], -1)
    out = SegmentationLoss(flat=flat)(**given)
    assert out.loss == 0 and out.metrics["unreachable"] == (0 if empty else 4)
    assert not any(g.any() for g in torch.autograd.grad(out.loss, leaves(given)))


def test_nan_propagates():
    given = batch()
    given["hidden"] = given["hidden"].detach().clone()
    given["hidden"][3, 1, 0] = torch.nan
    out = SegmentationLoss()(**given)
    assert out.loss.isnan() and out.metrics["unreachable"] == 0


@pytest.mark.parametrize("wrong", [-1, 4])
def test_flat_loss_is_nan_for_an_invalid_length(monkeypatch, wrong):
    """As on CUDA, where lengths are not checked and logz of such a sequence is NaN."""

    def logz(scores, lengths):
        inside = (lengths >= 0) & (lengths <= scores.shape[1])
        return segmentation_logz(scores, lengths.where(inside, 0)).where(inside, torch.nan)

    logp, ids = torch.randn(2, 3, 2).requires_grad_(), torch.zeros(2, 3, 2, dtype=torch.int64)
    lengths = torch.tensor([3, wrong])
    with pytest.raises(RuntimeError, match="lengths"):
        segmentation_loss(logp, ids, lengths=lengths, flat=True)
    monkeypatch.setattr("sukhops.losses.segmentation.segmentation_logz", logz)
    out = segmentation_loss(logp, ids, lengths=lengths, flat=True)
    assert out.loss.isnan() and out.metrics["bits_per_symbol"].isnan()
    assert torch.autograd.grad(out.loss, logp)[0][0, 0].isnan().all()


def test_flat_hand_computed():
    """The sum is divided by K times the number of symbols, whether or not units exist there."""
    logp = torch.tensor([[[-1.0, -2.0], [-4.0, -8.0]], [[-16.0, -32.0], [-64.0, -128.0]]])
    ids = torch.tensor([[[0, 1], [1, 2]], [[3, -1], [0, 0]]])
    out = segmentation_loss(logp, ids, lengths=torch.tensor([2, 1]), flat=True)
    assert out.loss == (1 + 2 + 4 + 16) / (2 * 3)
    nats = math.log(math.exp(-5) + math.exp(-2)) - 16
    torch.testing.assert_close(out.metrics["bits_per_symbol"], torch.tensor(-nats / 3 / math.log(2)))


@pytest.mark.parametrize("flat", [False, True])
def test_constants_added_to_logits_change_nothing(flat):
    """A constant for all positions (in the bias) and one per position (an extra feature with weight 1)."""
    given = batch()
    shift = 7.0 * torch.randn(5, 6, 1, dtype=torch.float64)
    ones = torch.ones(len(given["weight"]), 1, dtype=torch.float64)
    shifted = given | {
        "hidden": torch.cat([given["hidden"], shift], -1),
        "weight": torch.cat([given["weight"], ones], -1),
        "bias": given["bias"] + 7.0,
    }
    loss = SegmentationLoss(flat=flat)
    a, b = loss(**given).loss, loss(**shifted).loss
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(*(torch.autograd.grad(x, leaves(given)) for x in (a, b)))


def test_number_of_products_and_second_backward():
    """Three products, since logits are kept; a retained graph gives the same gradient again."""
    given = batch(d=16)
    before = torch.ops.sukhops.product_count()
    loss = SegmentationLoss()(**given).loss
    first = torch.autograd.grad(loss, leaves(given), retain_graph=True)
    assert torch.ops.sukhops.product_count() - before == 3
    for a, b in zip(first, torch.autograd.grad(loss, leaves(given)), strict=True):
        assert torch.equal(a, b)


MEMORY = """
import resource, torch, sukhops
hidden = torch.randn(8, 512, 16, requires_grad=True)
weight = torch.randn(65536, 16, requires_grad=True)
ids = torch.randint(0, 65536, (8, 512, 4))
loss = sukhops.nn.SegmentationLoss()
loss(hidden[:, :8], weight, ids[:, :8]).loss.backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loss(hidden, weight, ids).loss.backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_log_probs_of_all_units_are_not_stored():
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    kibibytes = 8 * 512 * 65536 * 4 >> 10  # size of [B, T, V]
    assert int(run.stdout) < kibibytes / 8


@pytest.mark.parametrize("flat", [False, True])
def test_compiled_equals_eager(flat):
    given = batch()
    loss = SegmentationLoss(flat=flat)
    whole = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, expected = whole(**given), loss(**given)
    torch.testing.assert_close(ours.loss, expected.loss)
    torch.testing.assert_close(ours.metrics, expected.metrics)
    torch.testing.assert_close(
        torch.autograd.grad(ours.loss, leaves(given)), torch.autograd.grad(expected.loss, leaves(given))
    )


def test_compiles_fullgraph_with_the_default_backend():
    given = {n: t.detach() for n, t in batch().items()}
    loss = SegmentationLoss()
    whole = torch.compile(lambda **g: loss(**g).loss, fullgraph=True)(**given)
    torch.testing.assert_close(whole, loss(**given).loss)


@pytest.mark.parametrize("wrong", [5, -7])
def test_compiled_call_names_wrong_ids(wrong):
    given = {n: t.detach() for n, t in batch().items()}
    given["weight"], given["bias"] = given["weight"][:5], given["bias"][:5]
    given["unit_ids"] = torch.full_like(given["unit_ids"], wrong)
    whole = torch.compile(SegmentationLoss(), fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"unit_ids: expected ids in \[0, V = 5\), or -1 for no unit"):
        whole(**given)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"unit_ids": torch.zeros(5, 6, dtype=torch.int64)}, ValueError, r"unit_ids: .*\[B, T, K\]"),
        ({"unit_ids": torch.zeros(5, 6, 3)}, TypeError, "unit_ids"),
        ({"unit_ids": torch.zeros(5, 5, 3).long()}, ValueError, r"unit_ids: .*\[5, 6, 5\], got \[5, 5, 3\]"),
        (
            {"unit_ids": torch.zeros(5, 6, 3, device="meta").long(), "lengths": None},
            ValueError,
            "unit_ids: expected on cpu",
        ),
        ({"unit_ids": torch.full((5, 6, 3), -100)}, ValueError, r"unit_ids: .*\[0, V = \d+\).* got -100"),
        ({"unit_ids": torch.full((5, 6, 3), 99)}, ValueError, r"unit_ids: .*\[0, V = \d+\).* got 99"),
        ({"lengths": torch.tensor([6, 0, 2, 7, 1])}, RuntimeError, "lengths"),
        ({"lengths": torch.tensor([6, 0, 2, -1, 1])}, RuntimeError, "lengths"),
        ({"lengths": torch.tensor([6, 0, 2])}, ValueError, "lengths"),
        ({"lengths": torch.full((5,), 6.0)}, TypeError, "lengths"),
        ({"bias": torch.zeros(2).double()}, ValueError, "bias"),
        ({"weight": torch.zeros(30, 4).double()}, ValueError, "hidden"),
        ({"weight": torch.zeros(5).double()}, ValueError, "weight"),
        ({"weight": None}, TypeError, "weight"),
    ],
)
def test_invalid_arguments(change, error, message):
    with pytest.raises(error, match=message):
        SegmentationLoss()(**(batch() | change))


def test_invalid_arguments_of_segmentation_loss():
    ids = torch.zeros(2, 3, 1, dtype=torch.int64)
    for logp, error in (
        (torch.zeros(2, 3), ValueError),
        (torch.zeros(2, 3, 1).long(), TypeError),
        (0.5, TypeError),
    ):
        with pytest.raises(error, match="logp"):
            segmentation_loss(logp, ids)
    with pytest.raises(ValueError, match="unit_ids: expected ids >= 0, or -1 for no unit, got -2"):
        segmentation_loss(torch.zeros(2, 3, 1), ids - 2)
    for flat in (1, "no", None):
        for call in (SegmentationLoss, lambda flat: segmentation_loss(torch.zeros(2, 3, 1), ids, flat=flat)):
            with pytest.raises(TypeError, match="flat: expected a bool, got"):
                call(flat=flat)
