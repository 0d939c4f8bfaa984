# Every target makes .venv when needed and installs from the pinned constraints: nothing to do by hand before it.
PYTHON ?= python3
# Which versions: constraints.txt has those that are known to work together, constraints-oldest.txt the oldest of all ranges,
# and /dev/null leaves the choice to pip, which takes the newest.
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# vLLM wants versions of its own, in an environment of its own.
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed

.PHONY: install demo demo-real test test-slow test-vllm test-lm-eval test-without-compiler lint docs bench clean
install: $(STAMP)

$(STAMP): pyproject.toml $(filter-out /dev/null,$(CONSTRAINTS))
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[test,docs]'
	touch $(STAMP)

demo: install
	$(BIN)/tessera compare --out results/demo

demo-real: install
	$(BIN)/python benchmarks/real_model.py $(if $(TEXT),--text "$(TEXT)")

test: install
	$(BIN)/python -m pytest -n 2

test-slow: install test-vllm test-lm-eval
	$(BIN)/python -m pytest -o faulthandler_timeout=3600 -m "slow or gpu"

$(VLLM_STAMP): pyproject.toml constraints-vllm.txt
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps -r constraints-vllm.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps -e .
	touch $(VLLM_STAMP)

test-vllm: $(VLLM_STAMP)
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -o faulthandler_timeout=900 -m vllm tests/engine

# Too large for the extra `test`; once it is there, make test runs these tests too.
test-lm-eval: install
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[lm_eval]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/integrations/test_lm_eval.py

# The kernels are left out where they cannot be built; everything runs in PyTorch then. Set CC and CXX to /bin/false to see that.
test-without-compiler: install
	$(BIN)/python -c "from tessera.kernels import cpu; assert not cpu.levels(), cpu.levels()"
	$(BIN)/python -m pytest -n 2 tests/test_public_api.py tests/test_attention.py tests/test_cli.py tests/cache tests/codecs tests/tensor_cache tests/tensor_memory

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install
	$(BIN)/mkdocs build --strict

# One of them: make bench NAME=decode-attention; without a name all that needs nothing more, which takes a day.
bench: install
	$(BIN)/python benchmarks/run.py $(if $(NAME),$(NAME) $(ARGS),--all)

clean:
	rm -rf $(VENV) $(VLLM_VENV) results site
