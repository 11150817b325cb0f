#!/usr/bin/env bash
# Builds Horovod with NCCL against the environment's torch, loads it from a folder of its own, and sums over two ranks on
# the CPU: what can be known without a GPU. `make check-nccl`; needs a CUDA toolkit. The environment is not changed.
set -euo pipefail
cd "$(dirname "$0")/../.."

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
wheel=$(HOROVOD_NCCL=1 jobs/env/build_horovod.sh | tail -n 1)
pip install --disable-pip-version-check --quiet --no-deps --target "$folder" "$wheel"
cat >"$folder/check.py" <<'PYTHON'
import horovod
import horovod.torch as hvd
import torch

hvd.init()
assert hvd.nccl_built(), "Horovod was built without NCCL"
total = hvd.allreduce(torch.full((4,), hvd.rank() + 1.0), op=hvd.Sum)
assert total.tolist() == [3.0] * 4, total
if hvd.rank() == 0:
    print(f"Horovod {horovod.__version__} with NCCL, torch {torch.__version__}: loads, and sums over {hvd.size()} ranks")
PYTHON
mapfile -t ranks < <(python -c 'from engine.comm.mpirun import rank_command; print(*rank_command(2), sep="\n")')
PYTHONPATH=$folder "${ranks[@]}" "$folder/check.py"
