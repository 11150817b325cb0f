"""A network as an ONNX file, through torch's exporter; ONNX Runtime compares it."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from engine.exporting.deployed import INPUT, OUTPUTS
from engine.exporting.facts import Facts

FILE = "model.onnx"
OPSET = 21
"""The first whose group normalization has a scale and a shift for each channel, as ours does."""
_MOST = 1_900_000_000  # bytes of weights in the file itself: Protocol Buffers end at 2 GiB


def missing() -> str | None:
    """What has to be installed to write one; None: nothing."""
    absent = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    return f"ONNX needs {' and '.join(absent)}: pip install {' '.join(absent)}" if absent else None


def write(program: torch.export.ExportedProgram, facts: Facts, folder: Path) -> Path:
    """Write it into a folder; the file. Weights of more than 1.9 GB lie beside it, in FILE.data."""
    with warnings.catch_warnings(), _only_errors_of("torch.onnx", "onnxscript", "onnx_ir"):
        warnings.simplefilter("ignore")  # of what torch itself will change
        made = torch.onnx.export(
            program,
            input_names=[INPUT],
            output_names=OUTPUTS,
            opset_version=OPSET,
            dynamic_shapes=({0: "batch"},),
            dynamo=True,
            verbose=False,
        )
    assert made is not None, "torch.onnx.export returns a program where dynamo=True"
    made.model.metadata_props.update(facts.metadata())
    weights = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    made.save(folder / FILE, external_data=weights > _MOST)
    return folder / FILE


@contextmanager
def _only_errors_of(*names: str) -> Iterator[None]:
    """Some loggers pass on errors only."""
    before = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def read(file: Path) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """What `write` wrote, ready to run on the CPU; None where ONNX Runtime is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        probabilities, logits = session.run(list(OUTPUTS), {INPUT: images.contiguous().numpy()})
        return torch.from_numpy(probabilities), torch.from_numpy(logits)

    return run
