# shellcheck shell=bash
# Sourced by every job, after CLUSTER_ENV is set: environment, and settings with their reasons.

jobs=$(dirname "${BASH_SOURCE[0]}")
set +u # the module command of many clusters reads variables that are not set
# shellcheck source=/dev/null
source "$jobs/env/$CLUSTER_ENV.sh"
set -u
if ! python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
    echo "no environment in ${VENV:-VENV}: on a node with internet, source jobs/env/$CLUSTER_ENV.sh && make env" >&2
    exit 2
fi

# Compute nodes have no internet: whatever would fetch something fails at once, instead of after minutes.
export PIP_NO_INDEX=1 HF_HUB_OFFLINE=1
# Runs are large and are written by all nodes: scratch, not home.
export RUNS=${RUNS:-${SCRATCH:-$PWD}/boosterbit/runs}
mkdir -p "$RUNS"

# Since Slurm 22.05 srun no longer takes --cpus-per-task from the job: without this each task has one core.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
# A task's cores are shared by decoding threads, Horovod's thread and NCCL's; torch needs few for a GPU's sake.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SRUN_CPUS_PER_TASK > 4 ? 4 : SRUN_CPUS_PER_TASK))}
# Threads stay on the task's cores, which lie next to its GPU.
export SLURM_CPU_BIND=${SLURM_CPU_BIND:-cores}

# Where torch.distributed's ranks meet, should Horovod be missing. The port follows from the job's number.
MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)${RENDEZVOUS_SUFFIX:-}}
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 12000))}

# NCCL and UCX wait longer for a link that flaps, instead of ending a job of hundreds of nodes: 4 us * 2^22 is 17 s.
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22} UCX_RC_TIMEOUT=${UCX_RC_TIMEOUT:-4s} UCX_RC_RETRY_COUNT=${UCX_RC_RETRY_COUNT:-10}
# Says which network NCCL found, and what is wrong; INFO prints a line per channel and rank.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# A rank that died makes the others' all-reduce fail instead of wait for ever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
# Horovod looks for new gradients every millisecond (its default of 1 ms, kept in sight): slices are large already, so
# its fusion buffer, which costs a copy each way, is off.
export HOROVOD_CYCLE_TIME=${HOROVOD_CYCLE_TIME:-1} HOROVOD_FUSION_THRESHOLD=${HOROVOD_FUSION_THRESHOLD:-0}

# MPI type for srun where the cluster's default is another.
STEP=(srun)
if [[ -n ${MPI_TYPE:-} ]]; then STEP+=("--mpi=$MPI_TYPE"); fi

# Environment and tree in the memory or on a disk of each node: ranks then ask the shared file system for two files a node,
# not for thousands each. The first job that does so packs the environment.
if [[ -n ${STAGE:-} ]]; then
    stage_to=$STAGE/boosterbit-$SLURM_JOB_ID
    archives=("$(dirname "$VENV")/$(basename "$VENV").tar" "$RUNS/.stage/tree-$SLURM_JOB_ID.tar")
    each_node=(srun "--nodes=$SLURM_JOB_NUM_NODES" "--ntasks=$SLURM_JOB_NUM_NODES" --ntasks-per-node=1)
    unstage() { "${each_node[@]}" rm -rf "$stage_to"; rm -f "${archives[1]}"; }
    BOOSTERBIT_COMMIT=$(git describe --always --abbrev=12 --dirty=+ '--exclude=*' 2>/dev/null || true)
    "$jobs/env/stage.sh" pack "${archives[@]}"
    trap unstage EXIT
    "${each_node[@]}" "$jobs/env/stage.sh" unpack "${archives[@]}" "$stage_to"
    echo "the environment is in $stage_to of each node, after $SECONDS s"
    export BOOSTERBIT_COMMIT VENV=$stage_to/venv PATH=$stage_to/venv/bin:$PATH
    export PYTHONPATH=$stage_to/tree${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
fi
