from types import SimpleNamespace

import pytest
import torch

from engine.tuning import room

MEMINFO = "MemTotal:  1000 kB\nMemAvailable:  600 kB\n"


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 600 * 1024),
        ({"memory.max": "max\n", "memory.current": "5"}, 600 * 1024),
        ({"memory.max": "100000\n", "memory.current": "30000\n"}, 70000),
        ({"memory.max": "100000\n", "memory.current": "130000\n"}, 0),
        ({"memory/memory.limit_in_bytes": "5000", "memory/memory.usage_in_bytes": "1000"}, 4000),
        ({"memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "1"}, 600 * 1024),
    ],
)
def test_what_is_free_is_the_machines_or_the_containers(tmp_path, files, free):
    (tmp_path / "meminfo").write_text(MEMINFO)
    (tmp_path / "memory").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert room.free_bytes(tmp_path / "meminfo", tmp_path) == free


def test_ranks_of_a_machine_share_it(monkeypatch):
    monkeypatch.setattr(room.platform, "node", lambda: "a")
    monkeypatch.setattr(room, "free_bytes", lambda: 1000)
    comm = SimpleNamespace(exchange=lambda value: ["a", "b", "a", "a"])
    assert room.available_bytes(torch.device("cpu"), comm) == 333
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (77, 100))
    assert room.available_bytes(torch.device("cuda"), comm) == 77


def test_this_machine_has_memory():
    assert room.free_bytes() > 2**20
