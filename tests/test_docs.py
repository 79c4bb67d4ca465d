"""The documents: paths, links and names exist, tables match the results, code blocks run."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import report
import torch

import sukhops

ROOT = Path(__file__).parent.parent
DOCUMENTS = {str(p.relative_to(ROOT)): p for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]}
CODE = {name: re.findall(r"```python\n(.*?)```", p.read_text(), re.S) for name, p in DOCUMENTS.items()}


def test_readme_is_short():
    assert len(DOCUMENTS["README.md"].read_text().splitlines()) <= 180


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_exist(name):
    folders = "bench|csrc|docs|examples|sukhops|tests|triton_kernels"
    paths = re.findall(rf"(?<![\w/.<])((?:{folders})/[\w./]+\.\w+)", DOCUMENTS[name].read_text())
    assert [p for p in paths if not (ROOT / p).exists()] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_relative_links_and_images_exist(name):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", DOCUMENTS[name].read_text())
    assert [link for link in links if not (DOCUMENTS[name].parent / link).exists()] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_public_names_exist(name):
    for dotted in re.findall(r"sukhops((?:\.[A-Za-z_]\w*)+)", DOCUMENTS[name].read_text()):
        assert _exists(dotted[1:].split(".")), f"sukhops{dotted}"


def _exists(parts: list[str]) -> bool:
    value = sukhops
    for i, part in enumerate(parts, 1):
        if isinstance(value, ModuleType) and not hasattr(value, part):
            try:  # integrations must be imported explicitly
                importlib.import_module(".".join(["sukhops", *parts[:i]]))
            except ModuleNotFoundError:
                return False
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True


def test_tables_are_up_to_date(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    with pytest.raises(SystemExit) as end:
        report.main()
    assert end.value.code == 0, "run make docs"


@pytest.mark.parametrize("headline", report.HEADLINES, ids=lambda h: f"{h.name}-{h.case}")
def test_headlines_match_benchmark_cases(headline):
    cases = importlib.import_module(f"bench_{headline.name}").cases()
    found = [c for c in cases if c.name == headline.case and headline.mode in c.modes]
    assert found and f"| {headline.title} |" in report.headline()
    for case in found:
        target = case.small().get("target")
        ignored = None if target is None else round(100 * (target == -100).double().mean().item())
        assert ignored == headline.ignored
        assert (case.products is None) == (headline.floor == "not measured")


ON_RANKS = "docs/parallel.md"  # its first code block, followed by any of the others, is a program


@pytest.mark.parametrize("program", CODE[ON_RANKS][1:], ids=lambda p: p.splitlines()[0].split()[-1])
def test_programs_of_several_processes_run(program, tmp_path):
    command, file = re.fullmatch(r"# (torchrun .*) (\w+\.py)", program.splitlines()[0]).groups()
    # gloo's threads may abort the process at interpreter exit (DeviceMesh keeps the process group alive)
    end = "import os, sys; sys.stdout.flush(); os._exit(0)"
    (tmp_path / file).write_text(CODE[ON_RANKS][0] + program + end)
    options = command.split()[1:]
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *options, str(tmp_path / file)],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip() and "nan" not in run.stdout


@pytest.mark.parametrize("name", [name for name, blocks in CODE.items() if blocks and name != ON_RANKS])
def test_code_runs(name):
    namespace: dict = {}
    for block in CODE[name]:
        exec(block, namespace)
    tensors = [value for value in namespace.values() if isinstance(value, torch.Tensor)]
    assert tensors and all(t.isfinite().all() for t in tensors)
    assert all(t.grad.isfinite().all() for t in tensors if t.is_leaf and t.grad is not None)
