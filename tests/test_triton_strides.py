"""Triton kernels in the interpreter on tensors whose offsets do not fit int32; few pages are used."""

import pytest
import torch
from sukhops.triton_kernels import adaptive_span, director, vocab_head

pytestmark = pytest.mark.interpreter
FAR = 1 << 30  # elements between neighbors: the offset of the third one is 2^31


def far(t, axis):
    """A copy of t whose neighbors along `axis` lie FAR elements apart."""
    strides = [FAR if i == axis else s for i, s in enumerate(t.contiguous().stride())]
    last = sum((n - 1) * s for n, s in zip(t.shape, strides, strict=True))
    storage = torch.UntypedStorage((last + 1) * t.element_size())
    return torch.empty(0, dtype=t.dtype).set_(storage, 0, t.shape, strides).copy_(t)


@pytest.fixture
def far_tiles(monkeypatch):
    """Rows of the tiles that `_mm` returns lie FAR elements apart."""
    for module in (vocab_head, director):
        monkeypatch.setattr(module, "_mm", far_product(module._mm))
        monkeypatch.setattr(module, "CHUNK", 16)


def far_product(product):
    def mm(a, b, out=None):
        # a product with hidden [3, 5] is a tile of logits
        return far(product(a, b), 0) if a.shape == (3, 5) else product(a, b, out)

    return mm


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_attention(axis, monkeypatch):
    monkeypatch.setattr(adaptive_span, "PROGRAMS", 1)
    shape = [2, 2, 2, 16]
    shape[axis] = 3
    q, k, v, grad = torch.randn(4, *shape).half()
    options = torch.full((shape[1],), 1.5), None, None, None, 2.0, 0.25, 0, None

    def run(*given):
        *given, grad = given
        out = adaptive_span.forward(*given, *options)
        tensors, numbers = options[:4], options[4:]
        return *out, *adaptive_span.backward(grad, *given, *tensors, *out, *numbers, *[True] * 3, False)

    near, ours = run(q, k, v, grad), run(*(far(t, axis) for t in (q, k, v, grad)))
    assert all(torch.equal(a, b) for a, b in zip(near, ours, strict=True))


def test_vocab_head(far_tiles):
    given = torch.randn(3, 5), torch.randn(40, 5), torch.tensor([[1], [39], [17]]), None
    need, curve = (True, True, False), (None, 1.0, 1.0, -100)
    ours = vocab_head.forward(*given, 2, True, *curve, 0, *need)
    cpu = torch.ops.sukhops.vocab_head(*given, 2, True, *curve, 0, *need)
    torch.testing.assert_close(ours, cpu)
    maximum, log_sum, _, _, index, entropy, _, _, mean, logits = cpu
    saved = index, maximum, log_sum, entropy, mean, logits
    upstream = torch.randn(3), torch.randn(3, 1), None, torch.randn(3)
    torch.testing.assert_close(
        vocab_head.backward(*given, *saved, *upstream, *curve, *need),
        torch.ops.sukhops.vocab_head_backward(*given, *saved, *upstream, *curve, *need),
    )


def test_classifier_norm(far_tiles):
    rows = torch.randn(3, 5), torch.randn(40, 5), torch.tensor([1, 39, 17]), torch.tensor([1, 0, 1])
    ours, cpu = director.norm(*rows, None, None, 0), torch.ops.sukhops.director_norm(*rows, None, None, 0)
    torch.testing.assert_close(ours, cpu)
    given = (*torch.randn(2, 3), *rows, None, None, cpu[2], True, True, True)
    torch.testing.assert_close(
        director.norm_backward(*given), torch.ops.sukhops.director_norm_backward(*given)
    )
