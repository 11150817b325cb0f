import pytest

from engine.comm.launch import Launch, detect_launch, rendezvous

SLURM_STEP = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
TORCHRUN = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, Launch("alone", 0, 1, 0)),
        (SLURM_STEP, Launch("Slurm", 3, 8, 1)),
        (OPEN_MPI, Launch("Open MPI", 1, 2, 1)),
        (TORCHRUN, Launch("torchrun", 2, 4, 0)),
        ({"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2", "HOROVOD_LOCAL_RANK": "1"}, Launch("horovodrun", 1, 2, 1)),
        ({"PMI_RANK": "5", "PMI_SIZE": "6"}, Launch("PMI", 5, 6, 0)),
    ],
)
def test_each_launcher_is_recognised(env, expected):
    assert detect_launch(env) == expected


def test_the_innermost_launcher_counts():
    inside = SLURM_STEP | OPEN_MPI | TORCHRUN
    assert detect_launch(inside).by == "torchrun"
    assert detect_launch(SLURM_STEP | OPEN_MPI).by == "Open MPI"


def test_a_batch_script_is_alone_although_its_allocation_has_tasks():
    """sbatch sets SLURM_NTASKS and SLURM_PROCID for the script itself, which is one process."""
    assert detect_launch({"SLURM_PROCID": "0", "SLURM_NTASKS": "256", "SLURM_LOCALID": "0"}).alone


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("jwb[0003-0005,0009],m1", "jwb0003"),
        ("n7", "n7"),
        ("login1,n[2-3]", "login1"),
        ("r[1-2]-ib", "r1-ib"),
    ],
)
def test_slurm_ranks_meet_on_the_first_node(nodes, first):
    launch = Launch("Slurm", 0, 8, 0)
    env = {"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1", "SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "7"}
    address, port = rendezvous(launch, env)
    assert address == first
    assert 20000 <= port < 32000  # below the ephemeral range, above the well-known ports


def test_two_job_steps_meet_at_different_ports():
    launch = Launch("Slurm", 0, 8, 0)
    env = {"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1", "SLURM_STEP_NODELIST": "n1", "SLURM_JOB_ID": "7"}
    ports = {rendezvous(launch, env | {"SLURM_STEP_ID": str(step)})[1] for step in range(5)}
    assert len(ports) == 5


def test_where_nobody_can_know_the_address_none_is_guessed():
    assert rendezvous(Launch("Open MPI", 0, 8, 0), OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}) is None


def test_what_the_user_says_comes_first():
    env = {"MASTER_ADDR": "head", "MASTER_PORT": "1234", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}
    assert rendezvous(Launch("Slurm", 0, 8, 0), env) == ("head", 1234)
