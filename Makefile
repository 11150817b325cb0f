# BoosterBiT: `make demo` and `make test` do all set-up themselves.

export VENV ?= .venv
export PYTHON ?= python3
export TORCH ?=
export CUDA ?= auto
export MPI ?= auto
export HOROVOD_NCCL ?=
RUN := PATH="$(abspath $(VENV))/bin:$$PATH"
TESTS ?=

.DEFAULT_GOAL := help
.PHONY: help env demo test lint check-nccl clean

help:
	@echo 'make demo    pack real images, pre-train on 2 ranks, fine-tune, report: the main job in small'
	@echo 'make test    all tests; TESTS="tests/engine/network/test_bit.py -k agrees" runs some'
	@echo 'make lint    ruff, mypy, and shellcheck where it is installed'
	@echo 'make env     only the environment that the others make first: packages, Horovod, the extension'
	@echo 'make check-nccl   Horovod with NCCL builds against this torch, and loads; where a CUDA toolkit is'
	@echo 'make clean   remove what was built in this tree (not the environment, not the cache)'
	@echo
	@echo 'settings, with what they are now:'
	@echo '  VENV=$(VENV)            where the environment is, or goes'
	@echo '  PYTHON=$(PYTHON)         what makes it: 3.11 or later'
	@echo '  CUDA=$(CUDA)             12 or 13: what the packages are built for; auto: as nvcc is, or the driver'
	@echo '  TORCH=$(TORCH)                what pip installs as torch, with options such as --index-url; unset: by CUDA'
	@echo '  MPI=$(MPI)              auto: the system'"'"'s MPI, else one from a wheel; none: Gloo only'
	@echo '  HOROVOD_NCCL=$(HOROVOD_NCCL)         1: Horovod with NCCL, for GPU nodes; needs a CUDA toolkit'
	@echo '  BOOSTERBIT_CUDA=$(BOOSTERBIT_CUDA)      1: the CUDA kernel must be built; 0: CPU only; unset: where nvcc is'
	@echo '  BOOSTERBIT_CACHE=$(BOOSTERBIT_CACHE)     where the Horovod wheel is kept; unset: ~/.cache/boosterbit'

env:
	@jobs/env/make_env.sh

demo: env
	@$(RUN) python -m engine.demo

test: env
	@$(RUN) python -m pytest $(TESTS)

lint: env
	@$(RUN) ruff check .
	@$(RUN) ruff format --check --quiet . || { echo "run: ruff format ."; exit 1; }
	@$(RUN) mypy --no-error-summary
	@if command -v shellcheck >/dev/null; then shellcheck -x $$(git ls-files '*.sh' '*.sbatch' .ci/run); \
	else echo 'shellcheck is not installed: shell scripts were not checked'; fi

check-nccl: env
	@$(RUN) jobs/env/check_nccl.sh

clean:
	rm -rf build engine/_C*.so *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
