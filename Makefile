# Every target makes .venv when needed and installs from the pinned constraints: nothing to do by hand before it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Codecs that are measured on four times as much text.
LONG := hqmq:3 hqmq:4 hqmq:s24_r2 hqmq:s96_r4 scalar:3 scalar:4 q4_0
# vLLM wants versions of its own, in an environment of its own.
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed

.PHONY: install demo demo-real test test-slow test-vllm lint bench clean
install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $(STAMP)

demo: install
	$(BIN)/tessera compare --out results/demo

demo-real: install
	$(BIN)/python benchmarks/real_model.py $(if $(TEXT),--text "$(TEXT)")

test: install
	$(BIN)/python -m pytest -n 2

test-slow: install test-vllm
	$(BIN)/python -m pytest -m "slow or gpu"

$(VLLM_STAMP): pyproject.toml constraints-vllm.txt
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps -r constraints-vllm.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps -e .
	touch $(VLLM_STAMP)

test-vllm: $(VLLM_STAMP)
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -m vllm tests/engine

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/tessera compare --out docs/results/demo
	$(BIN)/tessera compare --out docs/results/demo_long --windows 16 --protocol streaming --specs $(foreach c,$(LONG),"sink:4 + $(c) + recent:128")
	$(BIN)/tessera compare --out docs/results/demo_long_paper --windows 16 --protocol paper --specs $(LONG)
	$(BIN)/python benchmarks/real_models.py
	$(BIN)/python benchmarks/codec_error.py
	$(BIN)/python benchmarks/resident_memory.py
	$(BIN)/python benchmarks/decode_attention.py
	$(BIN)/python benchmarks/query_limbs.py
	$(BIN)/python benchmarks/encode.py
	$(BIN)/python benchmarks/triton_static.py
	$(BIN)/python benchmarks/capacity.py
	$(BIN)/python benchmarks/associative_cost.py
	$(BIN)/python benchmarks/long_run.py
	$(BIN)/python benchmarks/recall.py
	$(BIN)/python benchmarks/language_scratch.py
	$(BIN)/python benchmarks/memory_options.py
	$(BIN)/python benchmarks/language_memory.py
	$(BIN)/python benchmarks/language_tuned.py
	$(BIN)/python benchmarks/tensor_memory_cost.py
	$(BIN)/python benchmarks/retention.py
	$(BIN)/python benchmarks/diagnostics.py --steps 300
	$(BIN)/python benchmarks/pictures.py
	$(BIN)/python benchmarks/video.py
	$(BIN)/tessera compare --out docs/results/demo_memory --specs window:256 --specs "sink:4 + window:256" --specs "sink:4 + window:256 + tc" --protocol streaming
	$(BIN)/python benchmarks/plan_errors.py
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python docs/layers.py

clean:
	rm -rf $(VENV) $(VLLM_VENV) results
