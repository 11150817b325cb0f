"""A disk that is full for a while: a run goes on, says so, and loses nothing that it can still write later."""

import contextlib
import json
import types

import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch import nn

from engine.comm.communicator import Communicator, SharedError
from engine.comm.launch import Launch
from engine.monitoring import metrics
from engine.saving import checkpoint, places
from engine.saving.writer import Writer
from engine.training.hooks import KeepBest, SaveCheckpoints
from engine.transfer import record
from loaders.errors import SystemRefusal
from tests.support.refusals import small_files


def events(log, steps, value=0.5):
    for step in steps:
        log.write("train", step, {"loss": value, "learning_rate": 0.1})


def drawn(folder):
    """Steps of the loss in TensorBoard's files."""
    return {
        event.step
        for path in folder.glob("events*")
        for event in EventFileLoader(str(path)).Load()
        if any(value.tag == "train/loss" for value in event.summary.value)
    }


def test_metrics_of_a_full_disk_are_written_when_there_is_room(tmp_path, caplog):
    log = metrics.MetricLog(tmp_path, 0)
    events(log, range(1, 4))
    size = log.path.stat().st_size
    with small_files(size + 10):
        events(log, range(4, 7))
    said = caplog.text
    assert f"{log.path} cannot be written: File too large" in said and "GB free" in said and "goes on" in said
    assert f"{tmp_path / 'tensorboard'} cannot be written" in said
    events(log, [7])
    log.close()
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, 8)]
    assert drawn(tmp_path / "tensorboard") == {*range(1, 8)}


def test_a_run_ends_where_its_last_metrics_find_no_room(tmp_path, caplog):
    log = metrics.MetricLog(tmp_path, 0)
    events(log, [1])
    with small_files(log.path.stat().st_size):
        events(log, [2])
        log.close()
    assert "ends without it" in caplog.text
    assert [event["step"] for event in metrics.read(log.path)] == [1]


class Alone(types.SimpleNamespace):
    """What hooks ask of a trainer."""

    def __init__(self):
        model = nn.Linear(300, 40)
        super().__init__(
            step=0, total_steps=9, global_batch=4, model=model, finite=lambda: True, sample_ids=[torch.tensor([1])],
            meter=types.SimpleNamespace(paused=contextlib.nullcontext), comm=Communicator(Launch("alone")),
            state=lambda: {"optimizer": {}, "step": self.step},
        )  # fmt: skip


def saving_in(folder, keep, interval, background=False):
    return SaveCheckpoints(folder, {"network": "a"}, keep, [interval], None, Writer(background))


def steps(folder):
    return [path.name for path in places.complete(folder)]


@pytest.mark.parametrize("background", [False, True], ids=["training waits", "beside training"])
def test_a_checkpoint_that_finds_no_room_is_tried_again_at_the_next_interval(tmp_path, caplog, background):
    trainer, saving = Alone(), saving_in(tmp_path, 1, 2.0, background)
    for trainer.step in range(1, 4):
        saving.after_step(trainer)
    saving.writer.wait()
    with small_files(20_000):
        for trainer.step in range(4, 8):
            saving.after_step(trainer)
        saving.writer.wait()
    assert steps(tmp_path) == ["step-00000002"] and checkpoint.load(tmp_path / "step-00000002").state["step"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002"]  # nothing of those that failed
    assert caplog.text.count("saves at the next interval") == 2 and "GB free" in caplog.text
    assert f"{tmp_path} cannot be written: {tmp_path}/.step-00000004.writing/weights.safetensors: File" in caplog.text
    trainer.step = 8
    saving.after_step(trainer)
    saving.writer.wait()
    assert steps(tmp_path) == ["step-00000008"]


@pytest.mark.parametrize("background", [False, True], ids=["training waits", "beside training"])
@pytest.mark.parametrize("ends", ["at its last step", "by a signal"])
def test_a_run_that_ends_without_a_checkpoint_says_so(tmp_path, ends, background):
    trainer, saving = Alone(), saving_in(tmp_path, 1, 8.0, background)
    trainer.step = 8
    with small_files(20_000):
        saving.after_step(trainer)  # goes on
        if ends == "by a signal":
            with pytest.raises(SharedError, match="step 8 could not be saved"):
                saving.save(trainer)
        else:
            trainer.step = 9
            with pytest.raises(SharedError, match="step 9 could not be saved"):
                saving.after_step(trainer)
    saving.save(trainer)
    assert steps(tmp_path) == [f"step-{trainer.step:08d}"]


@pytest.mark.parametrize("background", [False, True], ids=["training waits", "beside training"])
def test_other_errors_than_a_full_disk_end_a_run(tmp_path, background):
    (tmp_path / "a").write_text("no folder")
    trainer, saving = Alone(), saving_in(tmp_path / "a", 1, 2.0, background)
    trainer.step = 2
    with pytest.raises(OSError, match="a"):
        saving.after_step(trainer)
        saving.save(trainer)


def test_the_best_before_it_is_kept_where_the_disk_is_full(tmp_path, caplog):
    scores = types.SimpleNamespace(newest={})
    trainer, best = Alone(), KeepBest(tmp_path, {"network": "a"}, scores, Writer(False))

    def scored(step, loss):
        trainer.step, scores.newest = step, {"loss": loss}
        best.after_step(trainer)

    scored(1, 3.0)
    with small_files(20_000):
        scored(2, 2.0)
    assert steps(tmp_path) == ["step-00000001"] and "the best before it is kept" in caplog.text
    scored(3, 2.5)  # better than what is kept
    assert steps(tmp_path) == ["step-00000003"]


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files, as a test's own."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    return place


@pytest.mark.parametrize("beside", [True, False], ids=["beside", "among temporary files"])
def test_a_result_that_finds_no_room_is_printed_kept_and_appended_later(tmp_path, temporary, capsys, beside):
    path = tmp_path / "r.jsonl"
    record.append(path, {"seed": 0, "pad": "x" * 500})
    if not beside:  # there is no room there either
        (tmp_path / ".r.jsonl.kept").write_text(json.dumps({"seed": 9, "pad": "x" * 700}) + "\n")
    with small_files(path.stat().st_size + 10):
        record.append(path, {"seed": 1})
        record.append(path, {"seed": 2})
    said = capsys.readouterr().err
    assert '{"seed": 1}\n' in said and '{"seed": 2}\n' in said and "File too large" in said and "GB free" in said
    assert [line["seed"] for line in read(path)] == [0]
    kept = [*temporary.glob("*.kept")] if not beside else [tmp_path / ".r.jsonl.kept"]
    assert [json.loads(line) for line in kept[0].read_text().splitlines()] == [{"seed": 1}, {"seed": 2}]
    record.append(path, {"seed": 3})
    assert [line["seed"] for line in read(path)] == ([0, 1, 2, 3] if beside else [0, 9, 1, 2, 3])
    assert not kept[0].exists()


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_kept_is_appended_before_a_sweep_looks_what_is_missing(tmp_path, temporary):
    path = tmp_path / "r.jsonl"
    record.append(path, {"seed": 0})
    with small_files(path.stat().st_size + 3):
        record.append(path, {"seed": 1})
        with pytest.raises(OSError, match="File too large"):
            record.settle(path)
    record.settle(path)
    record.settle(path)
    assert [line["seed"] for line in read(path)] == [0, 1]


def test_results_are_asked_for_room_and_not_for_a_name_only(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"a": 1}\n')
    with small_files(1000), pytest.raises(SystemRefusal, match="r.jsonl cannot be written.*File too large"):
        record.check_writable(path)
    record.check_writable(path)
    assert [each.name for each in tmp_path.iterdir()] == ["r.jsonl"] and path.read_bytes() == b'{"a": 1}\n'
