import pytest

from engine.comm import mpirun
from loaders.errors import UserError


@pytest.mark.parametrize(
    ("installed", "horovod", "mpi", "expected"),
    [
        ({"mpirun", "horovodrun", "torchrun"}, True, True, "mpirun"),
        ({"mpirun", "horovodrun", "torchrun"}, True, False, "horovodrun"),  # that mpirun is of no use to Horovod
        ({"mpirun", "torchrun"}, False, False, "torchrun"),
    ],
)
def test_the_launcher_is_one_that_horovod_understands(monkeypatch, installed, horovod, mpi, expected):
    monkeypatch.setattr(mpirun, "has_horovod", lambda: horovod)
    monkeypatch.setattr(mpirun, "horovod_speaks_mpi", lambda: mpi)
    monkeypatch.setattr(mpirun, "_program", lambda name: f"/bin/{name}" if name in installed else None)
    assert mpirun.rank_command(2)[0] == f"/bin/{expected}"


def test_no_launcher_is_a_clear_message(monkeypatch):
    monkeypatch.setattr(mpirun, "_program", lambda name: None)
    with pytest.raises(UserError, match="make env"):
        mpirun.rank_command(2)
