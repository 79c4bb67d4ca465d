"""Segmentation operators: opcheck, compile, determinism, dtypes, empty inputs, NaN, invalid arguments."""

import pytest
import torch

import sukhops
from sukhops import (
    segmentation_entropy,
    segmentation_logz,
    segmentation_marginals,
    segmentation_sample,
    segmentation_viterbi,
)

pytestmark = pytest.mark.every_isa

_ops = torch.ops.sukhops
DIFFERENTIABLE = [segmentation_logz, segmentation_marginals, segmentation_entropy]


def make(b=3, t=11, k=4, dtype=torch.float32):
    return torch.randn(b, t, k, dtype=dtype).requires_grad_(), torch.tensor([t, 5, 0][:b])


# ------------------------------------------------------------------ torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ragged", [True, False])
def test_opcheck(dtype, ragged):
    scores, lengths = make(dtype=dtype)
    lengths = lengths if ragged else None
    torch.library.opcheck(_ops.segmentation_logz, (scores, lengths, True))
    detached = scores.detach()
    _, alpha, exponent = _ops.segmentation_logz(detached, lengths, True)
    grad = torch.randn(3, dtype=dtype)
    torch.library.opcheck(
        _ops.segmentation_marginals, (scores, lengths, alpha, exponent, grad.clone().requires_grad_())
    )
    *_, kept = _ops.segmentation_logz_kept(detached, lengths)
    torch.library.opcheck(  # without tests of values: the kept tensor is partly uninitialized
        _ops.segmentation_logz_kept, (detached, lengths), test_utils=("test_schema", "test_faketensor")
    )
    torch.library.opcheck(_ops.segmentation_marginals_kept, (detached, lengths, alpha, exponent, grad, kept))
    for need in (True, False):
        torch.library.opcheck(
            _ops.segmentation_marginals_backward, (detached, lengths, grad, torch.randn_like(detached), need)
        )
    torch.library.opcheck(_ops.segmentation_entropy, (scores, lengths))
    torch.library.opcheck(_ops.segmentation_entropy_backward, (detached, lengths, grad))
    torch.library.opcheck(_ops.segmentation_viterbi, (detached, lengths))
    seed = torch.tensor([5])
    torch.library.opcheck(_ops.segmentation_sample, (detached, lengths, alpha, exponent, 3, seed))


@pytest.mark.parametrize("f", DIFFERENTIABLE)
def test_compile(f):
    scores, lengths = make()

    def loss(s):
        return (f(s, lengths).sin() * 3).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for s in (scores, make(2, 7, 3)[0]):
        if s is not scores:
            lengths = make(2, 7, 3)[1]
        assert torch.equal(compiled(s), loss(s))
        assert torch.equal(torch.autograd.grad(compiled(s), s)[0], torch.autograd.grad(loss(s), s)[0])


def test_compile_of_decoding():
    scores, lengths = make()
    both = torch.compile(
        lambda s: (segmentation_viterbi(s, lengths), segmentation_sample(s, 2, lengths)),
        fullgraph=True,
        backend="aot_eager",
    )
    best, samples = both(scores)
    assert torch.equal(best.segments, segmentation_viterbi(scores, lengths).segments)
    assert samples.shape == (2, 3, 11) and (samples.sum(-1) == lengths).all()


@pytest.mark.parametrize("f", DIFFERENTIABLE)
def test_bitwise_independent_of_threads_and_batch(f):
    scores, lengths = torch.randn(7, 130, 9).requires_grad_(), torch.tensor([130, 5, 0, 77, 130, 1, 64])

    def run(s, n):
        out = f(s, n)
        return out.detach(), torch.autograd.grad(out.square().sum(), s)[0]

    first = run(scores, lengths)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert all(torch.equal(a, b) for a, b in zip(run(scores, lengths), first, strict=True))
    finally:
        torch.set_num_threads(threads)
    for b in range(7):
        alone = run(scores[b : b + 1].detach().requires_grad_(), lengths[b : b + 1])
        assert torch.equal(alone[0][0], first[0][b]) and torch.equal(alone[1][0], first[1][b])


def test_samples_depend_only_on_the_seed():
    scores, lengths = torch.randn(5, 200, 20), torch.tensor([200, 3, 0, 199, 77])

    def run():
        return segmentation_sample(scores, 9, lengths, torch.Generator().manual_seed(4))

    first = run()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(run(), first)
    finally:
        torch.set_num_threads(threads)
    other = segmentation_sample(scores, 9, lengths, torch.Generator().manual_seed(5))
    assert not torch.equal(other, first) and (other.sum(-1) == lengths).all()
    torch.manual_seed(7)
    default = segmentation_sample(scores, 2, lengths)
    torch.manual_seed(7)
    assert torch.equal(segmentation_sample(scores, 2, lengths), default)
    assert len({tuple(s.tolist()) for s in first[:, 0]}) == 9  # samples differ from one another


@pytest.mark.parametrize("f", DIFFERENTIABLE)
def test_retained_graph_and_unchanged_inputs(f):
    scores, lengths = make(dtype=torch.float64)
    before = scores.detach().clone()
    out = f(scores, lengths).square().sum()
    first = torch.autograd.grad(out, scores, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(out, scores)[0], first) and torch.equal(scores.detach(), before)


@pytest.fixture
def long():
    """Scores for which the forward keeps exponentials, and the gradient of the sum of logz."""
    scores = torch.randn(3, 64, 16)
    return scores.requires_grad_(), segmentation_marginals(scores.detach())


def test_gradients_do_not_share_storage(long):
    """Changing a returned gradient in place does not affect others."""
    scores, expected = long
    total = segmentation_logz(scores).sum()
    for retain in (True, True, False):
        (gradient,) = torch.autograd.grad(total, scores, retain_graph=retain)
        assert torch.equal(gradient, expected)
        gradient.zero_()
    flat = scores.detach().flatten().requires_grad_()
    total = segmentation_logz(flat.view(3, 64, 16)).sum()
    for times in (1, 2, 3):
        total.backward(retain_graph=True)
        assert torch.equal(flat.grad.view_as(expected), times * expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(long, reentrant):
    from torch.utils.checkpoint import checkpoint

    scores, expected = long
    checkpoint(lambda s: segmentation_logz(s).sum(), scores, use_reentrant=reentrant).backward()
    assert torch.equal(scores.grad, expected)


def test_saved_tensors_can_be_moved_and_contain_no_uninitialized_memory(long):
    scores, expected = long

    def pack(x):
        assert x.isfinite().all()
        return x.transpose(0, -1).contiguous()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x.transpose(0, -1)):
        total = segmentation_logz(scores).sum()
    assert torch.equal(torch.autograd.grad(total, scores)[0], expected)


def test_batched_gradients(long):
    scores, expected = long
    logz = segmentation_logz(scores)
    (rows,) = torch.autograd.grad(logz, scores, torch.eye(3), is_grads_batched=True, retain_graph=True)
    assert torch.equal(rows.sum(0), expected) and torch.equal(rows[1, 1], expected[1])
    rows = torch.vmap(lambda g: torch.autograd.grad(logz, scores, g)[0])(torch.eye(3))
    assert torch.equal(rows.sum(0), expected)


def test_compiled_autograd(long):
    scores, expected = long
    total = segmentation_logz(scores).sum()
    with torch._dynamo.config.patch(compiled_autograd=True):
        step = torch.compile(lambda x: x.backward(retain_graph=True), backend="eager")
        for _ in range(2):
            scores.grad = None
            step(total)
            assert torch.equal(scores.grad, expected)
    assert torch.equal(torch.autograd.grad(total, scores)[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("f", DIFFERENTIABLE)
def test_half_precision_computes_in_float32(f, dtype):
    scores, lengths = make()
    half = scores.detach().to(dtype).requires_grad_()
    wide = half.detach().float().requires_grad_()
    out, expected = f(half, lengths), f(wide, lengths)
    assert out.dtype == torch.float32 and torch.equal(out, expected)
    (grad,) = torch.autograd.grad(out.square().sum(), half)
    assert grad.dtype == dtype
    assert torch.equal(grad, torch.autograd.grad(expected.square().sum(), wide)[0].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_does_not_cast_scores(compiled, dtype):
    """Like torch.logsumexp: bfloat16 cannot represent fractions of sums in the hundreds."""
    scores, lengths = make(dtype=dtype)

    def run(s):
        out = *(f(s, lengths) for f in DIFFERENTIABLE), segmentation_viterbi(s, lengths).score
        return *out, torch.autograd.grad(sum(x.square().sum() for x in out if x.requires_grad), s)[0]

    def under_autocast(s):
        with torch.autocast("cpu", torch.bfloat16):
            return *(f(s, lengths) for f in DIFFERENTIABLE), segmentation_viterbi(s, lengths).score

    if compiled:
        under_autocast = torch.compile(under_autocast, fullgraph=True, backend="aot_eager")
    out = under_autocast(scores)
    (gradient,) = torch.autograd.grad(sum(x.square().sum() for x in out if x.requires_grad), scores)
    assert all(torch.equal(a, b) for a, b in zip((*out, gradient), run(scores), strict=True))


def test_strides():
    scores, lengths = make()
    plain = segmentation_logz(scores, lengths)
    strided = scores.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(segmentation_logz(strided, lengths.to(torch.int32)), plain)
    every_other = torch.stack([lengths, -lengths], 1)[:, 0]
    assert torch.equal(segmentation_logz(scores, every_other), plain)
    upstream = torch.randn(3, 22)[:, ::2].unsqueeze(-1).expand(3, 11, 4)
    (a,) = torch.autograd.grad(segmentation_marginals(scores, lengths), scores, upstream)
    (b,) = torch.autograd.grad(segmentation_marginals(scores, lengths), scores, upstream.contiguous())
    assert torch.equal(a, b)


def test_unsupported_transforms_raise():
    scores, lengths = make(dtype=torch.float64)
    (grad,) = torch.autograd.grad(segmentation_marginals(scores).square().sum(), scores, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(segmentation_entropy(scores).sum(), scores, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.sum().backward()
    for f in (segmentation_logz, segmentation_marginals):
        with pytest.raises(NotImplementedError, match=r"torch\.func"):
            torch.vmap(f)(torch.randn(2, 3, 4, 5))
    assert not segmentation_viterbi(scores, lengths).score.requires_grad


def test_memory_is_linear_in_positions_not_in_segments():
    from torch.profiler import ProfilerActivity, profile

    scores = torch.randn(2, 2000, 64).requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        segmentation_logz(scores).sum().backward()
    taken = sum(max(0, e.cpu_memory_usage) for e in p.events() if not e.cpu_children)
    assert taken < 1.5 * scores.numel() * 4  # the gradient and a few numbers per position


# ------------------------------------------------------------------ edges


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0), (0, 0, 0), (2, 1, 1), (2, 3, 9)])
def test_empty_inputs(shape, dtype):
    b, t, k = shape
    scores = torch.zeros(shape, dtype=dtype).requires_grad_()
    logz = segmentation_logz(scores)
    expected = 0.0 if t == 0 else -torch.inf if k == 0 else (t - 1) * torch.tensor(2.0).log().item()
    torch.testing.assert_close(logz, torch.full((b,), expected, dtype=dtype))
    assert torch.autograd.grad(logz.sum(), scores)[0].shape == shape
    assert segmentation_marginals(scores).shape == shape
    assert segmentation_entropy(scores).shape == (b,)
    best = segmentation_viterbi(scores)
    assert best.score.shape == (b,) and best.segments.shape == (b, t)
    assert segmentation_sample(scores, 3).shape == (3, b, t)
    assert segmentation_sample(scores, 0).shape == (0, b, t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sequences_without_segmentation(dtype):
    scores = torch.randn(4, 9, 3, dtype=dtype)
    scores[0, 3:6] = -torch.inf  # no segment starts at 3, 4 or 5, and none is long enough to skip them
    scores[1] = -torch.inf
    scores[2, -3:, :] = -torch.inf
    scores.requires_grad_()
    logz = segmentation_logz(scores)
    assert (logz[:3] == -torch.inf).all() and logz[3].isfinite()
    for f in DIFFERENTIABLE:
        (grad,) = torch.autograd.grad(f(scores).sum(), scores)
        assert not grad[:3].any() and grad[3].isfinite().all()
    assert not segmentation_marginals(scores)[:3].any() and not segmentation_entropy(scores)[:3].any()
    best = segmentation_viterbi(scores)
    assert (best.score[:3] == -torch.inf).all() and not best.segments[:3].any()
    assert not segmentation_sample(scores, 4)[:, :3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("position, length", [(0, 0), (4, 1), (10, 0)])
def test_nan_and_infinity_propagate(dtype, bad, position, length):
    scores = torch.randn(3, 11, 4).to(dtype)
    scores[1, position, length] = bad
    scores.requires_grad_()
    others = torch.tensor([0, 2])
    for f in DIFFERENTIABLE:
        out = f(scores)
        (grad,) = torch.autograd.grad(out.sum(), scores)
        assert out[1].isnan().any() and grad[1].isnan().any()
        assert out[others].isfinite().all() and grad[others].isfinite().all()
    best = segmentation_viterbi(scores)
    assert best.score[1].isnan() and not best.segments[1].any() and best.score[others].isfinite().all()
    with pytest.raises(RuntimeError, match="scores: NaN or \\+inf in sequence 1"):
        segmentation_sample(scores, 2)
    lengths = torch.tensor([11, position, 11])  # the bad score is after the end
    assert segmentation_logz(scores, lengths).isfinite().all()
    assert segmentation_viterbi(scores, lengths).score.isfinite().all()
    assert segmentation_marginals(scores, lengths).isfinite().all()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"scores": torch.randn(3, 4)}, ValueError, "scores: expected shape \\[B, T, K\\], got \\[3, 4\\]"),
        ({"scores": torch.zeros(3, 11, 4).long()}, TypeError, "scores: expected float32"),
        ({"scores": [1.0]}, TypeError, "scores: expected a torch.Tensor"),
        ({"lengths": torch.tensor([11, 5])}, ValueError, "lengths: expected shape \\[3\\]"),
        ({"lengths": torch.tensor([11.0, 5.0, 0.0])}, TypeError, "lengths: expected int64 or int32"),
        ({"lengths": [11, 5, 0]}, TypeError, "lengths: expected a torch.Tensor"),
        (
            {"lengths": torch.tensor([12, 5, 0])},
            RuntimeError,
            "lengths: .*\\[0, T = 11\\], got 12 at sequence 0",
        ),
        ({"lengths": torch.tensor([11, -1, 0])}, RuntimeError, "lengths: .*got -1 at sequence 1"),
    ],
)
def test_invalid_arguments(change, error, message):
    scores, lengths = make()
    given = {"scores": scores.detach(), "lengths": lengths} | change
    for f in (*DIFFERENTIABLE, segmentation_viterbi):
        with pytest.raises(error, match=message):
            f(**given)
    with pytest.raises(error, match=message):
        segmentation_sample(given["scores"], 2, given["lengths"])


@pytest.mark.parametrize(
    "n, error, message",
    [
        (-1, ValueError, "num_samples: expected >= 0, got -1"),
        (2.0, TypeError, "num_samples: expected an int, got float"),
        (True, TypeError, "num_samples: expected an int, got bool"),
        (None, TypeError, "num_samples: expected an int, got NoneType"),
    ],
)
def test_invalid_num_samples(n, error, message):
    with pytest.raises(error, match=message):
        segmentation_sample(make()[0], n)


def test_generator_on_another_device():
    with pytest.raises(ValueError, match="generator: expected on meta"):
        segmentation_sample(torch.randn(2, 3, 4, device="meta"), 1, generator=torch.Generator())
    with pytest.raises(TypeError, match="generator"):
        segmentation_sample(make()[0], 1, generator=3)
    assert sukhops.segmentation_sample(make()[0], 1, generator=torch.Generator()).shape == (1, 3, 11)
