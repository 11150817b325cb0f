"""jobs/tables.yaml against the commands of docs/datasets.md that make its packs."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from engine.network import family
from engine.network.memory import saved_bytes_per_image
from loaders.sources.kinds.xray.splits import check_side

ROOT = Path(__file__).parents[2]
# "From the published files" of the protocol: what was trained on, and what was scored. The other sets have one split.
PUBLISHED = {
    "chexpert": ("train", "valid"),
    "mimic": ("train", "validate"),
    "nih": ("train", "test"),
    "padchest": ("train", "test"),
    "padchest-cl": ("train", "test"),
    "flowers": ("published-train", "published-test"),
}


def packed_in_the_docs(folder):
    """Destination → arguments of each packing command of docs/datasets.md, as a shell reads them."""
    text = (ROOT / "docs" / "datasets.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    (folder / "python").write_text('#!/bin/bash\n[[ $2 == loaders.pack ]] && printf "%s\\t" "${@:3}" && echo\n')
    (folder / "pip").write_text("#!/bin/bash\n")
    for name in ("python", "pip"):
        (folder / name).chmod(0o755)
    env = {"PATH": f"{folder}:/usr/bin:/bin", "DATA": "/data"}
    said = subprocess.run(
        ["bash", "-euc", "\n".join(blocks)], env=env, cwd=folder, capture_output=True, text=True, check=True
    )
    lines = [line.rstrip("\t").split("\t") for line in said.stdout.splitlines()]
    return {words[1]: words for words in lines}


def test_tables_are_scored_on_the_published_splits_as_the_documented_commands_pack_them(tmp_path):
    packed = packed_in_the_docs(tmp_path)
    targets = yaml.safe_load((ROOT / "jobs" / "tables.yaml").read_text())["targets"]
    assert len(targets) == 11
    splits = {}
    for target in targets.values():
        for part in ("train", "test"):
            pack = target[part].removeprefix("${oc.env:PACKS}/")
            assert pack in packed, f"docs/datasets.md does not say how {pack} is made"
            words = packed[pack]
            side = words[words.index("--under") + 1]
            name = pack.removesuffix(f"-{part}.h5").removesuffix("-published")
            splits.setdefault(name, []).append(side)
            if words[0].startswith("xray:"):
                assert words[0].split(":")[1] == name
                assert ("split=published" in words) == (name in PUBLISHED), words
                assert ("no_finding=all" in words) == (name == "chexpert"), words
            if name in PUBLISHED and name != "flowers":
                check_side(name.removesuffix("-cl"), "published", side)
    assert {name: tuple(sides) for name, sides in splits.items() if name in PUBLISHED} == PUBLISHED


def test_packs_of_another_split_do_not_go_by_the_name_of_a_published_one(tmp_path):
    packed = packed_in_the_docs(tmp_path)
    published = [name for name, words in packed.items() if "-published-" in name]
    assert len(published) == 12
    for name, words in packed.items():
        assert ("split=published" in words or any(word.startswith("published-") for word in words)) == (
            name in published
        )


SIZES = {128: ("cifar10", "cifar100"), 480: ("flowers102", "pets", "covidx", "tuberculosis"),
         224: ("padchest_cl", "mimic", "chexpert", "padchest", "nih")}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_a_micro_batch_of_the_largest_network_has_room_in_40_gb(size):
    """What is kept for the backward pass, and 14 bytes a parameter; 8 GB are left for what convolutions need."""
    sweep = yaml.safe_load((ROOT / "jobs" / "tables.yaml").read_text())
    each = saved_bytes_per_image("R152x4", size, torch.bfloat16)
    fixed = 14 * family.cost("R152x4", 1000, size).parameters
    for target in SIZES[size]:
        accumulate = (sweep["targets"][target].get("set") or {}).get("accumulate", sweep["set"]["accumulate"])
        assert 128 % accumulate == 0
        assert 128 // accumulate * each + fixed < 32e9, target
        assert accumulate == 1 or 4 * 128 // accumulate * each + fixed > 32e9, f"{target}: more than a half is unused"
