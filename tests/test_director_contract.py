"""Director's operators: opcheck, compile, determinism, shapes, autocast, NaN, invalid arguments."""

import pytest
import torch
from director_inputs import LOW, labeled, make

from sukhops import director_logp, director_topk, linear_logp
from sukhops.ops.director import classifier_logit, classifier_terms

pytestmark = pytest.mark.every_isa


def test_opcheck():
    given = make(3, 4, 9, bias=True, gamma=True)
    extra = torch.randn(9, 4).requires_grad_()
    gamma = torch.rand(2, 3).requires_grad_()
    empty = torch.empty(0)
    arguments = (
        given["hidden"],
        given["lm_weight"],
        [given["cls_weight"], extra],
        gamma,
        given["lm_bias"],
        [given["cls_bias"], empty],
        None,
    )
    torch.library.opcheck(torch.ops.sukhops.director.default, arguments)
    affine = torch.tensor([1.3, 0.2]).requires_grad_()
    shared = (given["hidden"], given["lm_weight"], [], gamma[:1].detach(), None, [], affine)
    torch.library.opcheck(torch.ops.sukhops.director.default, shared)
    plain_arguments = [t.detach() if isinstance(t, torch.Tensor) else t for t in shared]
    torch.library.opcheck(torch.ops.sukhops.director_topk.default, (*plain_arguments, 2))
    rows = labeled(7, 4, 9, bias=True)
    torch.library.opcheck(torch.ops.sukhops.director_dot.default, tuple(rows.values()))
    torch.library.opcheck(torch.ops.sukhops.director_norm.default, (*rows.values(), affine, 4 * 9 * 3))


def test_compiled_equals_eager():
    given = make(bias=True, gamma=True)
    rows = labeled(bias=True)

    def f(given, rows):
        top = director_topk(**given, k=3)
        logit = classifier_logit(**rows) + sum(classifier_terms(**rows, affine=(0.8, 0.1)))
        return director_logp(**given), top.indices, logit

    eager, compiled = f(given, rows), torch.compile(f, fullgraph=True, backend="aot_eager")(given, rows)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)
    leaves = [*given.values(), rows["hidden"], rows["weight"], rows["bias"]]
    for a, b in zip(
        *(torch.autograd.grad(o[0].square().sum() + o[2].sum(), leaves) for o in (eager, compiled)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("n", [3, 40, 600])
def test_bitwise_repeatable_with_any_number_of_threads(dtype, n):
    given = {name: t.detach().to(dtype) for name, t in make(n, 64, 4000).items()}
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (threads, threads, 1):
            torch.set_num_threads(count)
            runs.append((director_logp(**given), *director_topk(**given, k=9)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    if n < 600:  # torch.mm may depend on the number of threads
        assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))


def test_retained_graph_gives_the_same_gradients_twice():
    given = make(gamma=True)
    loss = director_logp(**given).square().sum()
    first = torch.autograd.grad(loss, list(given.values()), retain_graph=True)
    second = torch.autograd.grad(loss, list(given.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_shapes_strides_and_empty_inputs():
    hidden, lm, cls = (t.detach() for t in make(12).values())
    base = director_logp(hidden, lm, cls)
    batched = director_logp(hidden.reshape(3, 4, 19), lm, cls, gamma=torch.ones(3, 1))
    assert torch.equal(batched.reshape(12, 1003), base)
    strided = director_logp(hidden.T.contiguous().T, lm.T.contiguous().T, cls[:, :19])
    torch.testing.assert_close(strided, base)
    one = director_logp(hidden[0], lm, cls, gamma=torch.tensor(1.0))
    torch.testing.assert_close(one, base[0])
    assert director_logp(hidden[:0], lm, cls).shape == (0, 1003)
    assert director_topk(hidden[:0], lm, cls, 4).values.shape == (0, 4)
    empty = director_logp(hidden[:0].requires_grad_(), lm.requires_grad_(), cls)
    empty.sum().backward()
    assert not lm.grad.any()


def test_autocast_casts_the_heads():
    given = make()
    with torch.autocast("cpu", torch.bfloat16):
        logp = director_logp(**given, gamma=torch.tensor(0.5))
    half = {name: t.detach().bfloat16() for name, t in given.items()}
    assert torch.equal(logp, director_logp(**half, gamma=0.5))


@pytest.mark.parametrize("n", [3, 40, 600])
@pytest.mark.parametrize("dtype", [torch.float64, *LOW])
@pytest.mark.parametrize("name", ["hidden", "cls_weight", "lm_weight"])
def test_nan_propagates(n, dtype, name):
    given = {key: t.detach().to(dtype) for key, t in make(n).items()}
    given[name][1, 0] = torch.nan
    logp, top = director_logp(**given), director_topk(**given, k=3)
    if name == "hidden":
        assert logp[1].isnan().all() and top.values[1].isnan().all()
        others = torch.arange(n) != 1
        assert logp[others].isfinite().all() and top.values[others].isfinite().all()
    else:
        assert logp.isnan().all() and top.values.isnan().all()


# ------------------------------------------------------------------ invalid arguments


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"cls_weight": torch.randn(1002, 19)}, ValueError, "cls_weight: expected shape \\[1003, 19\\]"),
        ({"cls_weight": None}, ValueError, "exactly one of cls_weight and cls_affine, got neither"),
        ({"cls_affine": (1.0, 0.0)}, ValueError, "cls_affine.*got both"),
        ({"cls_weight": None, "cls_affine": (1.0,)}, ValueError, "cls_affine: expected \\(a, b\\)"),
        (
            {"cls_weight": None, "cls_affine": (1.0, 0.0), "cls_bias": torch.zeros(1003)},
            ValueError,
            "cls_bias",
        ),
        ({"cls_weight": []}, ValueError, "cls_weight: expected at least one"),
        ({"cls_bias": torch.zeros(3)}, ValueError, "cls_bias: expected shape \\[1003\\]"),
        ({"lm_bias": torch.zeros(3)}, ValueError, "lm_bias: expected shape"),
        ({"gamma": -0.1}, ValueError, "gamma: .*-0.1"),
        ({"gamma": float("nan")}, ValueError, "gamma: .*nan"),
        ({"gamma": float("inf")}, ValueError, "gamma: .*inf"),
        ({"gamma": torch.tensor(-1.0)}, RuntimeError, "gamma: expected finite numbers >= 0, got -1"),
        ({"gamma": torch.tensor(torch.nan)}, RuntimeError, "gamma"),
        ({"gamma": torch.ones(4)}, ValueError, "gamma: expected a tensor that broadcasts to \\[9\\]"),
        ({"gamma": [1.0, 1.0]}, ValueError, "gamma: .* one per classifier, got 2"),
        ({"hidden": torch.randn(9, 18)}, ValueError, "hidden: expected last axis D = 19"),
        ({"hidden": torch.randn(9, 19).double()}, TypeError, "lm_weight: expected torch.float64"),
        ({"hidden": [1.0]}, TypeError, "hidden: expected a torch.Tensor"),
    ],
)
def test_bad_input(change, error, message):
    given = {name: t.detach() for name, t in make().items()} | change
    with pytest.raises(error, match=message):
        director_logp(**given)


@pytest.mark.parametrize("k", [0, -1, 1004, 2.0, True])
def test_bad_k(k):
    with pytest.raises(ValueError, match=r"k: expected an int in \[1, V = 1003\]"):
        director_topk(**make(), k=k)


def test_vmap_and_second_derivatives_raise():
    given = make(dtype=torch.float64)
    (grad,) = torch.autograd.grad(director_logp(**given).square().sum(), given["hidden"], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.vmap(lambda h: director_logp(h, given["lm_weight"], given["cls_weight"]))(
            torch.randn(2, 3, 19).double()
        )


def test_width_zero_gives_uniform_probabilities():
    """If D = 0, all products are 0 and the gradients are empty."""
    hidden, lm, cls = (torch.zeros(n, 0, requires_grad=True) for n in (40, 70, 70))
    logp = director_logp(hidden, lm, cls)
    torch.testing.assert_close(logp, torch.full((40, 70), 1 / 70).log())
    grads = torch.autograd.grad(logp.square().sum(), (hidden, lm, cls))
    assert [g.shape for g in grads] == [(40, 0), (70, 0), (70, 0)]
    logp = linear_logp(hidden, lm, torch.arange(40))
    torch.testing.assert_close(logp, torch.full((40,), 1 / 70).log())
    assert [g.shape for g in torch.autograd.grad(logp.sum(), (hidden, lm))] == [(40, 0), (70, 0)]


def test_no_rows_and_learned_gamma():
    """Two classifiers share one gamma, whose gradient is the sum of theirs."""
    gamma = torch.tensor(1.0, requires_grad=True)
    weights = [torch.randn(5, 3), torch.randn(5, 3)]
    logp = director_logp(torch.zeros(0, 3), torch.randn(5, 3), weights, gamma=gamma)
    assert logp.shape == (0, 5) and torch.autograd.grad(logp.sum(), gamma)[0] == 0
