import socket

import pytest
import torch
import torch.distributed

from engine.comm.launch import Launch, detect_launch, expand_hosts, rendezvous, url
from loaders.errors import UserError

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


@pytest.mark.parametrize(
    ("nodes", "hosts"),
    [
        ("rack[1-2]n[01-02]", "rack1n01 rack1n02 rack2n01 rack2n02"),
        ("n[08-11,3]x", "n08x n09x n10x n11x n3x"),
        ("a[1,3]b[2-3],c,d[9-10]", "a1b2 a1b3 a3b2 a3b3 c d9 d10"),
        ("n[998-1001]", "n998 n999 n1000 n1001"),
        ("[1-2]", "1 2"),
        ("", ""),
    ],
)
def test_node_lists_are_expanded(nodes, hosts):
    """As `scontrol show hostnames` prints them; tests/cluster asks it for random ones."""
    assert list(expand_hosts(nodes)) == hosts.split()


@pytest.mark.parametrize("nodes", ["n[1-2", "n1-2]", "n[2-1]", "n[]", "n[a-b]", "n[1-]", "n[1,,2]", "n[[1]]"])
def test_a_node_list_that_is_none_is_named(nodes):
    with pytest.raises(UserError, match="node list"):
        list(expand_hosts(nodes))


def test_what_is_empty_is_absent():
    empty = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "HOROVOD_RANK"), "")
    assert detect_launch(empty) == Launch("alone")
    assert detect_launch(empty | SLURM_STEP) == Launch("Slurm", 3, 8, 1)
    assert detect_launch(SLURM_STEP | {"SLURM_LOCALID": " "}).local_rank == 0
    assert detect_launch(SLURM_STEP | {"RANK": "1", "WORLD_SIZE": ""}).by == "Slurm"
    slurm = {"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1", "SLURM_STEP_NODELIST": "rack[1-2]n[01-04]"}
    address, port = rendezvous(Launch("Slurm", 0, 8, 0), empty | slurm)
    assert address == "rack1n01"
    assert 20000 <= port < 32000


@pytest.mark.parametrize("env", [{"RANK": "one"}, {"RANK": "-1"}, {"RANK": "4"}, {"LOCAL_RANK": "x"}, {"RANK": "1.0"}])
def test_ranks_that_are_none_are_named(env):
    with pytest.raises(UserError, match=next(iter(env))):
        detect_launch(TORCHRUN | env)


@pytest.mark.parametrize("address", ["::1", "[::1]", "fe80::1%eth0"])
def test_addresses_of_ipv6_are_in_brackets(address):
    found = rendezvous(Launch("Slurm", 0, 8, 0), {"MASTER_ADDR": address, "MASTER_PORT": "1234"})
    assert found == (address.strip("[]"), 1234)
    assert url(*found) == f"tcp://[{address.strip('[]')}]:1234"
    assert url("head", 1234) == "tcp://head:1234"


def test_two_ranks_meet_at_an_address_of_ipv6():
    """torch itself parses what `url` makes."""
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    with socket.socket(socket.AF_INET6) as free:
        try:
            free.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6 address")
        port = free.getsockname()[1]
    store, rank, size = next(torch.distributed.rendezvous(url("::1", port), rank=0, world_size=1))
    store.set("said", "yes")
    assert (store.get("said"), rank, size) == (b"yes", 0, 1)


@pytest.mark.parametrize("port", ["x", "0", "70000", "-1"])
def test_a_port_that_is_none_is_named(port):
    with pytest.raises(UserError, match="MASTER_PORT"):
        rendezvous(Launch("torchrun", 0, 1, 0), {"MASTER_ADDR": "head", "MASTER_PORT": port})
