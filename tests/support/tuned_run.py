"""The folder of a run that was never run: a network of drawn weights, and what a run says of itself."""

import json

import numpy as np
import torch
import yaml

from engine.network import choose
from engine.saving import checkpoint
from loaders.pipelines import transform as presets
from tests.support import packing, pictures

RESULT = {
    "metric_value": 61.5, "metric": "top1", "path": "run", "seed": 3, "shot": "10", "pretrained_model": "cifar10",
    "dataset": "chest", "last_step": 500, "network": "R8x0.25-8px", "weights": "0123456789abcdef", "recipe": "xray",
    "train_images": 30, "test_images": 224, "majority": 44.64, "interval": [54.8, 67.9],
    "classes": {"bird": 50.0, "cat": 71.25, "dog": None}, "short_classes": {"dog": 4}, "size": 8, "mixup": 0.1,
    "settings": "abc", "ranks": 2, "commit": "69f6460+", "time": "2026-11-28T20:00:00+00:00",
}  # fmt: skip


def made(folder, network="R8x0.25-8px", transform=None, *, names=("bird", "cat", "dog"), several=False,
         precision="fp32", result=None, scale=1.0):  # fmt: skip
    """The run's folder; `scale`: of the classifier's weights, so that answers are sure ones."""
    transform = transform or presets.bit_eval(8)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = choose.build(network, len(names), transform.size, zero_head=False).eval()
        for parameter in model.get_submodule(choose.head(model)).parameters():
            torch.nn.init.normal_(parameter, std=scale)
    about = {
        "format": 1, "run": "a run", "network": network, "num_classes": len(names), "global_batch": 16,
        "class_names": list(names), "several_labels": several, "transform": presets.as_fields(transform),
        "precision": precision, "step": 500,
    }  # fmt: skip
    place = checkpoint.save(folder / "checkpoints", model.state_dict(), {"step": 500}, about, keep=1)
    config = {"name": "xray", "from": "runs/cifar10", "seed": 3, "lr": 0.001, "data": {"train": "chest-train.h5",
              "test": str(packed(folder.parent))}}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder, model, place


def packed(folder):
    """A pack of 12 pictures of three classes, made once for a folder."""
    if not (folder / "images.h5").exists():
        pictures.folder(folder / "images")
        assert packing.run(folder / "images", folder / "images.h5", "--workers", "0") == 0
    return folder / "images.h5"


def normalized(images, transform):
    """Images in 0..1, (b, 3, h, w), as a network is given them."""
    mean, std = (
        torch.tensor(np.array(each, np.float32)).reshape(1, 3, 1, 1) for each in (transform.mean, transform.std)
    )
    return (images - mean) / std
