"""Weights files for tests, written out from the modules of a network (not from the names of its parameters)."""

import io

import numpy as np
import safetensors.torch
import torch

from engine.network import bit

NAME, CLASSES = "R11x0.25-32px", 6


def randomized(name=NAME, classes=CLASSES):
    model = bit.build(name, classes)
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    return model


def official_arrays(model):
    """The official file's names and layouts, written out from the modules (not from their names)."""

    def kernel(convolution):
        return convolution.weight.detach().permute(2, 3, 1, 0).contiguous().numpy()

    arrays = {"resnet/root_block/standardized_conv2d/kernel": kernel(model.root.conv)}

    def norm(prefix, gn):
        arrays[f"{prefix}/group_norm/gamma"] = gn.weight.detach().numpy()
        arrays[f"{prefix}/group_norm/beta"] = gn.bias.detach().numpy()

    for i, block in enumerate(model.body, start=1):
        for j, unit in enumerate(block, start=1):
            prefix = f"resnet/block{i}/unit{j:02d}"
            layers = {"a": (unit.gn1, unit.conv1), "b": (unit.gn2, unit.conv2), "c": (unit.gn3, unit.conv3)}
            for letter, (gn, convolution) in layers.items():
                norm(f"{prefix}/{letter}", gn)
                arrays[f"{prefix}/{letter}/standardized_conv2d/kernel"] = kernel(convolution)
            if unit.downsample is not None:
                arrays[f"{prefix}/a/proj/standardized_conv2d/kernel"] = kernel(unit.downsample)
    norm("resnet", model.head.gn)
    arrays["resnet/head/conv2d/kernel"] = kernel(model.head.conv)
    arrays["resnet/head/conv2d/bias"] = model.head.conv.bias.detach().numpy()
    return arrays


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def timm_state(model):
    """timm's names, likewise."""
    state = {"stem.conv.weight": model.root.conv.weight.detach()}

    def norm(prefix, gn):
        state[f"{prefix}.weight"], state[f"{prefix}.bias"] = gn.weight.detach(), gn.bias.detach()

    for i, block in enumerate(model.body):
        for j, unit in enumerate(block):
            prefix = f"stages.{i}.blocks.{j}"
            for k, gn in enumerate((unit.gn1, unit.gn2, unit.gn3), start=1):
                norm(f"{prefix}.norm{k}", gn)
            for k, convolution in enumerate((unit.conv1, unit.conv2, unit.conv3), start=1):
                state[f"{prefix}.conv{k}.weight"] = convolution.weight.detach()
            if unit.downsample is not None:
                state[f"{prefix}.downsample.conv.weight"] = unit.downsample.weight.detach()
    norm("norm", model.head.gn)
    norm("head.fc", model.head.conv)
    return state


def contents():
    """Format → bytes of a file."""
    model = randomized()
    state = model.state_dict()
    files = {}
    for name, write in {
        "safetensors": lambda file: file.write(safetensors.torch.save(state)),
        "pth": lambda file: torch.save(state, file),
        "legacy": lambda file: torch.save(state, file, _use_new_zipfile_serialization=False),
        "npz": lambda file: np.savez(file, **official_arrays(model)),
    }.items():
        buffer = io.BytesIO()
        write(buffer)
        files[name] = buffer.getvalue()
    return files
