"""Writes the README's tables and the plots from bench/results/*.jsonl; `--check` only compares."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"


def rows(name: str) -> list[dict]:
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(header: list[str], body: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, form: str = ",.0f", unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def vocab_head() -> str:
    """Forward and backward of every provider, against the products that cannot be avoided."""
    body = []
    for r in rows("vocab_head"):
        if r["mode"] != "fwd_bwd" or r["case"] == "growth with V":
            continue
        if r.get("skipped"):
            body.append([r["case"], r["dtype"], r["provider"], r["skipped"], "", "", ""])
            continue
        body.append([
            r["case"] + (f" ({r['shape']['rows']} rows)" if r["shape"]["rows"] != 4096 else ""), r["dtype"],
            r["provider"], number(r["p50_ms"]),
            f"{r['ratio_p50']:.2f} ({r['ratio_p20']:.2f} to {r['ratio_p80']:.2f})",
            number(r.get("memory_mib")), f"{r['error']:.1e}",
        ])  # fmt: skip
    header = ["case", "dtype", "provider", "ms", "× bare products", "MiB above inputs and gradients", "error"]
    return table(header, body)


def train_step() -> str:
    body = [
        [r["provider"], f"{r['tokens_per_second']:,}", number(r["memory_mib"]), f"{r['losses'][-1]:.4f}"]
        for r in rows("train_step")
    ]
    return table(["head", "tokens/s", "peak MiB", "loss after 5 steps"], body)


TABLES: dict[str, Callable[[], str]] = {"vocab_head": vocab_head, "train_step": train_step}


def machine_line() -> str:
    found = rows("vocab_head")
    if not found:
        return ""
    r = found[0]
    return f"{r['machine']}, {r['threads']} threads, {r['isa']}, torch {r['torch']}, commit {r['commit']}."


def filled(text: str) -> str:
    """The README with every block between `<!-- table NAME -->` and `<!-- end -->` made anew."""
    for name, make in (TABLES | {"machine": machine_line}).items():
        start, end = f"<!-- table {name} -->", "<!-- end -->"
        if start in text:
            head, rest = text.split(start, 1)
            text = f"{head}{start}\n{make()}\n{end}{rest.split(end, 1)[1]}"
    return text


def plot_vocab_head(path: Path) -> None:
    """Time and memory of each provider against the size of the vocabulary."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    found = [r for r in rows("vocab_head") if r["case"] == "growth with V" and not r.get("skipped")]
    fewest = min(r["shape"]["rows"] for r in found)
    found = [r for r in found if r["shape"]["rows"] == fewest and r["dtype"] == "float32"]
    plt.rcParams["svg.hashsalt"] = "sukhops"
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, field, label in zip(
        axes, ("p50_ms", "memory_mib"), ("milliseconds", "MiB above inputs and gradients"), strict=True
    ):
        for provider in dict.fromkeys(r["provider"] for r in found):
            points = [(r["shape"]["V"], r[field]) for r in found if r["provider"] == provider and field in r]
            axis.plot(*zip(*points, strict=True), marker="o", label=provider)
        axis.set(xscale="log", yscale="log", xlabel="vocabulary", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"linear_logp, forward and backward, {fewest} rows, float32")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the README is not up to date")
    readme = ROOT / "README.md"
    text = readme.read_text()
    if parser.parse_args().check:
        raise SystemExit(filled(text) != text)
    readme.write_text(filled(text))
    if rows("vocab_head"):
        plot_vocab_head(RESULTS / "vocab_head.svg")
    print("README.md and the plots are made from bench/results")


if __name__ == "__main__":
    main()
