"""The same few hundred random calls every time, and that the fuzzer finds an error; `make fuzz` goes on."""

import fuzz
import pytest
import torch

import sukhops


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_cases_of_one_seed(name):
    assert fuzz.run(name, seed=0, cases=25) >= 25


def broken(function, error):
    """The function with an error in the first entry of its first result."""

    def f(*arguments, **options):
        found = function(*arguments, **options)
        first, *rest = found if isinstance(found, tuple) else (found,)
        place = torch.zeros_like(first).view(-1)
        place[:1] = error
        first = first + place.view(first.shape)
        return type(found)(first, *rest) if rest else first

    return f


@pytest.mark.parametrize("error", [1e-2, torch.nan])
@pytest.mark.parametrize("name", ["linear_logp", "linear_topk", "director_logp", "segmentation_entropy"])
def test_an_error_is_found(name, error, monkeypatch):
    monkeypatch.setattr(sukhops, name, broken(getattr(sukhops, name), error))
    with pytest.raises(AssertionError, match=r"where the truth is|over budget|values"):
        fuzz.run(name, seed=0, cases=25, shrink=False)


def test_an_input_that_changes_is_found(monkeypatch):
    plain = sukhops.segmentation_logz

    def f(scores, lengths=None):
        found = plain(scores, lengths)
        scores.detach().view(-1)[:1] += 1
        return found

    monkeypatch.setattr(sukhops, "segmentation_logz", f)
    with pytest.raises(AssertionError, match=r"changed it|other bits"):
        fuzz.run("segmentation_logz", seed=0, cases=25, shrink=False)
