"""How many tasks an allocation offers, from the words that Slurm has for it."""

import pytest

from bench.measured import steps
from loaders.errors import UserError


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, 0),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "6"}, 6),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "", "SLURM_JOB_NUM_NODES": "3", "SLURM_NTASKS_PER_NODE": "4(x3)"}, 12),
        ({"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "", "SLURM_NTASKS_PER_NODE": ""}, 1),
    ],
)
def test_tasks_of_an_allocation(env, expected):
    assert steps.tasks(env) == expected


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "SLURM_JOB_NUM_NODES", "SLURM_NTASKS_PER_NODE"])
def test_what_is_no_number_is_named(name):
    with pytest.raises(UserError, match="many"):
        steps.tasks({"SLURM_JOB_ID": "1", name: "many"})


@pytest.mark.parametrize(
    ("env", "nodes"),
    [
        ({"SLURM_NTASKS_PER_NODE": "4"}, 2),
        ({"SLURM_TASKS_PER_NODE": "2(x3),1"}, 4),
        ({"SLURM_NTASKS_PER_NODE": "", "SLURM_TASKS_PER_NODE": "8"}, 1),
        ({"SLURM_NTASKS_PER_NODE": "8", "SLURM_TASKS_PER_NODE": "2"}, 1),  # what was asked for comes first
        ({}, 8),
    ],
)
def test_nodes_of_a_step_of_eight(monkeypatch, env, nodes):
    monkeypatch.setattr(steps.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert f"--nodes={nodes}" in steps.command(8, {"SLURM_JOB_ID": "1"} | env)
