# Every target first makes .venv with the pinned tools and builds the extension in place.
PYTHON ?= python3
MINUTES ?= 10
PY := .venv/bin/python
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu)

.PHONY: setup bench bench-all test test-all test-real test-large sanitize fuzz gpu lint docs clean
.DEFAULT_GOAL := test

setup: .venv/built

.venv/tools: requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q $$(grep '^torch==' requirements-dev.txt)
	$(PY) -m pip install -q -r requirements-dev.txt
	touch $@

.venv/peers: requirements-peers.txt .venv/tools
	$(PY) -m pip install -q -r requirements-peers.txt
	touch $@

.venv/built: .venv/tools setup.py pyproject.toml $(SOURCES)
	$(PY) -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

BENCHES := $(wildcard bench/bench_*.py)
LONGER := bench/neighbour.py bench/ranks.py bench/train_step.py bench/trl_step.py bench/pairs.py bench/lexicon.py

bench: setup .venv/peers  ## checks every op and times its main case beside its peers; rows and plots in bench/own
	set -e; for f in $(BENCHES); do $(PY) $$f; done
	$(PY) bench/report.py --own

bench-all: setup .venv/peers  ## every case, which takes long; RECORD=--record writes bench/results instead, for make docs
	set -e; for f in $(BENCHES); do $(PY) $$f --all $(RECORD); done
	set -e; for f in $(LONGER); do $(PY) $$f $(RECORD); done

test: setup .venv/peers lint  ## the whole suite; kernels in Triton's interpreter in a process of their own
	$(PY) -m pytest -q -m "not full and not real and not large"
	TRITON_INTERPRET=1 $(PY) -m pytest -q -m "interpreter and not full"

test-all: setup .venv/peers lint sanitize  ## the long matrix too
	$(PY) -m pytest -q -m "not real and not large"
	TRITON_INTERPRET=1 $(PY) -m pytest -q -m interpreter

test-real: setup .venv/peers  ## on SmolLM2-135M-Instruct, fetched into .cache; SUKHOPS_MODEL takes another
	$(PY) -m pytest -q -m real

test-large: setup  ## tensors of more than 2^31 elements, in 20 GiB of memory
	$(PY) -m pytest -q -m large

sanitize: setup .venv/peers  ## tests of the CPU operators and the fuzzer on a build with sanitizers
	$(PY) tests/sanitize.py

fuzz: setup  ## random calls against the reference for MINUTES; on a fault the smallest case and its seed
	$(PY) tests/fuzz.py --minutes $(MINUTES)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

docs: setup  ## what the kernels compile to, the roofline, and the tables of the README and docs from bench/results
	$(PY) bench/kernels.py
	$(PY) bench/roofline.py
	$(PY) bench/report.py

gpu:  ## on a machine with a CUDA device and its own torch: build, test, measure; rows in bench/results
	$(PYTHON) bench/gpu.py

clean:
	rm -rf .venv build .cache *.egg-info sukhops/*.so
