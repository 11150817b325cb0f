"""The members of the BiT family as plain facts: depths, widths, and what each layer costs. Needs no torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.network.naming import timm_network
from loaders.errors import UserError


@dataclass(frozen=True)
class BitSpec:
    """What tells one member of the family from another."""

    depths: tuple[int, ...]
    """Bottleneck units in each block; every block after the first halves the resolution."""
    width: float
    """Factor on all channel counts: 64 in the root, 256, 512, 1024, 2048 out of the blocks, a quarter
    inside."""
    groups: int = 32
    """Groups of every group norm."""
    root: str = "imagenet"
    """`imagenet`: 7x7 stride 2 and max pool, a quarter of the input's side; `half`: 3x3 stride 2; `same`: 3x3
    stride 1."""

    @property
    def root_channels(self) -> int:
        return round(64 * self.width)

    @property
    def block_channels(self) -> tuple[int, ...]:
        """Output channels of each block."""
        return tuple(round(256 * self.width) * 2**i for i in range(len(self.depths)))


MEMBERS: dict[str, BitSpec] = {
    "R50x1": BitSpec((3, 4, 6, 3), 1),
    "R50x3": BitSpec((3, 4, 6, 3), 3),
    "R101x1": BitSpec((3, 4, 23, 3), 1),
    "R101x3": BitSpec((3, 4, 23, 3), 3),
    "R152x2": BitSpec((3, 8, 36, 3), 2),
    "R152x4": BitSpec((3, 8, 36, 3), 4),
    "R8x0.25-8px": BitSpec((1, 1), 0.25, groups=8, root="same"),
    "R11x0.25-32px": BitSpec((1, 1, 1), 0.25, groups=8, root="half"),
    "R20x0.25-32px": BitSpec((2, 2, 2), 0.25, groups=8, root="half"),
    "R20x0.5-32px": BitSpec((2, 2, 2), 0.5, groups=16, root="half"),
}
"""The published members, and small ones of our own, named alike: R layers x width - image side. Each takes
any size of at least its stride; the side in the name is the one whose detail its root keeps."""


_TIMM = "timm/"
_LAYERS = re.compile(r"(\d+)(?:x(\d+(?:\.\d+)?))?")


def member(name: str) -> BitSpec:
    """The member called `name`. UserError for an unknown name."""
    if name not in MEMBERS:
        raise UserError(f"no network is called {name!r}; the nearest is {_nearest(name)!r} of {', '.join(MEMBERS)}")
    return MEMBERS[name]


def is_timm(name: str) -> bool:
    """Whether a name is of a network of timm's, `timm/NAME`."""
    return name.startswith(_TIMM)


def check(name: str) -> None:
    """UserError unless there is a network of this name, of the family or of timm's."""
    if is_timm(name):
        timm_model(name)
    else:
        member(name)


def timm_model(name: str) -> tuple[Any, str]:
    """The module timm (https://github.com/huggingface/pytorch-image-models), imported now, and its name of `timm/NAME`.

    UserError where it has no such network, or where the network is one of the family.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError(f"model {name} needs timm: pip install timm") from error
    plain = name.removeprefix(_TIMM)
    if ours := {timm_network(each): each for each in MEMBERS}.get(plain.partition(".")[0]):
        raise UserError(f"{name} is {ours} of the BiT family; say {ours}")
    if not timm.is_model(plain):
        near = difflib.get_close_matches(plain, timm.list_models(), 1, 0.0)[0]
        raise UserError(f"timm has no network {plain!r}; the nearest is {_TIMM}{near}")
    return timm, plain


def _nearest(name: str) -> str:
    """The member that a name of another library means, such as resnet50: of its layers, and near its width of 1."""
    known = {member: _LAYERS.findall(member)[0] for member in MEMBERS}
    for layers, width in _LAYERS.findall(name):
        alike = [member for member, (its_layers, _) in known.items() if its_layers == layers]
        if alike:
            return min(alike, key=lambda member: abs(float(known[member][1] or 1) - float(width or 1)))
    return difflib.get_close_matches(name, MEMBERS, 1, 0.0)[0]


@dataclass(frozen=True)
class Layer:
    """A layer with parameters, and its cost for one image."""

    name: str
    parameters: int
    macs: int
    """Multiply-adds of the forward pass; 0 for norms, which are bound by memory."""
    backward_macs: int
    """As many for the weights' gradients, and as many for the inputs', which the root does not need."""


def layers(name: str, num_classes: int, size: int = 224) -> Iterator[Layer]:
    """The layers of a network on square images of `size` pixels, in the order in which they are registered.

    UserError for an unknown name.
    """
    spec = member(name)

    def conv(label: str, cin: int, cout: int, kernel: int, side: int) -> Layer:
        macs = cin * cout * kernel**2 * side**2
        return Layer(label, cin * cout * kernel**2, macs, 2 * macs)

    kernel = 7 if spec.root == "imagenet" else 3
    side = size if spec.root == "same" else (size - 1) // 2 + 1
    cin = spec.root_channels
    root = conv("root.conv", 3, cin, kernel, side)
    yield Layer(root.name, root.parameters, root.macs, root.macs)
    if spec.root == "imagenet":
        side = (side - 1) // 2 + 1
    for i, (depth, cout) in enumerate(zip(spec.depths, spec.block_channels, strict=True), start=1):
        mid = cout // 4
        for j in range(1, depth + 1):
            unit = f"body.block{i}.unit{j:02d}"
            stride = 2 if i > 1 and j == 1 else 1
            before, side = side, (side - 1) // stride + 1
            yield Layer(f"{unit}.gn1", 2 * cin, 0, 0)
            yield conv(f"{unit}.conv1", cin, mid, 1, before)
            yield Layer(f"{unit}.gn2", 2 * mid, 0, 0)
            yield conv(f"{unit}.conv2", mid, mid, 3, side)
            yield Layer(f"{unit}.gn3", 2 * mid, 0, 0)
            yield conv(f"{unit}.conv3", mid, cout, 1, side)
            if stride != 1 or cin != cout:
                yield conv(f"{unit}.downsample", cin, cout, 1, side)
            cin = cout
    yield Layer("head.gn", 2 * cin, 0, 0)
    head = conv("head.conv", cin, num_classes, 1, 1)
    yield Layer(head.name, head.parameters + num_classes, head.macs, head.backward_macs)


@dataclass(frozen=True)
class Cost:
    """What a network costs, by counting."""

    parameters: int
    """Trainable parameters."""
    forward_flops: int
    """Of one image's forward pass: 2 for each multiply-add of the convolutions; the rest is bound by
    memory."""
    training_flops: int
    """Of one image's forward and backward pass, which is as many again for the weights' gradients, and for
    the inputs' too, but for the root, whose input needs none."""


def cost(name: str, num_classes: int, size: int = 224) -> Cost:
    """The cost of `bit.build(name, num_classes)` on square images of `size` pixels, without building it.

    UserError for an unknown name.
    """
    found = list(layers(name, num_classes, size))
    forward = 2 * sum(layer.macs for layer in found)
    backward = 2 * sum(layer.backward_macs for layer in found)
    return Cost(sum(layer.parameters for layer in found), forward, forward + backward)
