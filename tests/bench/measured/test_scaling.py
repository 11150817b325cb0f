"""The measuring side of the scaling bench; tests/cluster/ runs it under Slurm."""

import json
import os
import sys

import pytest

from bench import scaling
from bench.measured import scaling as scaling_measure
from bench.measured import steps
from bench.measured import worker as scaling_worker
from engine.comm.communicator import Communicator
from engine.comm.launch import Launch
from loaders.errors import UserError

SMALL = ["--model", "R8x0.25-8px", "--size", "8", "--batch", "4", "--warmup", "1", "--steps", "3", "--repeats", "2"]
SLURM = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_NUM_NODES": "2"}


def test_under_a_launcher_it_measures_each_size(launch, tmp_path, digits):
    rows = tmp_path / "rows.json"
    data = ["--data", digits / "low-train.h5"]
    done = launch(2, "mpirun", ["bench/scaling.py", "--gpus", "2", *SMALL, *data, "--json", rows], timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("measured: ") == 1  # one of the two tasks speaks
    content = json.loads(rows.read_text())
    assert [(row["gpus"], row["source"]) for row in content["rows"]] == [(1, "measured"), (2, "measured")]
    assert content["losses_agree"].startswith("agree")
    assert {"cpu", "cores", "hosts"} <= set(content["hardware"])
    for row in content["rows"]:
        assert len(row["with_input"]["step_milliseconds_per_rank"]) == row["gpus"]
        for kind in ("synthetic", "with_input"):
            found = row[kind]
            assert found["images_per_second_low"] <= found["images_per_second"] <= found["images_per_second_high"]
            assert sum(found["share_percent"].values()) == pytest.approx(100)
            assert set(found["share_percent"]) == {"data", "forward", "backward", "exposed", "optimizer"}
            for times in found["step_milliseconds_per_rank"]:
                assert 0 < times["p50"] <= times["p90"] <= times["p99"]
        assert row["images_per_second"] == row["with_input"]["images_per_second"]
    one, two = content["rows"]
    assert two["speedup"] == pytest.approx(two["images_per_second"] / one["images_per_second"])
    assert two["efficiency"] == pytest.approx(100 * two["speedup"] / 2)
    assert (one["communicator"], two["communicator"]) == ("local", "horovod (MPI)")


def test_what_fails_in_a_step_is_said(monkeypatch, tmp_path, capsys):
    (tmp_path / "text.h5").write_text("hello")
    with pytest.raises(SystemExit) as ended:
        scaling.main(["--measure", "--gpus", "1", *SMALL, "--data", str(tmp_path / "text.h5")])
    assert ended.value.code == 2
    assert "text.h5" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(MemoryError("no more"), 1), (UserError("bad input"), 2)])
def test_what_breaks_one_rank_alone_ends_the_others_too(monkeypatch, capsys, error, code):
    """Under srun a task that merely exits leaves the others waiting in an all-reduce."""

    class Comm(Communicator):
        def abort(self, code):
            raise SystemExit(code)

    def breaks(task, comm):
        raise error

    monkeypatch.setattr(scaling_worker, "connect", lambda backend: Comm(Launch("alone")))
    monkeypatch.setattr(scaling_worker, "work", breaks)
    monkeypatch.setattr("sys.argv", ["scaling_worker", '{"backend": "auto"}'])
    with pytest.raises(SystemExit) as ended:
        scaling_worker.main()
    assert ended.value.code == code
    assert str(error) in capsys.readouterr().err


def test_fewer_tasks_than_asked_for_are_modelled(monkeypatch, tmp_path, capsys):
    for key, value in SLURM.items():
        monkeypatch.setenv(key, value)
    scaling.main(["--gpus", "64", "--json", str(tmp_path / "rows.json")])
    out = capsys.readouterr().out
    assert "8 tasks here, 64 asked for" in out
    assert "modelled" in out


@pytest.mark.parametrize(
    "env, expected",
    [
        ({}, 0),
        (SLURM, 8),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "3"}, 3),
        ({"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "5"}, 5),
        ({key: value for key, value in SLURM.items() if key != "SLURM_NTASKS"}, 8),
    ],
)
def test_tasks_on_offer(env, expected):
    assert steps.tasks(env) == expected


def test_steps_in_an_allocation(monkeypatch):
    monkeypatch.setattr(steps.shutil, "which", lambda name: f"/usr/bin/{name}")
    found = {ranks: steps.command(ranks, SLURM | {"SRUN_CPUS_PER_TASK": "12"}) for ranks in (1, 4, 8)}
    assert [words[2] for words in found.values()] == ["--nodes=1", "--nodes=1", "--nodes=2"]
    for ranks, words in found.items():
        assert words[0] == "srun"
        assert f"--ntasks={ranks}" in words
        assert "--cpus-per-task=12" in words


@pytest.mark.parametrize("srun", [True, False])
def test_steps_outside_an_allocation_or_without_srun(monkeypatch, srun):
    monkeypatch.setattr(steps.shutil, "which", lambda name: "/usr/bin/srun" if srun and name == "srun" else None)
    monkeypatch.setattr("engine.comm.mpirun.rank_command", lambda ranks: ["launcher", str(ranks)])
    for env in ({}, {} if srun else SLURM):
        assert steps.command(1, env) == [sys.executable]
        assert steps.command(2, env) == ["launcher", "2"]


@pytest.mark.parametrize("word", ["--slice-mib", "--batch", "--size", "--steps", "--repeats"])
@pytest.mark.parametrize("value", ["0", "-1"])
def test_settings_of_a_measurement_are_more_than_nothing(monkeypatch, capsys, word, value):
    with pytest.raises(SystemExit) as ended:
        scaling.main(["--measure", "--gpus", "1", *SMALL, word, value])
    assert ended.value.code == 2
    assert f"{word} is {value}" in capsys.readouterr().err


def test_a_step_does_not_inherit_its_launchers_words():
    said = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "1", "HOROVOD_RANK": "1",
            "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}  # fmt: skip
    set_by_user = {"OMPI_MCA_btl": "tcp,self", "HOROVOD_FUSION_THRESHOLD": "0", "PATH": "/bin", "NCCL_DEBUG": "WARN"}
    env = SLURM | said | set_by_user
    assert set(steps.environment(env)) == {"SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", *set_by_user}
    batch_script = SLURM | {"SLURM_MPI_TYPE": "pmix", "SLURM_CPU_BIND": "cores"}  # settings for the steps it starts
    assert steps.environment(batch_script) == batch_script


def test_sweep_sizes_and_the_batch_they_share():
    assert scaling_measure.sweep_sizes(1) == [1]
    assert scaling_measure.sweep_sizes(4) == [1, 2, 4]
    assert scaling_measure.sweep_sizes(1024) == [1, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    assert scaling_measure.sweep_sizes(12) == [1, 4, 8, 12]
    for ranks in (2, 12, 1024):
        shared = scaling_measure.agreement_batch(scaling_measure.sweep_sizes(ranks))
        assert shared >= 8
        assert all(shared % size == 0 for size in scaling_measure.sweep_sizes(ranks))
    assert scaling_measure.agreement_batch([1, 2048, 2047]) == 0


def test_losses_that_differ_are_an_error():
    same = {1: {"losses": [2.0, 1.5]}, 2: {"losses": [2.0, 1.50001]}}
    assert scaling_measure.losses_agree(same, "fp32").startswith("agree")
    other = {1: {"losses": [2.0, 1.5]}, 2: {"losses": [2.0, 1.6]}}
    assert scaling_measure.losses_agree(other, "bf16").startswith("differ")
    assert scaling_measure.losses_agree({1: {"losses": [1.0]}, 3: {}}, "fp32").startswith("not compared")


def test_a_step_that_breaks_is_an_error(monkeypatch):
    monkeypatch.setattr(scaling_measure.steps, "command", lambda ranks: ["sh", "-c", "echo gone >&2; exit 3"])
    with pytest.raises(UserError, match="ended with 3(.|\n)*gone"):
        scaling_measure.launch(1, {}, dict(os.environ))
