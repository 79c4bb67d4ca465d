"""Makes random calls of the public functions on the CPU and compares each with the reference in float64.

python tests/fuzz.py --minutes 10                     run rounds with new seeds until one fails
python tests/fuzz.py --seed 17 --only linear_logp     repeat one round
"""

import argparse
import faulthandler
import sys
import time
import traceback
from collections import Counter

import fuzz_heads
import fuzz_labeled
import fuzz_losses
import fuzz_pairs
import fuzz_sequences
import hypothesis
import torch
from fuzz_inputs import Source
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

TARGETS = (
    fuzz_heads.TARGETS
    | fuzz_sequences.TARGETS
    | fuzz_losses.TARGETS
    | fuzz_labeled.TARGETS
    | fuzz_pairs.TARGETS
)
CASES = 25  # per target and round
HANG = 120  # after this many seconds in one case, print the traceback and exit


def run(name: str, seed: int, cases: int = CASES, *, shrink: bool = True) -> int:
    """Runs random cases of a target and returns their number; raises with the smallest failing case."""
    ran = 0

    @hypothesis.seed(seed)
    @settings(
        max_examples=cases, database=None, deadline=None, report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, *([Phase.shrink] if shrink else [])],
    )  # fmt: skip
    @hypothesis.given(st.data())
    def each(data) -> None:
        nonlocal ran
        ran += 1
        faulthandler.dump_traceback_later(HANG, exit=True)
        try:
            TARGETS[name](Source(data))
        finally:
            faulthandler.cancel_dump_traceback_later()

    each()
    return ran


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, help="run only the round with this seed")
    parser.add_argument("--only", choices=TARGETS, metavar="NAME", help=", ".join(TARGETS))
    options = parser.parse_args()
    faulthandler.enable()  # print the traceback of a crash
    torch.use_deterministic_algorithms(True)  # also fills new tensors with NaN, to detect unwritten results
    end = time.monotonic() + 60 * options.minutes
    seed = int(time.time()) if options.seed is None else options.seed
    counts: Counter[str] = Counter()
    while True:
        print(f"seed {seed}:", end=" ", flush=True)
        for name in [options.only] if options.only else TARGETS:
            try:
                counts[name] += run(name, seed)
            except Exception:
                traceback.print_exc()
                print(f"\n{name} failed: python tests/fuzz.py --seed {seed} --only {name}", flush=True)
                return 1
        each = ", ".join(f"{name} {n}" for name, n in counts.items())
        print(f"{each}; {counts.total()} in all", flush=True)
        if options.seed is not None or time.monotonic() > end:
            return 0
        seed += 1


if __name__ == "__main__":
    sys.exit(main())
