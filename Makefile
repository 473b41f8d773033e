# make demo and make test do all their own set-up; nothing but Python 3.11 and g++ is expected.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

SOURCES := $(shell find csrc bench tests/cuda_shim -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: demo test bench peers roofline gpu-ledger gpu-check lint format wheel clean

$(VENV)/.dependencies: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.built: $(VENV)/.dependencies setup.py pyproject.toml python/bin/csam $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# The CUDA compiler of the ledger, where the machine does not bring that release.
$(VENV)/.nvcc: $(VENV)/.dependencies requirements-nvcc.txt
	nvcc --version 2>/dev/null | grep -q "release 13.0" || $(BIN)/pip install --quiet --disable-pip-version-check -r requirements-nvcc.txt
	touch $@

demo: $(VENV)/.built
	$(BIN)/csam demo

# In two processes, whose idle threads do not spin; `python -m pytest tests/...` runs some in one.
test: $(VENV)/.built $(VENV)/.nvcc
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal

bench: $(VENV)/.built
	$(BIN)/python -m pytest bench --benchmark-only

# What the sampling engine is measured against; CI=true keeps OpenVINO from sending usage statistics.
$(VENV)/.peers: $(VENV)/.built requirements-peers.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-peers.txt
	touch $@

peers: $(VENV)/.peers
	CI=true $(BIN)/python bench/peers.py

roofline: $(VENV)/.built
	$(BIN)/python bench/roofline.py

gpu-ledger: $(VENV)/.built $(VENV)/.nvcc
	$(BIN)/python bench/gpu_ledger.py

gpu-check: $(VENV)/.built
	$(BIN)/python bench/gpu_check.py

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

wheel: $(VENV)/.dependencies
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf build dist $(VENV)/.built *.egg-info csam_kernels/_C*.so
