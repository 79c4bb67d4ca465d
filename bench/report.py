"""Writes the tables of README.md and docs/*.md and the plots from bench/results/*.jsonl.

A block `<!-- table NAME -->` ... `<!-- end -->` is made from bench/results/NAME.jsonl; the tables "headline",
"machine" and "papers" are made from several files. A case that was measured over several shapes is not in the
table but in a plot, NAME_CASE_CPU.svg, for each class of CPU. `--check` writes nothing and fails if a table
is out of date; `--own` only plots the results of `make bench` in bench/own.
"""

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import NamedTuple

import papers
from tables import TABLES, markdown, milliseconds, number, sizes

ROOT = Path(__file__).parent.parent
RESULTS, OWN = ROOT / "bench" / "results", ROOT / "bench" / "own"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


class Headline(NamedTuple):
    """A case of the README's table, with the columns that its rows do not contain."""

    name: str  # bench/results/<name>.jsonl
    case: str
    title: str
    ignored: int | None  # percent of ignored rows; None if the operation has no targets
    floor: str
    mode: str = "fwd_bwd"


HEADLINES = [
    Headline("vocab_head", "log-probs in four modes", "`linear_logp`", 25, "3 products"),
    Headline("vocab_head", "DPO with a reference model", "DPO with a reference model", 25, "5 products"),
    Headline(
        "preference", "CRINGE, k = 5", "CRINGE, k = 5", 25, "4 products of positive, 1 of negative rows"
    ),
    Headline("director", "training", "Director training", 0, "4 products of the plain half"),
    Headline("director", "decoding", "Director decoding", None, "one read of both weights", "fwd_nograd"),
    Headline("adaptive_span", "learned spans", "attention, mean span 314", None, "causal SDPA without spans"),
    Headline(
        "segmentation", "log-partition and gradient", "`segmentation_logz`", None, "`exp` and `cumprod`"
    ),
]


def rows(name: str) -> list[dict]:
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def headline() -> str:
    """One line per headline and CPU: time and memory of sukhops and of the fastest peer, and the floor.

    bfloat16 is shown for decoding only; docs/benchmarks.md has it for training too.
    """

    def cost(r: dict) -> str:
        return f"{milliseconds(r)} ms" + (f", {r['memory_mib']:,.0f} MiB" if "memory_mib" in r else "")

    body = []
    for h in HEADLINES:
        found = [r for r in rows(h.name) if (r["case"], r["mode"]) == (h.case, h.mode) and "p50_ms" in r]
        found = [r for r in found if r["dtype"] == "float32" or h.mode == "fwd_nograd"]
        for ours in (r for r in found if r["provider"] == "sukhops"):
            same = [r for r in found if all(r[key] == ours[key] for key in ("dtype", "shape", "isa"))]
            best = min((r for r in same if r is not ours), key=lambda r: r["p50_ms"], default=None)
            ignored = "no targets" if h.ignored is None else f"{h.ignored}%"
            line = [h.title, sizes(ours), ignored, ours["dtype"], f"{ours['isa']}, {ours['threads']} threads"]
            line += [cost(ours), f"{best['provider']}: {cost(best)}" if best else "not measured"]
            body.append([*line, number(ours.get("ratio_p50"), ".2f"), h.floor])
    header = ["operation", "shape", "ignored rows", "dtype", "CPU", "sukhops", "best peer"]
    return markdown([*header, "× floor", "floor"], body)


def sweeps(found: list[dict]) -> dict[str, str]:
    """Cases measured over more than two shapes: name of the case, name of the size that varies."""
    shapes: dict[str, list[dict]] = {}
    for r in found:
        if "shape" in r and r["shape"] not in shapes.setdefault(r["case"], []):
            shapes[r["case"]].append(r["shape"])
    axis = {c: [k for k in s[0] if len({str(shape.get(k)) for shape in s}) > 2] for c, s in shapes.items()}
    return {c: keys[0] for c, keys in axis.items() if keys}


def measured(found: list[dict]) -> str:
    """Every provider of every case: time, ratio to the floor, memory, error."""
    swept, body = sweeps(found), []
    for r in found:
        if r["case"] in swept:
            continue
        case = r["case"] + {"fwd_bwd": "", "fwd_nograd": ", no gradient"}.get(r["mode"], f", {r['mode']}")
        line = [case, r["dtype"], r["isa"], r["provider"]]
        if why := r.get("skipped"):
            same = [o for o in found if all(o[key] == r[key] for key in ("case", "mode", "dtype", "isa"))]
            if all(o.get("skipped") == why for o in same):
                line[-1] = "all"
            if [*line, why, "", "", ""] not in body:
                body.append([*line, why, "", "", ""])
            continue
        form = ".2f" if r.get("ratio_p50", 1) >= 0.1 else ".4f"
        ratio = (
            f"{r['ratio_p50']:{form}} ({r['ratio_p20']:{form}} to {r['ratio_p80']:{form}})"
            if "ratio_p50" in r
            else ""
        )
        memory, error = number(r.get("memory_mib")), number(r.get("error"), ".1e")
        body.append([*line, milliseconds(r), ratio, memory, error])
    return markdown(["case", "dtype", "CPU", "provider", "ms", "× floor", "MiB", "error"], body)


def grid(found: list[dict]) -> str:
    """One line per shape: milliseconds of every provider, and the peers' times relative to sukhops."""
    body = []
    groups: dict[tuple, list[dict]] = {}
    for r in found:
        groups.setdefault((*map(str, r["shape"].values()), r["dtype"], r["isa"]), []).append(r)
    for key, group in groups.items():
        line, ours = list(key), None
        for r in group:
            if r.get("skipped"):
                line.append(r["skipped"])
                continue
            ours = ours or r["p50_ms"]
            times = "" if r["p50_ms"] is ours else f" ({r['p50_ms'] / ours:,.0f} ×)"
            line.append(milliseconds(r) + times)
        body.append(line)
    header = [*found[0]["shape"], "dtype", "CPU", *dict.fromkeys(r["provider"] for r in found)]
    return markdown(header, body)


def example(found: list[dict]) -> str:
    """Mean ± standard deviation over seeds of each variant, in the columns that the example defines."""
    columns, runs = found[0]["columns"], found[1:]
    body = []
    for variant in dict.fromkeys(r["variant"] for r in runs):
        cells = [str(variant)]
        for field, form in columns.items():
            values = [r[field] for r in runs if r["variant"] == variant and r.get(field) is not None]
            mean = f"{statistics.mean(values):{form}}" if values else ""
            cells.append(mean + (f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""))
        body.append(cells)
    table = markdown(["", *columns], body)
    if not found[0].get("minutes"):
        return table
    return f"{table}\n\nThe whole run took {found[0]['minutes']:.0f} minutes on a CPU with {found[0]['isa']}."


def machine() -> str:
    """The machine on which each table was measured."""
    names: dict[str, list[str]] = {}
    for path in sorted(RESULTS.glob("*.jsonl")):
        for r in rows(path.stem):
            if "isa" in r:
                text = f"{r['machine']}, {r['threads']} threads, {r['isa']}, torch {r['torch']}"
                names.setdefault(text, [])
                if path.stem not in names[text]:
                    names[text].append(path.stem)
    return "\n".join(f"- {', '.join(files)}: {text}." for text, files in names.items())


def block(name: str) -> str:
    if name in ("headline", "machine"):
        return {"headline": headline, "machine": machine}[name]()
    if name == "papers":
        return papers.table(rows)
    found = rows(name)
    if not found:
        return "Not recorded yet."
    if name in TABLES:
        return TABLES[name](found)
    if name.endswith("_grid"):
        return grid(found)
    return example(found) if name.startswith("example_") else measured(found)


def filled(text: str) -> str:
    """The text of a document with all of its tables replaced."""
    return re.sub(
        r"<!-- table (\w+) -->\n.*?<!-- end -->",
        lambda found: f"<!-- table {found[1]} -->\n{block(found[1])}\n<!-- end -->",
        text,
        flags=re.DOTALL,
    )


def pyplot():
    """Matplotlib, configured so that the same rows give the same file."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "sukhops"
    return plt


def plot(name: str, found: list[dict], case: str, axis: str, folder: Path = RESULTS) -> None:
    """Plots time, and memory if measured, of each provider over the size that varies."""
    plt = pyplot()
    isa = found[0]["isa"].replace(" + bfloat16 products", "_bf16")
    found = [r for r in found if r["case"] == case and not r.get("skipped")]
    if not found:
        return
    fields = [("p50_ms", "milliseconds")]
    if any(r.get("memory_mib") for r in found):
        fields.append(("memory_mib", "MiB above inputs and gradients"))
    figure, axes = plt.subplots(
        1, len(fields), figsize=(4.5 * len(fields), 3.4), layout="constrained", squeeze=False
    )
    for panel, (field, label) in zip(axes[0], fields, strict=True):
        for line in dict.fromkeys((r["provider"], r["dtype"]) for r in found):
            points = [
                (r["shape"][axis], r[field])
                for r in found
                if (r["provider"], r["dtype"]) == line and r.get(field)
            ]
            if points:
                panel.plot(*zip(*sorted(points), strict=True), marker="o", label=", ".join(line))
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel=label)
        panel.grid(alpha=0.3)
    axes[0][0].legend(fontsize="small")
    figure.suptitle(f"{name}: {case} ({isa})")
    stem = re.sub(r"\W+", "_", f"{name} {case} {isa}")
    figure.savefig(folder / f"{stem}.svg", metadata={"Date": None})
    plt.close(figure)


def bars(folder: Path) -> None:
    """Plots milliseconds of every provider, one panel for each case in a folder."""
    plt = pyplot()
    found = [json.loads(line) for p in sorted(folder.glob("*.jsonl")) for line in p.read_text().splitlines()]
    found = [r for r in found if r.get("p50_ms")]

    def key(r: dict) -> tuple:
        return r["op"], r["case"], r["dtype"], r["mode"], sizes(r)

    cases = list(dict.fromkeys(map(key, found)))
    figure, panels = plt.subplots(
        len(cases), figsize=(7, 1.5 * len(cases)), layout="constrained", squeeze=False
    )
    for panel, case in zip(panels[:, 0], cases, strict=True):
        times = {r["provider"]: r["p50_ms"] for r in found if key(r) == case}
        panel.barh(list(times), list(times.values()))
        panel.invert_yaxis()
        panel.set_title(", ".join(case), fontsize="small")
        panel.set_xlabel("milliseconds", fontsize="small")
    figure.savefig(folder / "bench.svg", metadata={"Date": None})
    plt.close(figure)


def trade_off(name: str, found: list[dict]) -> None:
    """Plots two columns of an example: one point per variant, mean and standard deviation over seeds."""
    plt = pyplot()
    fields, runs = found[0]["plot"], [r for r in found[1:] if all(f in r for f in found[0]["plot"])]
    figure, panel = plt.subplots(figsize=(6, 4), layout="constrained")
    for variant in dict.fromkeys(r["variant"] for r in runs):
        x, y = ([r[f] for r in runs if r["variant"] == variant] for f in fields)
        center = statistics.mean(x), statistics.mean(y)
        spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in (x, y)]
        panel.errorbar(*center, xerr=spread[0], yerr=spread[1], marker="o")
        panel.annotate(variant, center, xytext=(4, 4), textcoords="offset points", fontsize="small")
    panel.set(xlabel=fields[0], ylabel=fields[1])
    panel.margins(x=0.2)
    panel.grid(alpha=0.3)
    figure.savefig(RESULTS / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def spans(name: str, found: list[dict]) -> None:
    """Plots the learned span of every head by layer, from r["spans"] [layers][heads], a color per variant."""
    plt = pyplot()
    figure, panel = plt.subplots(figsize=(8, 3.4), layout="constrained")
    runs = [r for r in found if "spans" in r]
    for i, variant in enumerate(dict.fromkeys(r["variant"] for r in runs)):
        heads = [  # sorted by span, because the order of heads has no meaning
            (layer + 0.7 * (rank + 0.5) / len(row) - 0.35, span)
            for r in runs
            if r["variant"] == variant
            for layer, row in enumerate(r["spans"], 1)
            for rank, span in enumerate(sorted(row))
        ]
        panel.plot(*zip(*heads, strict=True), ".", color=f"C{i}", markersize=3, label=variant)
    panel.set(xlabel="layer, its heads side by side", ylabel="span in tokens")
    panel.set_xticks(range(1, len(runs[0]["spans"]) + 1))
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    figure.savefig(RESULTS / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a document is stale")
    parser.add_argument("--own", action="store_true", help="only plot bench/own")
    args = parser.parse_args()
    check = args.check
    if args.own:
        bars(OWN)
        return print("rows and a plot of this run: bench/own")
    stale = {path: text for path in DOCUMENTS if (text := filled(path.read_text())) != path.read_text()}
    if check:
        raise SystemExit(f"not up to date: {', '.join(p.name for p in stale)}" if stale else 0)
    for path, text in stale.items():
        path.write_text(text)
    for path in sorted(RESULTS.glob("*.jsonl")):
        if path.stem.startswith("example_") and rows(path.stem)[0].get("plot"):
            trade_off(path.stem, rows(path.stem))
        if any("spans" in r for r in rows(path.stem)):
            spans(path.stem, rows(path.stem))
        found = [r for r in rows(path.stem) if "shape" in r and not path.stem.endswith("_grid")]
        for isa in dict.fromkeys(r["isa"] for r in found if "isa" in r):
            of_class = [r for r in found if r.get("isa") == isa]
            for case, axis in sweeps(of_class).items():
                plot(path.stem, of_class, case, axis)
    print("the tables of README.md and docs and the plots are made from bench/results")


if __name__ == "__main__":
    main()
