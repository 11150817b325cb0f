"""The training steps of others: timm's BiT, eager and compiled, and torchvision's ResNet-50 with batch norm.

Each as its users write it: autocast, channels-last, cross entropy, torch's fused SGD with momentum; timm's with its
adaptive gradient clipping, torchvision's without clipping or standardization.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

TIMM = {"R50x1": "resnetv2_50x1_bit", "R101x1": "resnetv2_101x1_bit", "R152x4": "resnetv2_152x4_bit"}
TORCHVISION = {"R50x1": "resnet50", "R101x1": "resnet101"}
EAGER, COMPILED, BATCH_NORM = "timm eager", "timm compiled", "torchvision batch norm"
SGD: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True, "fused": True}
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def steps(
    network: str, classes: int, precision: str, memory: torch.memory_format, images: Tensor, labels: Tensor
) -> dict[str, Callable[[], Any]]:
    """A training step of each peer that is installed and has a counterpart of the network, on the same batch.

    images: (b, 3, h, w) on the device to train on; labels: (b,) int64 below `classes`; memory: order of the weights.
    """
    how = precision, memory, images, labels
    found: dict[str, Callable[[], Any]] = {}
    if (name := TIMM.get(network)) and (timm := _import("timm")):
        from timm.utils.agc import adaptive_clip_grad

        for label, compiled in ((EAGER, False), (COMPILED, True)):
            model = timm.create_model(name, num_classes=classes)
            head = {id(p) for p in model.get_classifier().parameters()}

            def clip(model: nn.Module = model, head: set[int] = head) -> None:
                adaptive_clip_grad([p for p in model.parameters() if id(p) not in head], clip_factor=0.01, eps=1e-3)

            found[label] = _step(model, *how, clip, compiled)
    if (name := TORCHVISION.get(network)) and (torchvision := _import("torchvision")):
        model = getattr(torchvision.models, name)(num_classes=classes)
        found[BATCH_NORM] = _step(model, *how, lambda: None, compiled=False)
    return found


def _import(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        return None


def _step(
    model: nn.Module,
    precision: str,
    memory: torch.memory_format,
    images: Tensor,
    labels: Tensor,
    clip: Callable[[], None],
    compiled: bool,
) -> Callable[[], Any]:
    device = images.device
    model = model.to(device).to(memory_format=memory).train()
    forward: Callable[[Tensor], Tensor] = torch.compile(model) if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    half = _AUTOCAST.get(precision)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=half) if half else nullcontext():
            logits = forward(images)
        loss = nn.functional.cross_entropy(logits.float(), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip()
        scaler.step(optimizer)
        scaler.update()

    return step
