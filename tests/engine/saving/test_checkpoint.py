import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from engine.saving import checkpoint, places
from loaders.errors import SystemRefusal, UserError
from tests.support import refusals

ABOUT = {"network": "R50x1", "num_classes": 2, "class_names": ["a", "b"]}


def state(step):
    return {"step": step, "optimizer": {"state": {0: {"momentum_buffer": torch.randn(3)}}, "param_groups": []}}


def write(folder, step, keep=2):
    torch.manual_seed(step)
    model = nn.Linear(3, 2)
    return model, checkpoint.save(folder, model.state_dict(), state(step), ABOUT | {"step": step}, keep)


def test_what_is_written_is_read(tmp_path):
    model, path = write(tmp_path, 7)
    found = checkpoint.load(path)
    assert found.state["step"] == 7
    assert found.about.items() >= (ABOUT | {"step": 7}).items()
    for name, value in model.state_dict().items():
        assert torch.equal(found.weights[name], value)
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1  # who may read one may read all


def test_the_newest_are_kept_and_found(tmp_path):
    for step in (5, 10, 100, 1000):
        write(tmp_path / "checkpoints", step)
    names = [path.name for path in places.complete(tmp_path / "checkpoints")]
    assert names == ["step-00000100", "step-00001000"]
    assert checkpoint.find(tmp_path).name == "step-00001000"
    assert checkpoint.find(tmp_path / "checkpoints" / "step-00000100").name == "step-00000100"


def test_of_what_is_set_beside_one_is_kept_that_no_run_goes_on_from(tmp_path):
    model, kept = write(tmp_path, 1)
    (tmp_path / "diverged-of-someone-else").mkdir()
    for step in (5, 7):
        beside = checkpoint.set_beside(
            tmp_path, model.state_dict(), state(step), ABOUT | {"step": step}, {"loss": float("nan")}
        )
        assert beside.name == f"diverged-{step:08d}"
        assert json.loads((beside / "diagnosis.json").read_text()) == {"loss": None}
    assert {path.name for path in tmp_path.iterdir()} == {kept.name, beside.name, "diverged-of-someone-else"}
    assert checkpoint.find(tmp_path) == kept


@pytest.mark.parametrize("size", [100, 600])
def test_a_disk_that_is_full_is_said_to_be(tmp_path, size):
    """Whichever file is the first that finds no room: the weights or the state."""
    write(tmp_path, 1)
    with refusals.small_files(size), pytest.raises(OSError, match="File too large"):
        write(tmp_path, 2)
    assert [path.name for path in places.complete(tmp_path)] == ["step-00000001"]


@pytest.fixture
def for_all():
    """A folder that others may enter, unlike those of pytest: what one file refuses is not hidden by what is above."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize("name", ["about.json", "weights.safetensors", "state.pt", ".", "no descriptor"])
def test_a_checkpoint_that_may_not_be_read_is_not_damaged(for_all, name):
    """A run would give a damaged one another name, and go on from an earlier one, or anew."""
    write(for_all, 1)
    _, path = write(for_all, 2)
    place = for_all if name == "." else path / name
    refused = refusals.no_descriptor_left() if name == "no descriptor" else refusals.no_permission(place)
    with refused, pytest.raises(SystemRefusal, match="ulimit -n|Permission denied"):
        checkpoint.newest_sound(for_all, ABOUT)
    assert checkpoint.newest_sound(for_all, ABOUT)[0].path == path


def test_a_write_that_fails_leaves_the_older_checkpoint_and_nothing_that_looks_whole(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space"):
            write(tmp_path, 2)
    assert [path.name for path in places.complete(tmp_path)] == ["step-00000001"]
    write(tmp_path, 2)  # the remains do not disturb the next attempt
    assert checkpoint.load(checkpoint.find(tmp_path)).state["step"] == 2


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.STATE, checkpoint.ABOUT])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damage_is_told(tmp_path, name, damage):
    _, path = write(tmp_path, 1)
    data = (path / name).read_bytes()
    (path / name).unlink()
    if damage == "truncated":
        (path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(path)


def test_a_checkpoint_runs_no_code_when_loaded(tmp_path):
    _, path = write(tmp_path, 1)

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "was-here"), "w")

    torch.save({"step": Evil()}, path / checkpoint.STATE)
    about = json.loads((path / checkpoint.ABOUT).read_text())
    del about["files"], about["sha256"]  # as before there were checksums
    (path / checkpoint.ABOUT).write_text(json.dumps(about))
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(path)
    assert not (tmp_path / "was-here").exists()


@pytest.mark.parametrize("place", ["absent", "empty"])
def test_no_checkpoint_is_said_so(tmp_path, place):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=place):
        checkpoint.find(tmp_path / place)


def test_another_run_is_recognised(tmp_path):
    _, path = write(tmp_path, 1)
    described = json.loads((path / checkpoint.ABOUT).read_text())
    checkpoint.agree(described, ABOUT, path)
    with pytest.raises(UserError, match="network is 'R50x1', here it is 'R152x4'"):
        checkpoint.agree(described, ABOUT | {"network": "R152x4"}, path)


def flipped(data, at):
    return data[: at // 8] + bytes([data[at // 8] ^ (1 << at % 8)]) + data[at // 8 + 1 :]


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.STATE, checkpoint.ABOUT])
def test_a_flipped_bit_anywhere_is_noticed_and_the_newest_sound_checkpoint_is_taken(tmp_path, name):
    """40 places in each file; sha256sum is the oracle of the checksums."""
    write(tmp_path, 1, keep=3)
    _, path = write(tmp_path, 2, keep=3)
    whole = (path / name).read_bytes()
    described = json.loads((path / checkpoint.ABOUT).read_text())
    for file, digest in described["files"].items():
        assert subprocess.check_output(["sha256sum", path / file], text=True).split()[0] == digest
    for at in np.random.default_rng(0).integers(0, 8 * (len(whole) - 1), 40).tolist():  # the last byte is a line's end
        (path / name).write_bytes(flipped(whole, at))
        found, damaged = checkpoint.newest_sound(tmp_path, ABOUT)
        assert found.path.name == "step-00000001", at
        assert [bad.name for bad, _ in damaged] == ["step-00000002"]
    (path / name).write_bytes(whole)
    assert checkpoint.newest_sound(tmp_path, ABOUT)[0].path == path


def reseal(path, **changes):
    """Checksums that match whatever the files hold now, and a description that says so."""
    about = json.loads((path / checkpoint.ABOUT).read_text()) | changes
    if "files" in about:
        about["files"] = {n: hashlib.sha256((path / n).read_bytes()).hexdigest() for n in about["files"]}
        del about["sha256"]
        about["sha256"] = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    (path / checkpoint.ABOUT).write_text(json.dumps(about))


DAMAGE = {
    "no weights": lambda path: (path / checkpoint.WEIGHTS).unlink(),
    "no state": lambda path: (path / checkpoint.STATE).unlink(),
    "no description": lambda path: (path / checkpoint.ABOUT).unlink(),
    "a folder in place of a file": lambda path: (path / checkpoint.STATE).unlink() or (path / checkpoint.STATE).mkdir(),
    "nothing at all": lambda path: [file.unlink() for file in path.iterdir()],
    "empty files": lambda path: [file.write_bytes(b"") for file in path.iterdir()],
    "another list": lambda path: (path / checkpoint.ABOUT).write_text("[1]"),
    "deep JSON": lambda path: (path / checkpoint.ABOUT).write_text("[" * 100_000),
    "no text": lambda path: (path / checkpoint.ABOUT).write_bytes(bytes(range(128, 256))),
    "checksums of no files": lambda path: (path / checkpoint.ABOUT).write_text('{"files": 3, "sha256": "x"}'),
    "a step that lies": lambda path: reseal(path, step=7),
    "state without a step": lambda path: torch.save({"step": "x"}, path / checkpoint.STATE) or reseal(path),
    "state of another kind": lambda path: torch.save([1], path / checkpoint.STATE) or reseal(path),
    "state that is text": lambda path: (path / checkpoint.STATE).write_text("hello") and reseal(path),
    "weights that are text": lambda path: (path / checkpoint.WEIGHTS).write_text("hello") and reseal(path),
    "weights that are not finite": lambda path: (
        save_file({"weight": torch.tensor([1.0, float("nan")])}, path / checkpoint.WEIGHTS) or reseal(path)
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path, damage):
    write(tmp_path, 1)
    _, path = write(tmp_path, 2)
    DAMAGE[damage](path)
    found, passed = checkpoint.newest_sound(tmp_path, ABOUT)
    assert found.path.name == "step-00000001"
    ((bad, reason),) = passed
    assert bad == path
    assert reason
    with pytest.raises(UserError, match="step-00000001"):
        checkpoint.load(path)
    aside = places.set_aside(bad)
    assert places.complete(tmp_path) == [found.path]
    assert aside.is_dir()  # for people to look at


def test_a_renamed_checkpoint_lies_about_its_step(tmp_path):
    _, path = write(tmp_path, 1)
    shutil.copytree(path, tmp_path / "step-00000009")
    assert checkpoint.newest_sound(tmp_path, ABOUT)[0].path == path


def test_where_none_is_sound_all_are_named_and_nothing_is_lost(tmp_path):
    for step in (1, 2):
        (write(tmp_path, step)[1] / checkpoint.STATE).write_bytes(b"")
    with pytest.raises(UserError, match="step-00000002: state.pt .*step-00000001: state.pt .*another folder"):
        checkpoint.newest_sound(tmp_path, ABOUT)
    assert len(places.complete(tmp_path)) == 2


def test_names_that_are_not_ours_are_let_be(tmp_path):
    names = ["step-99999999.bak", "step-old", "step-00000003-copy", ".step-00000003", "step-3", ".nfs0001", "best"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / checkpoint.ABOUT).write_text("{}")
    (tmp_path / "step-00000099").write_text("a file")
    (tmp_path / "step-00000098").symlink_to(tmp_path / "best")
    places.tidy(tmp_path)
    for step in (1, 2, 3):
        write(tmp_path, step, keep=1)
    assert [path.name for path in places.complete(tmp_path)] == ["step-00000003"]
    assert all((tmp_path / name / checkpoint.ABOUT).exists() for name in [*names, "step-00000098"])


def test_what_a_killed_save_left_is_removed(tmp_path):
    _, path = write(tmp_path, 4)
    (tmp_path / ".step-00000005.writing").mkdir()
    (tmp_path / ".diverged-00000005.writing").mkdir()
    shutil.copytree(path, tmp_path / ".step-00000004.replaced")
    places.tidy(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_ten_steps_of_a_hundred_million_come_after_nine(tmp_path):
    for step in (99_999_999, 100_000_000):
        write(tmp_path, step)
    assert checkpoint.find(tmp_path).name == "step-100000000"


class Killed(BaseException):
    """What a SIGKILL is to a save: nothing after it happens."""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_save_of_a_step_that_is_there_may_be_killed_anywhere(tmp_path, monkeypatch, when):
    """Before and after each thing that touches the disk, with keep=1: a sound checkpoint is left, and no leftovers."""
    touched = [(checkpoint, "save_file"), (torch, "save"), (os, "fsync"), (Path, "rename"), (shutil, "rmtree")]
    kills = 0
    for last in range(100):
        folder, calls = tmp_path / str(last), []
        write(folder, 5, keep=1)

        def counted(call, calls=calls, last=last):
            def maybe(*args, **options):
                calls.append(call)
                if when == "before" and len(calls) > last:
                    raise Killed
                result = call(*args, **options)
                if len(calls) > last:
                    raise Killed
                return result

            return maybe

        try:
            with monkeypatch.context() as patched:
                for where, name in touched:
                    patched.setattr(where, name, counted(getattr(where, name)))
                write(folder, 5, keep=1)
        except Killed:
            kills += 1
        else:
            break
        places.tidy(folder)
        assert checkpoint.newest_sound(folder, ABOUT)[0].path == folder / "step-00000005", last
        assert [path.name for path in folder.iterdir()] == ["step-00000005"]
    assert kills > 10


def test_names_are_on_disk_before_older_ones_go(tmp_path, monkeypatch):
    events, fsync, rmtree = [], os.fsync, shutil.rmtree
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(shutil, "rmtree", lambda path, **how: (events.append(f"rm {path}"), rmtree(path, **how)))
    write(tmp_path, 1, keep=1)
    write(tmp_path, 2, keep=1)
    writing = tmp_path / ".step-00000002.writing"
    second = events[events.index(str(tmp_path)) + 1 :]
    for synced in (*(str(writing / name) for name in (checkpoint.WEIGHTS, checkpoint.STATE, checkpoint.ABOUT)),
                   str(writing)):  # fmt: skip
        assert second.index(synced) < second.index(str(tmp_path))
    assert second.index(str(tmp_path)) < second.index(f"rm {tmp_path / 'step-00000001'}")
