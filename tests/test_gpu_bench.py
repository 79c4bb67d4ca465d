"""Tests of `make gpu` that need no CUDA device: error messages, steps, every case with small inputs."""

import json
import subprocess
import sys
from types import SimpleNamespace

import gpu
import gpu_cases
import gpu_run
import harness
import pytest
import report
import roofline
import torch

PRESENT = [op for op in gpu_cases.OPS if not gpu_cases.missing(op)]
MEASURED = [m for op in PRESENT for m in gpu_cases.OPS[op][1]("cpu")]
ON_CPU = ("sukhops", "eager", "SDPA, causal", "Liger", "torch-struct")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_fails_without_a_device():
    before = sorted(report.RESULTS.iterdir())
    run = subprocess.run([sys.executable, "bench/gpu.py"], capture_output=True, text=True, cwd=gpu.ROOT)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("make gpu needs a CUDA device: torch ")
    assert sorted(report.RESULTS.iterdir()) == before


def test_unknown_operation_fails():
    run = subprocess.run(
        [sys.executable, "bench/gpu.py", "--op", "nothing"], capture_output=True, text=True, cwd=gpu.ROOT
    )
    assert run.returncode == 2 and "nothing" in run.stderr and "adaptive_span" in run.stderr


def test_order_and_commands_of_steps(tmp_path):
    assert tuple(gpu_cases.OPS) == gpu.OPS
    names = [s.name for s in gpu.planned(list(gpu.STEPS), list(gpu.OPS), "9.0a", tmp_path)]
    assert names == ["build", *(f"test {op}" for op in gpu.OPS), *(f"bench {op}" for op in gpu.OPS),
                     "suite"]  # fmt: skip
    (one,) = gpu.planned(["bench"], ["director"], "9.0a", tmp_path)
    assert one.command[1:] == ["bench/gpu_run.py", "director", str(tmp_path / "director.jsonl")]
    checks = gpu.planned(["sanitize"], ["segmentation"], "9.0a", tmp_path)
    assert [c.name for c in checks] == ["memcheck segmentation", "racecheck segmentation"]
    assert all(c.command[0] == "compute-sanitizer" for c in checks)


def test_failed_or_hanging_step_does_not_stop_the_others():
    def step(code: str, seconds: float = 30) -> gpu.Step:
        return gpu.Step(code, [sys.executable, "-c", code], seconds, {"SEEN": "1"})

    steps = [step("raise SystemExit(3)"), step("import time; time.sleep(60)", 0.5),
             step("import os; assert os.environ['SEEN']"), step("import os; os.abort()")]  # fmt: skip
    outcomes = gpu.run_all(steps, 100)
    assert [o.status for o in outcomes] == ["FAILED (3)", "out of time", "ok", "FAILED (-6)"]
    assert [o.status for o in gpu.run_all(steps[:1], 1)] == ["no time left"]


def test_operation_missing_from_the_build_is_reported(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_cases.OPS, "other", ("no_such_function", None))
    path = tmp_path / "other.jsonl"
    monkeypatch.setattr(sys, "argv", ["gpu_run.py", "other", str(path)])
    assert gpu_run.main() == 0
    row = json.loads(path.read_text())
    assert row["failed"] == "sukhops.no_such_function is not in this build"
    assert row["failed"] in gpu.document([row])


@pytest.mark.parametrize("measured", MEASURED, ids=[f"{m.case.name}, {m.case.shape}" for m in MEASURED])
def test_every_case_is_correct_on_small_inputs(measured):
    case = measured.case
    for name, provider in case.providers.items():
        if name not in ON_CPU or (provider.package == "liger-kernel" and "DPO" not in case.name):
            continue
        try:
            gate = harness.check(case, provider) if provider.same else {"gate": True}
        except ImportError:
            assert not provider.ours
            continue
        assert gate["gate"], (name, gate)
    if case.products:
        try:
            case.products(case.small())()
        except NotImplementedError as error:  # the floor of the hard window uses FlexAttention
            assert "FlexAttention does not support backward on CPU" in str(error)
    for goal in measured.goals:
        assert goal.against in ("", *case.providers)


def test_every_measured_shape_has_a_prediction():
    names = {m.case.name for m in MEASURED}
    for op, name, shape, _ in roofline.CASES:
        if op in PRESENT:
            (measured,) = [m for m in MEASURED if m.case.name == name]
            assert name in names and measured.case.shape == shape and measured.goals


def fake_device(monkeypatch, memory: float = 1e12):
    """Replaces the CUDA calls of a run."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=memory))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU 1")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu_run, "peak_memory", lambda case, provider: 3 << 20)


def small_case(**providers: harness.Provider) -> harness.Case:
    (case,) = [m.case for m in MEASURED if m.case.name == "linear_logp"]
    return case._replace(make=case.small, providers=case.providers | providers, rounds=2)


def test_run_writes_rows_page_and_goals(monkeypatch, tmp_path):
    fake_device(monkeypatch)

    def broken(inputs):
        raise RuntimeError("no kernel image")

    case = small_case(Liger=harness.Provider(broken), CCE=harness.Provider(broken, memory=1e13))
    chosen = {n: case.providers[n] for n in ("sukhops", "eager", "Liger", "CCE")}
    goals = [gpu_cases.Goal(1e6), gpu_cases.Goal(1e-6), gpu_cases.Goal(1.0, "CCE"),
             gpu_cases.Goal(3.5, field="memory_mib")]  # fmt: skip
    rows = gpu_run.run(gpu_cases.Measured(case._replace(providers=chosen), goals), roofline.H200)
    found = {r["provider"]: r for r in rows}
    ours = found["sukhops"]
    assert (
        ours["predicted_ms"] > ours["floor_ms"] > 0
        and ours["memory_mib"] == 3.0
        and ours["machine"] == "Some GPU 1"
    )
    assert [v.rpartition(" ")[2] for v in ours["reach"]] == ["reached", "MISSED", "measured", "reached"]
    assert "no kernel image" in found["Liger"]["skipped"] and "does not fit" in found["CCE"]["skipped"]
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "rows").mkdir()
    for op, lines in (("vocab_head", rows), ("director", [{"op": "director", "failed": "lost"}])):
        text = "".join(json.dumps(r) + "\n" for r in lines)
        (tmp_path / "rows" / f"{op}.jsonl").write_text(text)
        path = gpu.save(tmp_path / "rows")
    assert path == tmp_path / "some_gpu_1.jsonl"
    page = path.with_suffix(".md").read_text()
    assert (
        page.startswith("# Measured on Some GPU 1")
        and "| director |  |" in page
        and "time <= 1e+06 x floor" in page
    )
    # saving without rows of vocab_head keeps its earlier rows
    (tmp_path / "rows" / "vocab_head.jsonl").unlink()
    gpu.save(tmp_path / "rows")
    assert len(report.rows("some_gpu_1")) == len(rows) + 1


def test_failure_of_sukhops_is_recorded_and_the_next_case_runs(monkeypatch, tmp_path):
    fake_device(monkeypatch)
    good = small_case()
    good = good._replace(providers={"sukhops": good.providers["sukhops"]}, name="good")

    def broken(inputs):
        raise RuntimeError("lost")

    bad = good._replace(name="bad", providers={"sukhops": harness.Provider(broken, ours=True)})
    measured = [gpu_cases.Measured(bad), gpu_cases.Measured(good)]
    monkeypatch.setitem(gpu_cases.OPS, "vocab_head", ("linear_logp", lambda device: measured))
    monkeypatch.setattr(gpu_run, "ceilings", lambda: roofline.H200)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu_run, "peak_memory", lambda case, p: p.make(case.small()) and 1)
    monkeypatch.setattr(sys, "argv", ["gpu_run.py", "vocab_head", str(tmp_path / "rows.jsonl")])
    assert gpu_run.main() == 1
    first, second = (json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines())
    assert first["failed"] == "RuntimeError: lost" and second["case"] == "good" and second["p50_ms"] > 0


def test_flex_attention_peer_computes_adaptive_spans(monkeypatch):
    """Compares it with the definition, in float32 and without torch.compile."""
    compile = torch.compile  # flex_attention itself calls torch.compile with options
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, **options) if options else f)
    shape = {"B": 1, "H": 2, "T": 256, "d": 16, "spans": (20.5, 100.0), "ramp": 32.0}
    given = gpu_cases.attention_inputs(shape, "cpu", learn_span=True)
    given = {n: t.detach().float().requires_grad_(n == "span") for n, t in given.items()}
    q, k, v = (given[n] for n in "qkv")
    x = torch.arange(256).unsqueeze(1) - torch.arange(256)
    ramp = (32 + given["span"].view(2, 1, 1) - x) / 32
    mask = ramp.clamp(0.0, 1.0) * (x >= 0)
    scores = (q @ k.mT / 4).masked_fill(mask == 0, -torch.inf)
    weights = scores.softmax(-1) * mask
    expected = weights / weights.sum(-1, keepdim=True) @ v
    assert (gpu_cases.flex(given)() - expected).abs().max() < 1e-5
