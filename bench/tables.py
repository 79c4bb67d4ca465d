"""Tables for the documents, each made from one file of results; `report.py` inserts them."""


def markdown(header: list[str], body: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, form: str = "z,.0f") -> str:
    return "" if value is None else f"{value:{form}}"


def milliseconds(r: dict) -> str:
    return number(r["p50_ms"], ",.0f" if r["p50_ms"] >= 20 else ".2g")


def sizes(r: dict) -> str:
    return ", ".join(f"{k} = {v:,}" for k, v in r["shape"].items() if isinstance(v, int))


def train_step(found: list[dict]) -> str:
    body = [
        [
            r["provider"],
            r["isa"],
            f"{r['tokens_per_second']:,}",
            number(r["memory_mib"]),
            f"{r['losses'][-1]:.4f}",
        ]
        for r in found
    ]
    return markdown(["head", "CPU", "tokens/s", "peak MiB", "loss after 3 steps"], body)


def pairs(found: list[dict]) -> str:
    body = []
    for r in found:
        seconds = number(r["seconds"], ",.0f" if r["seconds"] >= 10 else ".2g")
        gradient = number(r.get("gradient_norm"), ".0e")
        body.append([r["case"], r["isa"], r["provider"], seconds, number(r["per_second"]), gradient])
    return markdown(["", "CPU", "provider", "seconds", "per second", "gradient norm"], body)


def neighbor(found: list[dict]) -> str:
    body = []
    for r in found:
        times = [number(r[field], ",.1f") for field in ("alone_ms", "beside_ms")]
        body.append([r["op"], r["case"], r["isa"], r["provider"], *times, f"{r['slowdown']:.2f}"])
    return markdown(["operation", "case", "CPU", "provider", "alone, ms", "beside, ms", "slower by"], body)


def ranks(found: list[dict]) -> str:
    """Cases on several processes compared with one process, and the bytes they send."""
    body = []
    for r in found:
        times = [number(r[field]) for field in ("one_ms", "ranks_ms")]
        shares = [f"{r['ratio']:.2f}", number(r["collectives_ms"], ".1f")]
        body.append([r["case"], r["isa"], *times, *shares, number(r["bytes_forward"]), number(r["bytes"])])
    head = ["", "CPU", "one process, ms", "two, ms", "ratio", "in collectives, ms"]
    return markdown([*head, "bytes a row, forward", "with backward"], body)


def lexicon(found: list[dict]) -> str:
    body = [[r["case"], r["isa"], r["provider"], f"{r['per_second'] / 1e6:.2g}"] for r in found]
    return markdown(["", "CPU", "provider", "million characters per second"], body)


def roofline(found: list[dict]) -> str:
    """Times that bench/roofline.py predicts for a GPU."""
    body = []
    for r in found:
        times = [f"{r[field]:.3g}" for field in ("floor_ms", "predicted_ms")]
        body.append([r["case"], sizes(r), times[0], r["bound"], times[1]])
    return markdown(["case", "shape", "floor, ms", "bound by", "predicted, ms"], body)


def trl_step(found: list[dict]) -> str:
    """A training step of TRL without and with sukhops; each line is made from two rows of results."""
    body = []
    for theirs, ours in zip(found[::2], found[1::2], strict=True):
        cells = [f"{r['p50_ms'] / 1e3:.1f} s, {number(r['memory_mib'])} MiB" for r in (theirs, ours)]
        memory = f"{ours['memory_mib'] / theirs['memory_mib']:.2f}"
        body.append([ours["case"], ours["dtype"], ours["isa"], *cells, f"{ours['ratio_p50']:.2f}", memory])
    return markdown(["trainer", "dtype", "CPU", "TRL", "with sukhops", "time", "memory"], body)


def versions(found: list[dict]) -> str:
    """What tests/versions.py ran."""
    body = []
    for r in found:
        check = "passes" if r["check"] else "fails"
        counts = [number(r[field]) for field in ("passed", "failed", "skipped")]
        body.append([r["python"], r["torch"], r["commit"], *counts, check, number(r["minutes"])])
    head = ["Python", "torch", "commit", "passed", "failed", "skipped", "`sukhops check`", "minutes"]
    return markdown(head, body)


TABLES = {f.__name__: f for f in (train_step, pairs, roofline, lexicon, ranks, neighbor, trl_step, versions)}
