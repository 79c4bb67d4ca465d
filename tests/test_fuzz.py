"""Runs the fuzzer (`make fuzz`) with a fixed seed, and checks that it finds errors."""

import fuzz
import pytest
import torch

import sukhops


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_cases_of_a_fixed_seed(name):
    assert fuzz.run(name, seed=0, cases=25) >= 25


def broken(function, error):
    """Returns the function with `error` added to the first element of its first result."""

    def f(*arguments, **options):
        found = function(*arguments, **options)
        first, *rest = found if isinstance(found, tuple) else (found,)
        change = torch.zeros_like(first).view(-1)
        change[:1] = error
        first = first + change.view(first.shape)
        return type(found)(first, *rest) if rest else first

    return f


@pytest.mark.parametrize("error", [1e-2, torch.nan])
@pytest.mark.parametrize("name", ["linear_logp", "linear_topk", "director_logp", "segmentation_entropy"])
def test_wrong_result_is_found(name, error, monkeypatch):
    monkeypatch.setattr(sukhops, name, broken(getattr(sukhops, name), error))
    with pytest.raises(AssertionError, match=r"where the truth is|over budget|values"):
        fuzz.run(name, seed=0, cases=25, shrink=False)


def test_changed_argument_is_found(monkeypatch):
    plain = sukhops.segmentation_logz

    def f(scores, lengths=None):
        found = plain(scores, lengths)
        scores.detach().view(-1)[:1] += 1
        return found

    monkeypatch.setattr(sukhops, "segmentation_logz", f)
    with pytest.raises(AssertionError, match=r"changed it|other bits"):
        fuzz.run("segmentation_logz", seed=0, cases=25, shrink=False)
