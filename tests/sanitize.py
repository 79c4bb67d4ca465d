"""Runs the CPU operators' tests and the fuzzer on a build with AddressSanitizer and UBSan: make sanitize.

Reports go to files, because pytest captures stderr. A single report is a failure.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "sanitize"
TESTS = (
    "test_adaptive_span.py", "test_adaptive_span_contract.py", "test_adaptive_span_module.py",
    "test_director.py", "test_director_classifier.py", "test_director_contract.py", "test_director_head.py",
    "test_director_loss.py",
    "test_fuzz.py", "test_half_precision_logits.py", "test_lexicon.py", "test_logits_budget.py",
    "test_segmentation.py", "test_segmentation_contract.py", "test_segmentation_loss.py",
    "test_segmentation_tiles.py",
    "test_token_stats.py", "test_vocab_head.py", "test_vocab_head_contract.py",
)  # fmt: skip


def library(name: str) -> str:
    """The path of the sanitizer library that gcc links with."""
    found = subprocess.run(["gcc", f"-print-file-name={name}.so"], capture_output=True, text=True, check=True)
    return str(Path(found.stdout.strip()).resolve())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=2, help="time limit of the fuzzer")
    options = parser.parse_args()
    build = [sys.executable, "setup.py", "-q", "build", "-b", FOLDER, "--build-lib", FOLDER / "lib"]
    subprocess.run(build, check=True, cwd=ROOT, env=os.environ | {"SUKHOPS_SANITIZE": "1"})
    for old in FOLDER.glob("report.*"):
        old.unlink()
    environment = os.environ | {
        "PYTHONPATH": f"{FOLDER / 'lib'}{os.pathsep}{ROOT}",
        "LD_PRELOAD": f"{library('libasan')}:{library('libubsan')}:{library('libstdc++')}",
        # Python and torch do not free all memory at exit, and some symbols are defined in two libraries
        "ASAN_OPTIONS": f"detect_leaks=0:detect_odr_violation=0:log_path={FOLDER / 'report'}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={FOLDER / 'report'}",
    }
    tests = [ROOT / "tests" / name for name in TESTS]
    suite = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "2",
        "-c",
        ROOT / "pyproject.toml",
        "-m",
        "not full and not real and not large",
    ]
    commands = [
        [*suite, "-k", "not compile and not memory and not two_to_the_31", *tests],
        [sys.executable, ROOT / "tests" / "fuzz.py", "--minutes", str(options.minutes)],
    ]
    codes = [subprocess.run(command, cwd=FOLDER, env=environment).returncode for command in commands]
    reports = sorted(FOLDER.glob("report.*"))
    for report in reports:
        print(report.read_text())
    print(f"{len(reports)} sanitizer reports")
    if reports or any(codes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
