# BoosterBiT: `make demo` and `make test` do all set-up themselves.

export VENV ?= .venv
export PYTHON ?= python3
export TORCH ?=
export CUDA ?= auto
export MPI ?= auto
export HOROVOD ?= 1
export HOROVOD_NCCL ?=
RUN := PATH="$(abspath $(VENV))/bin:$$PATH"
TESTS ?=
CASES ?= 10000
MUTANTS ?= --json docs/results/mutants.json

.DEFAULT_GOAL := help
.PHONY: help env demo test lint mutants fuzz damage check-nccl check-torch clean

help:
	@echo 'make demo    pack real images, pre-train on 2 ranks, fine-tune, report: the main job in small'
	@echo 'make test    all tests; TESTS="tests/engine/network/test_bit.py -k agrees" runs some'
	@echo 'make lint    ruff, mypy, and shellcheck where it is installed'
	@echo 'make mutants plants 200 small faults, one at a time, in a copy of the tree: do the tests notice? (an hour or two;'
	@echo '             a run that was stopped goes on); MUTANTS="engine/whole.py --n 50" plants them there only'
	@echo 'make fuzz    CASES=10000 damaged files for each reader of what others wrote: is all of it told?'
	@echo 'make damage  1,000 flipped bits in packs, 50 kills in saving, 20 in training: is anything lost?'
	@echo 'make env     only the environment that the others make first: packages, Horovod, the extension'
	@echo 'make check-nccl   Horovod with NCCL builds against this torch, and loads; where a CUDA toolkit is'
	@echo 'make check-torch  TORCH=torch==2.11.0: another torch, beside the environment: builds, collects, computes'
	@echo 'make clean   remove what was built in this tree (not the environment, not the cache)'
	@echo
	@echo 'settings, with what they are now:'
	@echo '  VENV=$(VENV)            where the environment is, or goes'
	@echo '  PYTHON=$(PYTHON)         what makes it: 3.11 or later'
	@echo '  CUDA=$(CUDA)             12 or 13: what the packages are built for; auto: as nvcc is, or the driver'
	@echo '  TORCH=$(TORCH)                what pip installs as torch, with options such as --index-url; unset: by CUDA'
	@echo '  MPI=$(MPI)              auto: the system'"'"'s MPI, else one from a wheel; none: Gloo only'
	@echo '  HOROVOD=1               0: none is built, and ranks talk through torch.distributed; make demo: 0'
	@echo '  HOROVOD_NCCL=$(HOROVOD_NCCL)         1: Horovod with NCCL, for GPU nodes; needs a CUDA toolkit'
	@echo '  BOOSTERBIT_CUDA=$(BOOSTERBIT_CUDA)      1: the CUDA kernel must be built; 0: CPU only; unset: where nvcc is'
	@echo '  BOOSTERBIT_CACHE=$(BOOSTERBIT_CACHE)     where the Horovod wheel is kept; unset: ~/.cache/boosterbit'

env:
	@jobs/env/make_env.sh

demo: HOROVOD = 0
demo: env
	@$(RUN) python -m engine.demo

test: export TRACKERS = 1
test: env
	@$(RUN) python -m pytest $(TESTS)

lint: env
	@$(RUN) ruff check .
	@$(RUN) ruff format --check --quiet . || { echo "run: ruff format ."; exit 1; }
	@$(RUN) mypy --no-error-summary
	@if command -v shellcheck >/dev/null; then shellcheck -x $$(git ls-files '*.sh' '*.sbatch' .ci/run); \
	else echo 'shellcheck is not installed: shell scripts were not checked'; fi

mutants: env
	@$(RUN) python -m tests.support.mutants $(MUTANTS)

fuzz: env
	@$(RUN) python -m tests.fuzz.readers --cases $(CASES) --json docs/results/fuzz-readers.json

damage: env
	@$(RUN) python -m tests.fuzz.bitflips --cases 1000 --json docs/results/bit-flips.json
	@$(RUN) python -m tests.fuzz.kills --what saving --kills 50 --json docs/results/kills-saving.json
	@$(RUN) python -m tests.fuzz.kills --what training --kills 20 --json docs/results/kills-training.json

check-torch:
	@jobs/env/check_torch.sh

check-nccl: env
	@$(RUN) jobs/env/check_nccl.sh

clean:
	rm -rf build engine/_C*.so *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
