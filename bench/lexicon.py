"""Counts the units of a text and maps the text to unit ids, with sukhops and with plain Python.

The text is the source code of Python's standard library. Plain Python is timed on a part of it, in the same
rounds; results are in characters per second. The results are compared before timing. `--record` writes to
bench/results instead of bench/own.
"""

import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import harness
from torch import Tensor
from tqdm import tqdm

import sukhops

CHARACTERS, BLOCK, FEW, ROUNDS = 10_000_000, 100_000, 200_000, 5
MAX_LENGTH, MIN_COUNT = 4, 200


def source() -> str:
    paths = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    parts, total = [], 0
    for path in paths:
        parts.append(path.read_text(encoding="utf-8", errors="replace"))
        total += len(parts[-1])
        if total >= CHARACTERS:
            break
    return "".join(parts)[:CHARACTERS]


def count(text: str) -> list[str]:
    return sukhops.Lexicon.from_text([text], MAX_LENGTH, MIN_COUNT).units


def plain_count(text: str) -> list[str]:
    units = ["", *sorted(set(text))]
    for length in range(2, MAX_LENGTH + 1):
        grams = Counter(
            line[i : i + length] for line in text.split("\n") for i in range(len(line) - length + 1)
        )
        units += sorted(gram for gram, n in grams.items() if n >= MIN_COUNT)
    return units


def blocks(text: str) -> list[str]:
    return [text[i : i + BLOCK] for i in range(0, len(text), BLOCK)]


def mapping(lexicon: sukhops.Lexicon):
    def run(text: str) -> Iterator[Tensor]:
        for block in blocks(text):
            yield lexicon.unit_ids([block])[0][0]

    return run


def plain_mapping(lexicon: sukhops.Lexicon):
    index = {unit: i for i, unit in enumerate(lexicon.units)}

    def run(text: str) -> Iterator[list]:
        for block in blocks(text):
            yield [
                [index.get(block[t : t + n], -1) if t + n <= len(block) else -1
                 for n in range(1, MAX_LENGTH + 1)] for t in range(len(block))
            ]  # fmt: skip

    return run


def main() -> None:
    text = source()
    lexicon = sukhops.Lexicon.from_text([text], MAX_LENGTH, MIN_COUNT)
    cases = [
        ("counting", {"sukhops": count, "plain Python": plain_count}),
        ("mapping", {"sukhops": mapping(lexicon), "plain Python": plain_mapping(lexicon)}),
    ]
    rows = []
    for case, providers in cases:
        ours, plain = (list(call(text[:FEW])) for call in providers.values())
        if [part if case == "counting" else part.tolist() for part in ours] != plain:
            raise SystemExit(f"{case}: sukhops and plain Python differ")
        given = {"sukhops": text, "plain Python": text[:FEW]}
        times: dict[str, list[float]] = {name: [] for name in providers}
        for _ in tqdm(range(ROUNDS), desc=case):
            for name, call in providers.items():
                start = time.perf_counter()
                for _ in call(given[name]):
                    pass
                times[name].append((time.perf_counter() - start) / len(given[name]))
        for name in providers:
            row = {
                "op": "lexicon", "case": case, "provider": name, "timed": len(given[name]),
                "per_second": 1 / harness.quantile(times[name], 50),
                "units": len(lexicon), "max_length": MAX_LENGTH, "min_count": MIN_COUNT, **harness.machine(),
            }  # fmt: skip
            rows.append(row)
            print(f"{name:>12}: {row['per_second']:,.0f} characters a second")
    harness.save("lexicon", rows, "--record" in sys.argv)


if __name__ == "__main__":
    main()
