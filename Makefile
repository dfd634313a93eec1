# make run   set up .venv, execute the notebook, keep the executed copy in runs/
# make test  set up .venv, run the tests        make lint   check style with ruff
# make bench time the scan against others on this machine

PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test lint bench clean

run: .venv/ready
	$(BIN)/python run_notebook.py

test: .venv/ready-dev
	$(BIN)/python -m pytest

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/ready
	$(BIN)/pip install --quiet --no-deps mambapy==1.2.0
	$(BIN)/python benchmarks/bench.py

clean:
	rm -rf .venv

# mamba-ssm is compiled where it can be used. If that fails the notebook says so and goes on without it.
.venv/ready: requirements.txt requirements-cuda.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is older: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt
	@if nvidia-smi -L >/dev/null 2>&1 && command -v nvcc >/dev/null; then \
	  echo "GPU and nvcc found: compiling mamba-ssm, which takes minutes"; \
	  $(BIN)/pip install --quiet setuptools wheel ninja packaging && \
	  MAMBA_FORCE_BUILD=TRUE MAMBA_KEEP_CUDA_BUILD=TRUE \
	    $(BIN)/pip install --quiet --no-build-isolation --no-cache-dir -r requirements-cuda.txt || \
	  echo "mamba-ssm could not be compiled (see above); the notebook will use the PyTorch scan, which is slow on a GPU"; \
	fi
	@touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(BIN)/pip install --quiet -r requirements-dev.txt
	@touch $@
