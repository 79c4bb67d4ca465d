"""Director's operators: compared with the reference and float64, gradcheck, properties."""

import pytest
import torch
import torch.nn.functional as F
from director_inputs import LOW, make
from torch.autograd import gradcheck

from sukhops import director_logp, director_topk, reference
from sukhops.testing import assert_close, budget, distance

pytestmark = pytest.mark.every_isa

# numbers of rows that select every code path: one, eight at a time, packed panels, several panels, torch.mm
ROWS = [1, 3, 8, 13, 40, 70, 600]


def separated(n=9, v=1003, k=5, **options):
    """Inputs where rounding does not change the order of the k most probable tokens."""
    inputs = make(n, v=v, **options)
    bias = torch.zeros(v)
    bias[torch.randperm(v)[:k]] = 30 + 10 * torch.arange(float(k))
    return {name: None if t is None else t.detach() for name, t in inputs.items()} | {"lm_bias": bias}


def several(n=7, d=11, v=300, dtype=torch.float64):
    hidden, lm, one, two = (torch.randn(s, d, dtype=dtype).requires_grad_() for s in (n, v, v, v))
    return hidden, lm, one, two


# ------------------------------------------------------------------ values and gradients


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("dtype", LOW)
def test_logp_within_budget_at_every_number_of_rows(n, dtype):
    assert_close(director_logp, reference.director_logp, make(n), dtype)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("d", [1, 16, 33, 64])
@pytest.mark.parametrize(
    "n, options",
    [
        (9, {"bias": True, "gamma": True}),
        (9, {"shared": True, "bias": True}),
        (40, {"bias": True}),
        (300, {"bias": True, "gamma": True}),
        (300, {"shared": True, "gamma": True}),
    ],
)
def test_logp_within_budget(dtype, d, n, options):
    assert_close(director_logp, reference.director_logp, make(n, d, 517, **options), dtype)


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shared", [False, True])
def test_topk_within_budget(n, dtype, shared):
    inputs = separated(n, shared=shared) | {"k": 5}
    if shared:  # with a shared head, too, rounding does not change the order
        inputs["gamma"] = 0.5
    assert_close(director_topk, reference.director_topk, inputs, dtype)
    exact = {name: t.to(dtype).double() if isinstance(t, torch.Tensor) else t for name, t in inputs.items()}
    low = {name: t.to(dtype) if isinstance(t, torch.Tensor) else t for name, t in inputs.items()}
    assert torch.equal(director_topk(**low).indices, reference.director_topk(**exact).indices)


@pytest.mark.parametrize("n", [2, 20])
@pytest.mark.parametrize("dtype", [torch.float64, *LOW])
def test_several_attributes(n, dtype):
    hidden, lm, one, two = (t.detach().to(dtype) for t in several(n))
    bias = torch.randn(300).to(dtype)
    gammas = [0.7, torch.rand(n)]

    def run(f, cast):
        weights = [one.to(cast), two.to(cast)]
        return f(hidden.to(cast), lm.to(cast), weights, gamma=gammas, cls_bias=[None, bias.to(cast)])

    ours, low = run(director_logp, dtype), run(reference.director_logp, dtype)
    exact = run(reference.director_logp, torch.float64)
    assert distance(ours, exact) <= budget(ours, low, exact)
    top = director_topk(hidden, lm, [one, two], 4, gamma=gammas, cls_bias=[None, bias])
    torch.testing.assert_close(top.values, ours.topk(4).values)


@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "gamma": True}, {"shared": True, "bias": True, "gamma": True}]
)
def test_logp_gradcheck(options):
    given = make(3, 4, 7, torch.float64, **options)
    names = [name for name, t in given.items() if t is not None]

    def f(*tensors):
        return director_logp(**(given | dict(zip(names, tensors, strict=True))))

    assert gradcheck(f, tuple(given[name] for name in names))


def test_several_attributes_gradcheck():
    bias = torch.randn(7, dtype=torch.float64).requires_grad_()
    gamma = torch.rand(3, dtype=torch.float64).requires_grad_()

    def f(hidden, lm, one, two, bias, gamma):
        return director_logp(hidden, lm, [one, two], gamma=[gamma, 0.3], cls_bias=[None, bias])

    assert gradcheck(f, (*several(3, 4, 7), bias, gamma))


@pytest.mark.parametrize(
    "frozen", [("hidden",), ("lm_weight",), ("cls_weight",), ("lm_weight", "cls_weight")]
)
def test_frozen_inputs_leave_other_gradients_unchanged(frozen):
    whole = make(dtype=torch.float64)
    grads = torch.autograd.grad(director_logp(**whole).square().sum(), list(whole.values()))
    part = {n: t.detach().requires_grad_(n not in frozen) for n, t in whole.items()}
    wanted = [n for n in whole if n not in frozen]
    some = torch.autograd.grad(director_logp(**part).square().sum(), [part[n] for n in wanted])
    for name, g in zip(wanted, some, strict=True):
        torch.testing.assert_close(g, grads[list(whole).index(name)])


# ------------------------------------------------------------------ properties


@pytest.mark.parametrize("n", [2, 20])
def test_gamma_zero_or_a_constant_classifier_gives_the_language_model(n):
    given = make(n)
    given = {k: t.detach() for k, t in given.items()}
    lm = torch.log_softmax(given["hidden"].double() @ given["lm_weight"].double().T, -1)
    off = director_logp(**given, gamma=0.0)
    constant = given | {"cls_weight": torch.zeros_like(given["cls_weight"])}
    for logp in (
        off,
        *(director_logp(**constant, gamma=g, cls_bias=torch.full((1003,), 0.7)) for g in (0.5, 40.0)),
    ):
        torch.testing.assert_close(logp.double(), lm, atol=1e-4, rtol=1e-5)


def test_constant_lm_bias_cancels_and_constant_cls_bias_does_not():
    given = make(dtype=torch.float64)
    base = director_logp(**given)
    shifted = director_logp(**given, lm_bias=torch.full((1003,), 3.0, dtype=torch.float64))
    torch.testing.assert_close(shifted, base)
    assert distance(director_logp(**given, cls_bias=torch.full((1003,), 3.0).double()), base) > 0.01
    low = [director_logp(**given, cls_bias=torch.full((1003,), c).double()) for c in (-200.0, -190.0)]
    torch.testing.assert_close(low[0], low[1])  # logsigmoid(c) is c there


@pytest.mark.parametrize("n", [2, 20])
def test_vetoed_token_has_probability_zero_and_the_rest_is_renormalized(n):
    given = {k: t.detach() for k, t in make(n, dtype=torch.float64).items()}
    given["cls_weight"] = torch.zeros_like(given["cls_weight"])
    for dtype in (torch.float32, torch.float64):
        for veto in (-1e4, float("-inf")):
            bias = torch.zeros(1003, dtype=dtype)
            bias[17] = veto
            logp = director_logp(**{k: t.to(dtype) for k, t in given.items()}, cls_bias=bias)
            assert (logp[:, 17].exp() == 0).all()
            torch.testing.assert_close(logp.exp().sum(-1), torch.ones(n, dtype=dtype))
            lm = given["hidden"] @ given["lm_weight"].T
            lm[:, 17] = float("-inf")
            others = torch.arange(1003) != 17
            expected = torch.log_softmax(lm, -1)[:, others].to(dtype)
            torch.testing.assert_close(logp[:, others], expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [2, 20, 600])
def test_gamma_zero_with_an_infinite_logit_is_finite(n, dtype):
    given = make(n, dtype=dtype)
    bias = torch.zeros(1003, dtype=dtype)
    bias[3], bias[5] = float("-inf"), float("inf")
    gamma = torch.zeros(n, dtype=dtype)
    gamma[1:] = 1.0
    gamma.requires_grad_()
    logp = director_logp(**given, gamma=gamma, cls_bias=bias)
    assert logp.isfinite()[0].all() and not logp.isnan().any()
    assert (logp[1:, 3] == -torch.inf).all()
    keep = torch.arange(1003) != 3
    grads = torch.autograd.grad(logp[:, keep].sum(), [*given.values(), gamma])
    assert all(g.isfinite().all() for g in grads)


def test_shared_head_is_a_power_of_the_sigmoid():
    given = make(shared=True, dtype=torch.float64)
    u = given["hidden"] @ given["lm_weight"].T
    p = torch.softmax(u, -1) * torch.sigmoid(u) ** 1.7
    logp = director_logp(given["hidden"], given["lm_weight"], None, gamma=1.7, cls_affine=(1.0, 0.0))
    torch.testing.assert_close(logp.exp(), p / p.sum(-1, keepdim=True))


def test_published_double_normalization_gives_the_same():
    given = make(dtype=torch.float64)
    lm, cls = (given["hidden"] @ given[w].T for w in ("lm_weight", "cls_weight"))
    published = torch.log_softmax(torch.log_softmax(lm, -1) + 0.5 * F.logsigmoid(cls), -1)
    torch.testing.assert_close(director_logp(**given, gamma=0.5), published)


# ------------------------------------------------------------------ top k


def test_topk_breaks_ties_by_lower_index_also_for_minus_infinity():
    for n in (1, 20, 600):
        bias = torch.tensor([1.0, 3.0, 3.0, -torch.inf, -torch.inf])
        zero = torch.zeros(n, 2)
        top = director_topk(zero, torch.zeros(5, 2), torch.zeros(5, 2), 5, lm_bias=bias)
        assert (top.indices == torch.tensor([1, 2, 0, 3, 4])).all()
        assert (top.values[:, 3:] == -torch.inf).all()


@pytest.mark.parametrize("n", [1, 12, 40, 600])
def test_topk_breaks_ties_by_lower_index_across_blocks_and_threads(n):
    v, d = 5000, 256  # many blocks; all scores are equal
    zero = torch.zeros(v, d)
    for _ in range(3):
        top = director_topk(torch.ones(n, d), zero, zero, 7)
        assert (top.indices == torch.arange(7)).all()


@pytest.mark.parametrize("k", [1, 50, 1500, 2000])
def test_topk_of_large_k_equals_sort(k):
    given = {name: t.detach() for name, t in make(3, v=2000, dtype=torch.float64).items()}
    values, indices = reference.director_logp(**given).sort(descending=True, stable=True)
    top = director_topk(**given, k=k)
    torch.testing.assert_close(top.values, values[:, :k])
    assert torch.equal(top.indices, indices[:, :k])


def test_topk_gradient_raises():
    with pytest.raises(NotImplementedError, match="director_logp"):
        director_topk(**make(), k=3).values.sum().backward()


def test_topk_allocates_less_than_one_row_of_scores_per_row():
    from torch.profiler import ProfilerActivity, profile

    given = {name: t.detach() for name, t in make(8, 64, 20_000).items()}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        director_topk(**given, k=10)
    assert sum(max(0, e.cpu_memory_usage) for e in p.events() if not e.cpu_children) < 8 * 20_000
