# make run   set up .venv, execute the notebook, keep the executed copy in runs/; GPUS=4 trains on four
# make test  set up .venv, run the tests        make lint   check style with ruff
# make enlarge IMAGE=photo.jpg   write photo_x4.png beside it; SCALE=2, COMPARE=1 (bicubic beside it), FORCE=1 (replace)
# make bench time the scan against others on this machine
# make mamba-ssm compile the scan of that package, which none of the others needs

PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test lint enlarge image-named bench mamba-ssm clean

run: .venv/ready
	$(BIN)/python run_notebook.py $(if $(GPUS),--gpus $(GPUS))

test: .venv/ready-dev
	$(BIN)/python -m pytest

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Names come from the environment, where make puts them: blanks and quotes in them stay as they are.
enlarge: image-named .venv/ready
	@$(BIN)/python -m mamba_ginr.enlarge --scale "$${SCALE:-4}" $(if $(COMPARE),--compare) $(if $(FORCE),--force) -- "$$IMAGE"

image-named:
	@test -n "$$IMAGE" || { echo "Which image? make enlarge IMAGE=photo.jpg (SCALE=4 COMPARE=1 FORCE=1)"; exit 1; }

bench: .venv/ready
	$(BIN)/pip install --quiet --no-deps mambapy==1.2.0
	$(BIN)/python benchmarks/bench.py

clean:
	rm -rf .venv

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is older: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt
	@touch $@

# The CUDA kernel of mamba-ssm, to compare with or where Triton cannot run. It takes minutes, and nvcc.
mamba-ssm: .venv/ready
	$(BIN)/pip install --quiet setuptools wheel ninja packaging
	MAMBA_FORCE_BUILD=TRUE MAMBA_KEEP_CUDA_BUILD=TRUE \
	  $(BIN)/pip install --quiet --no-build-isolation --no-cache-dir -r requirements-cuda.txt

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(BIN)/pip install --quiet -r requirements-dev.txt
	@touch $@
