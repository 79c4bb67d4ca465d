# Every target except gpu and clean first creates .venv with the pinned tools and builds the extensions, at the same
# time: the build needs only BUILD_TOOLS.
PYTHON ?= python3
MINUTES ?= 10
# two workers of two threads each; threads that wait leave their core to the other worker
PYTEST := OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive .venv/bin/python -m pytest -q -n 2
PY := .venv/bin/python
BUILD_TOOLS := torch numpy setuptools wheel ninja
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu)

unexport PYTHONDONTWRITEBYTECODE  # pip does not byte-compile the packages: the first import does

.PHONY: setup setup-peers bench bench-all test test-all test-real test-large test-versions sanitize fuzz gpu lint docs site wheel clean
.DEFAULT_GOAL := test

setup:
	@$(MAKE) --no-print-directory -j 2 .venv/built .venv/tools

setup-peers:  ## also the libraries that tests and benchmarks compare with
	@$(MAKE) --no-print-directory -j 2 .venv/built .venv/peers

.venv/build-tools: requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q --no-compile $$(grep -o $(BUILD_TOOLS:%=-e '^%==[^ ]*') requirements-dev.txt)
	touch $@

.venv/built: .venv/build-tools setup.py pyproject.toml $(SOURCES)
	$(PY) -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

.venv/tools: .venv/build-tools requirements-dev.txt
	$(PY) -m pip install -q --no-compile -r requirements-dev.txt
	touch $@

.venv/peers: requirements-peers.txt .venv/tools
	$(PY) -m pip install -q --no-compile -r requirements-peers.txt
	touch $@

.venv/docs: requirements-docs.txt .venv/tools
	$(PY) -m pip install -q --no-compile -r requirements-docs.txt
	touch $@

BENCHES := $(wildcard bench/bench_*.py)
LONGER := bench/neighbor.py bench/ranks.py bench/train_step.py bench/trl_step.py bench/pairs.py bench/lexicon.py

bench: setup-peers  ## check and time the main case of every op and its peers; results in bench/own
	set -e; for f in $(BENCHES); do $(PY) $$f; done
	$(PY) bench/report.py --own

bench-all: setup-peers  ## every case (takes long); with RECORD=--record for make docs
	set -e; for f in $(BENCHES); do $(PY) $$f --all $(RECORD); done
	set -e; for f in $(LONGER); do $(PY) $$f $(RECORD); done

test: setup-peers .venv/docs lint  ## all but the slow tests; Triton's interpreter in a second process
	$(PYTEST) -m "not full and not real and not large"
	TRITON_INTERPRET=1 $(PYTEST) -m "interpreter and not full"

test-all: setup-peers .venv/docs lint sanitize  ## also the slow tests (marked full), and make sanitize
	rm -rf build/coverage
	$(PYTEST) --cov --cov-report= -m "not real and not large"
	TRITON_INTERPRET=1 $(PYTEST) --cov --cov-append --cov-report= -m interpreter
	$(PY) -m coverage report

test-real: setup-peers  ## tests on a pretrained model: SmolLM2-135M-Instruct or SUKHOPS_MODEL
	$(PY) -m pytest -q -m real

test-large: setup  ## tests with tensors of more than 2^31 elements; need 20 GiB of memory
	$(PY) -m pytest -q -m large

test-versions: setup  ## tests on the oldest and newest torch, and on every installed Python
	$(PY) tests/versions.py

sanitize: setup-peers  ## tests of the CPU operators and the fuzzer with ASan and UBSan
	$(PY) tests/sanitize.py

fuzz: setup  ## compare random calls with the reference for MINUTES; show the smallest failing case
	$(PY) tests/fuzz.py --minutes $(MINUTES)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

docs: setup  ## update kernels.md, the roofline, and tables and plots from bench/results
	$(PY) bench/kernels.py
	$(PY) bench/roofline.py
	$(PY) bench/report.py

site: setup .venv/docs  ## the documentation in build/site; python -m http.server -d build/site shows it, with search
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build -q

wheel: setup  ## sdist and manylinux wheel in build/wheel, tested in a clean environment
	$(PY) tests/wheel.py

gpu:  ## on a machine with a CUDA device and torch: build, test, benchmark; results in bench/results
	$(PYTHON) bench/gpu.py

clean:
	rm -rf .venv build .cache *.egg-info sukhops/*.so
