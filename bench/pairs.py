"""Bradley-Terry scores of many small sets of battles, and length-controlled pairs of many prompts.

The peers are choix (from PyPI), which solves one set at a time, and a Python loop over prompts. Both are
timed on a part of the problems, in the same rounds; results are in problems per second. `--record` writes to
bench/results instead of bench/own.
"""

import sys
import time
from importlib.util import find_spec

import harness
import torch
from tqdm import tqdm

from sukhops.pairs import bradley_terry, length_controlled_pairs

SETS, JUDGMENTS, PROMPTS, RESPONSES, ROUNDS = 10_000, 11, 1_000_000, 7, 7
RIDGE, RHO = 1e-2, 0.32


def battles() -> torch.Tensor:
    """Simulated wins: a noisy judge compares each pair of judgments twice, once in either order."""
    g = torch.Generator().manual_seed(0)
    quality = torch.randn(SETS, JUDGMENTS, generator=g, dtype=torch.float64)
    win = torch.sigmoid(quality.unsqueeze(2) - quality.unsqueeze(1))
    wins = torch.rand(win.shape, generator=g, dtype=torch.float64) < win
    return (wins.double() + (~wins).mT) * (1 - torch.eye(JUDGMENTS, dtype=torch.float64))


def gradient_norm(wins: torch.Tensor, scores: torch.Tensor) -> float:
    """Gradient norm of the penalized likelihood, the largest over the sets."""
    flow = wins * torch.sigmoid(scores.unsqueeze(-2) - scores.unsqueeze(-1))
    return ((flow - flow.mT).sum(-1) - RIDGE * scores).norm(dim=-1).max().item()


def newton(wins: torch.Tensor) -> torch.Tensor:
    return bradley_terry(wins, ridge=RIDGE)


def choix(wins: torch.Tensor) -> torch.Tensor:
    import choix

    found = []
    for one in wins:
        data = [pair for pair in one.nonzero().tolist() for _ in range(int(one[tuple(pair)]))]
        found.append(choix.opt_pairwise(JUDGMENTS, data, alpha=RIDGE / 2, tol=1e-9))
    return torch.stack([torch.from_numpy(scores) for scores in found])


def control(scores: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    pairs = length_controlled_pairs(scores, lengths, RHO)
    return torch.stack([pairs.chosen, pairs.rejected], 1)


def loop(scores: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    found = []
    for s, n in zip(scores.tolist(), lengths.tolist(), strict=True):
        slack = RHO * (max(s) - min(s))
        top = [k for k in range(RESPONSES) if max(s) - s[k] <= slack]
        bottom = [k for k in range(RESPONSES) if s[k] - min(s) <= slack]
        found.append((min(top, key=lambda k: (n[k], -s[k])), max(bottom, key=lambda k: (n[k], -s[k]))))
    return torch.tensor(found)


def main() -> None:
    g = torch.Generator().manual_seed(1)
    scores = torch.rand(PROMPTS, RESPONSES, generator=g, dtype=torch.float64)
    lengths = torch.randint(1, 4000, scores.shape, generator=g)
    solvers = {"sukhops": newton}
    if find_spec("choix"):
        solvers["choix"] = choix
    cases = [
        (f"Bradley-Terry, {SETS:,} sets of {JUDGMENTS}", [battles()], solvers, 10),
        (f"length control, {PROMPTS:,} prompts of {RESPONSES}", [scores, lengths],
         {"sukhops": control, "a loop": loop}, 10_000),
    ]  # fmt: skip
    rows = []
    for case, inputs, providers, few in cases:
        given = {name: inputs if name == "sukhops" else [t[:few] for t in inputs] for name in providers}
        times: dict[str, list[float]] = {name: [] for name in providers}
        results = {}
        for _ in tqdm(range(ROUNDS), desc=case):
            for name, call in providers.items():
                start = time.perf_counter()
                results[name] = call(*given[name])
                times[name].append((time.perf_counter() - start) / len(given[name][0]))
        ours = results["sukhops"][:few]
        difference = max((found[:few] - ours).abs().max().item() for found in results.values())
        if difference > 1e-6:
            raise SystemExit(f"{case}: results differ by {difference}")
        for name in providers:
            each = harness.quantile(times[name], 50)
            row = {
                "op": "pairs", "case": case, "provider": name, "timed": len(given[name][0]),
                "seconds": each * len(inputs[0]), "per_second": 1 / each, "difference": difference,
                **harness.machine(),
            }  # fmt: skip
            if providers[name] in (newton, choix):
                row["gradient_norm"] = gradient_norm(given[name][0], results[name])
            rows.append(row)
            print(f"{name:>9}: {row['seconds']:.3g} s for all, {row['per_second']:,.0f} a second")
    harness.save("pairs", rows, "--record" in sys.argv)


if __name__ == "__main__":
    main()
