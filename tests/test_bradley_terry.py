"""Bradley-Terry scores: compared with other libraries' solvers, and properties for any battles."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sukhops.pairs import bradley_terry

choix = pytest.importorskip("choix")
optimize = pytest.importorskip("scipy.optimize")


def battles(problems, players, seed=0, share=1.0):
    """Random battles in float64; `share` of the pairs have battles."""
    g = torch.Generator().manual_seed(seed)
    wins = torch.randint(0, 5, (problems, players, players), generator=g, dtype=torch.float64)
    met = torch.rand(problems, players, players, generator=g) < share
    wins = wins * (met | met.mT) * 0.7
    wins.diagonal(dim1=1, dim2=2).zero_()
    return wins


def gradient(wins, scores, ridge):
    """The gradient of sum wins_mn log sigmoid(e_m - e_n) - ridge / 2 |e|^2."""
    lose = torch.sigmoid(scores[..., None, :] - scores[..., :, None])  # lose[m, n]: P(n beats m)
    return (wins * lose).sum(-1) - (wins.mT * lose.mT).sum(-1) - ridge * scores


problems = st.builds(
    battles, st.integers(1, 4), st.integers(1, 12), st.integers(0, 10**6), st.sampled_from([0.1, 0.5, 1.0])
)
ridges = st.sampled_from([1e-6, 1e-2, 1.0, 100.0])


@pytest.mark.parametrize("players", [2, 3, 11])
def test_maximum_likelihood_equals_choix(players):
    wins = battles(5, players) + 0.1 * (1 - torch.eye(players, dtype=torch.float64))
    ours = bradley_terry(wins, ridge=0)
    for one, scores in zip(wins, ours, strict=True):
        theirs = torch.from_numpy(choix.ilsr_pairwise_dense(one.numpy(), tol=1e-12, max_iter=1000))
        assert (scores - (theirs - theirs.mean())).abs().max() < 1e-8


@pytest.mark.parametrize("ridge", [1e-2, 1.0])
def test_ridge_equals_scipy_optimize(ridge):
    (wins,) = battles(1, 7, share=0.5)

    def loss(e):
        e = torch.from_numpy(e).requires_grad_()
        value = -(wins * torch.nn.functional.logsigmoid(e[:, None] - e)).sum() + ridge / 2 * e.square().sum()
        return value.item(), torch.autograd.grad(value, e)[0].numpy()

    found = optimize.minimize(loss, torch.zeros(7).double().numpy(), jac=True, method="BFGS", tol=1e-9)
    assert (bradley_terry(wins, ridge=ridge) - torch.from_numpy(found.x)).abs().max() < 1e-6


@given(problems, ridges)
@example(battles(2, 9, 524287, 1.0), 1e-6)  # a past bug: rounding divided by the ridge shifted the mean
@settings(deadline=None, max_examples=60)
def test_gradient_and_mean_are_zero(wins, ridge):
    scores = bradley_terry(wins, ridge=ridge)
    assert gradient(wins, scores, ridge).norm(dim=-1).max() < 1e-8
    assert scores.mean(-1).abs().max() < 1e-10


@given(problems, ridges, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_permutation_of_players_and_reversed_battles(wins, ridge, random):
    scores = bradley_terry(wins, ridge=ridge)
    order = list(range(wins.shape[-1]))
    random.shuffle(order)
    assert (bradley_terry(wins[:, order][:, :, order], ridge=ridge) - scores[:, order]).abs().max() < 1e-9
    assert (bradley_terry(wins.mT, ridge=ridge) + scores).abs().max() < 1e-9


def test_symmetric_battles_give_zero_scores():
    wins = battles(20, 9)
    assert bradley_terry(wins + wins.mT).abs().max() < 1e-12
    assert (bradley_terry(torch.zeros(3, 4, 4)) == 0).all()


def test_two_players_differ_by_their_log_odds():
    wins = torch.tensor([[0, 3.0], [2.0, 0]], dtype=torch.float64)
    scores = bradley_terry(wins, ridge=0)
    assert abs((scores[0] - scores[1]).item() - math.log(1.5)) < 1e-12
    assert (bradley_terry(1e6 * wins, ridge=0) - scores).abs().max() < 1e-12


def test_disconnected_groups_are_solved_separately():
    one, two = battles(1, 4, seed=1)[0] + 0.1, battles(1, 3, seed=2)[0] + 0.1
    both = torch.block_diag(one, two, torch.zeros(1, 1))
    both.fill_diagonal_(0)
    for ridge in (0, 1e-2):
        parts = [bradley_terry(w.fill_diagonal_(0), ridge=ridge) for w in (one, two)]
        assert (bradley_terry(both, ridge=ridge) - torch.cat([*parts, torch.zeros(1)])).abs().max() < 1e-10


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("ridge", [1e-6, 1e-2])
def test_player_who_always_wins_gets_a_finite_score(scale, ridge):
    wins = scale * torch.ones(11, 11, dtype=torch.float64).triu(1)
    scores = bradley_terry(wins, ridge=ridge)
    assert (scores.diff() < 0).all()
    assert gradient(wins, scores, ridge).norm() < 1e-8


def test_many_problems_at_once_equal_each_alone():
    wins = battles(2500, 5).view(50, 50, 5, 5)
    scores = bradley_terry(wins)
    assert scores.shape == (50, 50, 5)
    for i, j in [(0, 0), (20, 23), (20, 24), (49, 49)]:
        assert (scores[i, j] - bradley_terry(wins[i, j])).abs().max() < 1e-12
    assert bradley_terry(wins[:0]).shape == (0, 50, 5)


def test_hundreds_of_players():
    (wins,) = battles(1, 300, share=0.3)
    scores = bradley_terry(wins)
    assert gradient(wins, scores, 1e-2).norm() < 1e-8


def test_standard_errors():
    level = torch.tensor([[0.0, 8.0], [8.0, 0.0]])
    _, errors = bradley_terry(level, ridge=0, return_errors=True)
    # the difference of the scores has variance 1 / (16 * 1/4), and each score is half of the difference
    assert torch.allclose(errors, torch.full((2,), 0.25))
    (wins,) = battles(1, 6) + 0.3
    wins.fill_diagonal_(0)
    scores, errors = bradley_terry(wins, ridge=0, return_errors=True)
    win = torch.sigmoid(scores[:, None] - scores)
    weights = (wins + wins.mT) * win * win.mT
    laplacian = torch.diag(weights.sum(1)) - weights
    assert (errors - torch.linalg.pinv(laplacian, hermitian=True).diagonal().sqrt()).abs().max() < 1e-7
    both = torch.block_diag(wins, wins)
    _, apart = bradley_terry(both, ridge=1e-2, return_errors=True)
    _, alone = bradley_terry(wins, ridge=1e-2, return_errors=True)
    assert (apart - alone.repeat(2)).abs().max() < 1e-10
    assert (alone < errors).all()  # the ridge reduces the error


def test_dtypes():
    wins = torch.tensor([[0, 3], [1, 0]])
    assert bradley_terry(wins).dtype == torch.float32
    assert bradley_terry(wins.double()).dtype == torch.float64
    assert torch.equal(bradley_terry(wins.half()), bradley_terry(wins.double()).half())


def test_invalid_arguments():
    good = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    for bad in (good + 1, good * -1, good * math.inf, good * math.nan, good[:1], good[0], good[:0, :0]):
        with pytest.raises(ValueError, match=r"^battles: "):
            bradley_terry(bad)
    with pytest.raises(TypeError, match=r"^battles: "):
        bradley_terry([[0, 1], [1, 0]])
    for ridge in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"^ridge: "):
            bradley_terry(good, ridge=ridge)
    with pytest.raises(ValueError, match=r"^ridge: expected > 0, got 0: 1 of the problems"):
        bradley_terry(torch.stack([good, good.triu()]), ridge=0)
    with pytest.raises(ValueError, match=r"^ridge: 1e-300 is too small"):
        bradley_terry(good.triu(), ridge=1e-300)
