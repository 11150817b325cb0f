"""docs/library.md: its snippets run, do what the page says, and its list of what is public is that of the rooms."""

import ast
import json
import re
import shutil
import signal
import subprocess

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine.comm.mpirun import rank_command, rank_environment
from engine.network import bit
from loaders.packs import Pack
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")


def snippets(heading):
    """The Python of a section."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert found, heading
    return found


@pytest.fixture
def place(digits, tmp_path, monkeypatch):
    """What the snippets find where they run: packs of the digits 5 to 9, 8x8 pixels, and weights."""
    for part in ("train", "test"):
        shutil.copy(digits / f"high-{part}.h5", tmp_path / f"{part}.h5")
    save_file(bit.build("R8x0.25-8px", 7, zero_head=False).state_dict(), tmp_path / "weights.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(texts):
    """Snippets one after another, as one program; what they leave."""
    names = {"__name__": "snippet"}
    for text in texts:
        exec(compile(text, "docs/library.md", "exec"), names)
    return names


def test_every_snippet_is_run_here():
    tested = [text for heading in re.findall(r"^## (.+)$", PAGE, re.MULTILINE)[:5] for text in snippets(heading)]
    assert len(tested) == PAGE.count("```python")


def test_the_optimizer_takes_the_place_of_torchs_in_one_line(place):
    (text,) = snippets("The optimizer in a loop of your own")
    found = run([text])
    (line,) = [each for each in text.splitlines() if "optimizer = " in each]
    plain = run([text.replace(line, "optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)")])
    assert plain["step"] == found["step"] == 2
    state = found["optimizer"].state_dict()
    heads = [group for group in found["optimizer"].param_groups if group["clipping"] is None]
    assert {name for group in heads for name in group["names"]} == {"fc.weight", "fc.bias"}
    groups = found["optimizer"].param_groups
    theirs = torch.optim.SGD([{"params": group["params"]} for group in groups], lr=0.1, momentum=0.9)
    theirs.load_state_dict(state)


def test_a_loader_gives_each_image_of_a_pack_once(place):
    (text,) = snippets("Packs in a DataLoader of torch")
    found = run(["seen = []", text + "    seen += names\n    assert images.shape[1:] == (3, 32, 32)\n"])
    pack = Pack.open("train.h5")
    assert sorted(found["seen"]) == sorted(pack.class_names[label] for label in pack.labels)


def ids_by_rank(printed):
    found = {}
    for rank, ids in re.findall(r"^(\d+) (\[[\d, ]+\])$", printed, re.MULTILINE):
        found.setdefault(int(rank), []).append(ast.literal_eval(ids))
    return found


def test_two_ranks_share_the_batches_of_one(place, capsys):
    (text,) = snippets("Batches of DALI in a loop of your own")
    run([text])
    alone = ids_by_rank(capsys.readouterr().out)
    (place / "loop.py").write_text(text, encoding="utf-8")
    words, env = [*rank_command(2, "torchrun"), "loop.py"], rank_environment(2) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=env, cwd=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    shared = ids_by_rank(done.stdout)
    assert set(alone) == {0} and set(shared) == {0, 1} and len(alone[0]) == 3
    assert alone[0] == [first + second for first, second in zip(shared[0], shared[1], strict=True)]


def test_a_bit_takes_weights_with_another_classifier(place):
    (text,) = snippets("A BiT with its weights")
    found = run([text])
    assert found["logits"].shape == (1, 5)
    kept = found["load"]("weights.safetensors")
    own = found["model"].state_dict()
    assert all(torch.equal(own[name], kept[name]) for name in own if not name.startswith("head.conv."))


def test_a_run_is_called_and_so_it_is_from_a_thread(place, capsys):
    """Nobody listens to signals, and both runs come to the same."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    first, later, threaded = snippets("A run, its network and its scores")
    found = run([first])
    assert len(found["rates"].seen) == 3 and found["result"]["last_step"] == 3
    own = found["rates"].network.state_dict()
    tuned = run([later])["tuned"]
    assert all(torch.equal(value, own[name]) for name, value in tuned.network.state_dict().items())
    again = run([threaded])["result"]
    lines = [json.loads(line) for line in (place / "results.jsonl").read_text().splitlines()]
    assert [line["path"] for line in lines] == ["run", ""]
    assert (
        again["metric_value"] == found["result"]["metric_value"] and again["test_loss"] == found["result"]["test_loss"]
    )
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before
    low, high = found["result"]["interval"]
    assert capsys.readouterr().out.split()[:2] == ["top1", str(found["result"]["metric_value"])]
    assert np.isfinite([low, high]).all()


def test_what_is_public_is_what_the_rooms_give_away():
    section = PAGE.split("\n## What is public\n")[1]
    rows = re.findall(r"^\| `([\w.]+)` \| (.+) \|$", section, re.MULTILINE)
    assert len(rows) > 5
    for room, listed in rows:
        stub = ast.parse((ROOT / room.replace(".", "/") / "__init__.pyi").read_text())
        names = {alias.asname for node in stub.body for alias in node.names}
        assert re.findall(r"`(\w+)`", listed) == sorted(names), room
