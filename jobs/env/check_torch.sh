#!/usr/bin/env bash
# Another torch than the environment's, in an environment beside it ($VENV-other; no Horovod, no DALI): the extension
# builds in a copy of the tree, the tests that need a GPU are collected, and those of what torch computes pass on the CPU.
#   make check-torch TORCH=torch==2.11.0
set -euo pipefail
cd "$(dirname "$0")/../.."

fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
[[ -n ${TORCH:-} ]] || fail 'which torch? for example: make check-torch TORCH=torch==2.11.0'

other=$(realpath -m "${VENV:-.venv}-other")
[[ -x $other/bin/python ]] || "${PYTHON:-python3}" -m venv "$other"
export PATH=$other/bin:$PATH
# shellcheck disable=SC2086 # TORCH may hold several words, such as an --index-url
pip install --disable-pip-version-check --quiet $TORCH -r jobs/env/requirements.txt

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z | tar --null -T - -cf - | tar -C "$copy" -xf -
cd "$copy"
python -c 'import torch; print("torch", torch.__version__)'
python setup.py build_ext --inplace >build.log 2>&1 || { tail -n 25 build.log >&2; fail "the extension does not build"; }
python -m pytest -q --collect-only -m gpu | tail -n 1
python -m pytest -q tests/engine/optim tests/engine/network tests/engine/training tests/loaders/pipelines | tail -n 1
