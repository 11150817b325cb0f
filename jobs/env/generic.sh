# shellcheck shell=bash
# Any Slurm cluster: sourced by each job, and once where there is internet to make the environment:
#   source jobs/env/generic.sh && make env
# Load here what your cluster wants loaded: a compiler, an MPI that srun serves, and CUDA where there are GPUs.

if command -v nvcc >/dev/null; then
    export HOROVOD_NCCL=1 # all-reduce on the GPUs
fi
export VENV=${VENV:-$PWD/.venv}
export PATH=$VENV/bin:$PATH
