"""A network as a folder from which timm makes it: `timm.create_model("local-dir:FOLDER", pretrained=True)`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor

from engine.exporting.deployed import Deployed
from engine.exporting.facts import Facts
from engine.network import family
from engine.network.bit import StdConv2d
from engine.network.choose import head
from engine.network.naming import PUBLISHED, TIMM, rename, timm_network
from engine.predicting.tuned import Tuned
from engine.whole import json_text

FOLDER = "timm"
KERNELS = 10.0
"""What kernels are multiplied by: timm adds 1e-8 to their variance when it standardizes them, we add 1e-10, and both
come to the same of kernels of 100 times the variance."""
_CROPS = {"center_crop": "center", "resize": "squash", "xray": "center"}


def missing(network: str) -> str | None:
    """Why timm cannot have this network; None: it can."""
    if not family.is_timm(network) and timm_network(network) is None:
        theirs = ", ".join(name for name in family.MEMBERS if timm_network(name))
        return f"timm has no network of the shape of {network}; of the BiT family it has {theirs}"
    return None


def write(tuned: Tuned, facts: Facts, folder: Path) -> Path:
    """Write the weights and their description into a folder below `folder`; that folder."""
    place = folder / FOLDER
    place.mkdir()
    safetensors.torch.save_file(_weights(tuned, facts), place / "model.safetensors", metadata={"format": "pt"})
    (place / "model.safetensors").chmod(0o644)
    (place / "config.json").write_text(json_text(_config(tuned, facts), indent=1) + "\n", encoding="utf-8")
    return place


def _weights(tuned: Tuned, facts: Facts) -> dict[str, Tensor]:
    """By timm's names; a calibration is in the classifier, which is linear."""
    network = tuned.network
    kernels = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, StdConv2d)}
    classifier = f"{head(network)}."
    found = {}
    for name, tensor in network.state_dict().items():
        value = tensor.detach().cpu().contiguous()
        if name in kernels:
            value = value * KERNELS
        if name.startswith(classifier) and facts.temperature is not None:
            value = value / facts.temperature
        theirs = name if family.is_timm(facts.network) else rename(name, PUBLISHED, TIMM)
        assert theirs is not None, f"{name} is no parameter of a BiT network"
        found[theirs] = value
    return found


def _config(tuned: Tuned, facts: Facts) -> dict[str, Any]:
    """What timm reads."""
    own = family.is_timm(facts.network)
    network, side, transform = tuned.network, facts.transform.size, facts.transform
    architecture = facts.network.removeprefix("timm/") if own else timm_network(facts.network)
    cropped = transform.kind == "center_crop"
    prepared: dict[str, Any] = {
        "input_size": [3, side, side],
        "interpolation": "bilinear",
        "crop_pct": side / transform.before_crop if cropped else 1.0,
        "crop_mode": _CROPS[transform.kind],
        "mean": list(transform.mean),
        "std": list(transform.std),
        "num_classes": len(facts.classes),
        "custom_load": False,
        "first_conv": cast(dict[str, Any], network.pretrained_cfg).get("first_conv") if own else "stem.conv",
        "classifier": head(network) if own else "head.fc",
    }
    return {
        "architecture": str(architecture).partition(".")[0],
        "num_classes": len(facts.classes),
        "label_names": list(facts.classes),
        "pretrained_cfg": prepared,
        "boosterbit": facts.metadata(),
    }


def read(place: Path, deployed: Deployed) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """What `write` wrote, as timm makes it, behind the normalization that it leaves to others; None without timm."""
    if importlib.util.find_spec("timm") is None:
        return None
    import timm

    network = timm.create_model(f"local-dir:{place}", pretrained=True).eval()

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits = network(images * deployed.scale + deployed.shift)
        return (logits.sigmoid() if deployed.several_labels else logits.softmax(1)), logits

    return run
