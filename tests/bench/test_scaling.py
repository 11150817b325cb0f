"""The scaling bench as a program: what it prints and writes, and what it says to unusable arguments."""

import json
import subprocess
import sys

import pytest
import yaml

from bench import scaling
from bench.model.facts import HERE
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def not_launched(monkeypatch, tmp_path):
    for name in ("SLURM_JOB_ID", "OMPI_COMM_WORLD_SIZE", "WORLD_SIZE", "HOROVOD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def test_the_headline(tmp_path, capsys):
    scaling.main(["--gpus", "1024", "--explain", "--plan", "--json", "rows.json", "--plot", "rows.png"])
    out = capsys.readouterr().out
    assert "124,003.59" in out  # the paper's row beside ours
    assert "7.3 times the A100's FP32 peak, 91% of its TF32 peak" in out
    assert "81 hours" in out
    assert "imagenet21k_r152x4" in out
    content = json.loads((tmp_path / "rows.json").read_text())
    assert [row["gpus"] for row in content["rows"]] == [1, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    for row in content["rows"]:
        assert row["source"] == "modelled"
        assert row["speedup"] == pytest.approx(row["images_per_second"] / content["rows"][0]["images_per_second"])
        assert row["efficiency"] == pytest.approx(100 * row["speedup"] / row["gpus"])
        assert row["efficiency"] + sum(row["lost_percent"].values()) == pytest.approx(100)
    assert {"hardware", "profile"} <= set(content)
    assert all(fact["source"] for name, fact in content["hardware"].items() if name != "cluster")
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


def test_a_laptop_needs_neither_launcher_nor_torch(tmp_path):
    """Run as a file, from anywhere; torch would take seconds to import."""
    code = f"""
import runpy, sys
sys.argv = ["scaling.py", "--gpus", "64"]
runpy.run_path({str(ROOT / "bench" / "scaling.py")!r}, run_name="__main__")
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "modelled" in done.stdout
    assert (tmp_path / "scaling.png").is_file()


def test_a_size_between_the_usual_ones(capsys):
    scaling.main(["--gpus", "3", "--json", "rows.json"])
    assert "98." in capsys.readouterr().out
    with open("rows.json") as file:
        assert [row["gpus"] for row in json.load(file)["rows"]] == [1, 3]


@pytest.mark.parametrize("arguments", [["--what-if", "rails=2"], ["--what-if", "gpu=h100", "--what-if", "slice_mib=16"],
                                       ["--model", "R50x1"], ["--model", "R101x3"], ["--cluster", "generic_h100"],
                                       ["--precision", "bf16"], ["--batch", "16"], ["--facts"]])  # fmt: skip
def test_variants(arguments, capsys):
    scaling.main(["--gpus", "64", *arguments, "--json", "rows.json"])
    assert "64" in capsys.readouterr().out
    with open("rows.json") as file:
        assert all(0 < row["efficiency"] <= 100 for row in json.load(file)["rows"])


def profile(**change):
    return yaml.safe_load((HERE / "profiles" / "table2_r152x4.yaml").read_text()) | change


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--gpus", "0"], "1 to 1,000,000,000"),
        (["--gpus", "-4"], "1 to 1,000,000,000"),
        (["--gpus", "5000"], "3,744"),
        (["--cluster", "juwels"], "did you mean juwels_booster"),
        (["--model", "R50x2"], "R50x1"),
        (["--batch", "0"], "1 to 1,000,000,000"),
        (["--precision", "int8"], "bf16"),
        (["--profile", "absent.yaml"], "absent.yaml"),
        (["--profile", profile(images_per_second=-5)], "images_per_second is -5"),
        (["--profile", profile(batch=-1)], "batch is -1"),
        (["--profile", profile(optimizer_share=-0.1)], "share"),
        (["--profile", profile(forward_share=0.9, optimizer_share=0.2)], "backward"),
        (["--profile", profile(images_per_secnd=5)], "images_per_second"),
        (["--profile", {"network": "R50x1"}], "lacks"),
        (["--cluster", {"name": "x", "gpu": "a100-sxm4-40gb", "facts": {}}], "lacks nodes"),
        (["--data", "absent.h5"], "absent.h5"),
    ],
)
def test_unusable_arguments_end_in_one_message(arguments, said, capsys, tmp_path):
    for index, word in enumerate(arguments):
        if isinstance(word, dict):
            (tmp_path / "given.yaml").write_text(yaml.safe_dump(word))
            arguments = [*arguments[:index], "given.yaml", *arguments[index + 1 :]]
    with pytest.raises(SystemExit) as ended:
        scaling.main([*arguments, "--json", "rows.json"])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert said in message
    assert not (tmp_path / "rows.json").exists()
