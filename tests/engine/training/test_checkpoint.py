import json

import pytest
import torch
from torch import nn

from engine.training import checkpoint
from loaders.errors import UserError

ABOUT = {"network": "R50x1", "num_classes": 2, "class_names": ["a", "b"]}


def state(step):
    return {"step": step, "optimizer": {"state": {0: {"momentum_buffer": torch.randn(3)}}, "param_groups": []}}


def write(folder, step, keep=2):
    torch.manual_seed(step)
    model = nn.Linear(3, 2)
    return model, checkpoint.save(folder, model, state(step), ABOUT | {"step": step}, keep)


def test_what_is_written_is_read(tmp_path):
    model, path = write(tmp_path, 7)
    found = checkpoint.load(path)
    assert found.state["step"] == 7
    assert found.about == ABOUT | {"step": 7}
    for name, value in model.state_dict().items():
        assert torch.equal(found.weights[name], value)
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1  # who may read one may read all


def test_the_newest_are_kept_and_found(tmp_path):
    for step in (5, 10, 100, 1000):
        write(tmp_path / "checkpoints", step)
    names = [path.name for path in checkpoint.complete(tmp_path / "checkpoints")]
    assert names == ["step-00000100", "step-00001000"]
    assert checkpoint.find(tmp_path).name == "step-00001000"
    assert checkpoint.find(tmp_path / "checkpoints" / "step-00000100").name == "step-00000100"


def test_a_write_that_fails_leaves_the_older_checkpoint_and_nothing_that_looks_whole(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space"):
            write(tmp_path, 2)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-00000001"]
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
    with pytest.raises(UserError, match="remove"):
        checkpoint.load(path)


def test_a_checkpoint_runs_no_code_when_loaded(tmp_path):
    _, path = write(tmp_path, 1)

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "was-here"), "w")

    torch.save({"step": Evil()}, path / checkpoint.STATE)
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
