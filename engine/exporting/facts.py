"""What travels with an exported network: its classes, how images are prepared for it, where it comes from."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.predicting.tuned import Tuned
from loaders.errors import UserError, reading
from loaders.pipelines.transform import Transform, as_fields

CALIBRATION = "temperature.json"
"""In a run's folder: what the logits are divided by, `{"temperature": 1.5}`, perhaps with the SHA-256 of the `weights`
that it was fitted to."""
_WINDOWS = {
    "center_crop": "the short side resized to {resize} pixels, the centre of {size} x {size} cropped",
    "resize": "resized to {size} x {size} pixels, whatever its aspect ratio",
    "xray": "turned to gray, the centre square resized to {size} x {size} pixels, gray as all three channels",
}


@dataclass(frozen=True)
class Facts:
    """Of one tuned network."""

    network: str
    classes: tuple[str, ...]
    several_labels: bool  # at once for an image: then each has a probability of its own
    transform: Transform
    temperature: float | None  # None: not calibrated
    run: str
    weights: str  # SHA-256 of the file that they come from
    trained_in: str  # bf16, fp32, tf32, fp16

    @property
    def input(self) -> str:
        """What the network is given."""
        side = self.transform.size
        return f"images: (batch, 3, {side}, {side}) float32, RGB from 0 to 1, not normalized: that is inside"

    @property
    def preprocessing(self) -> str:
        """What is done to an image before that, in words."""
        where = _WINDOWS[self.transform.kind].format(size=self.transform.size, resize=self.transform.before_crop)
        how = {"linear": "bilinear with antialiasing", "area": "by means over areas where it becomes smaller"}
        return f"turned as its EXIF orientation says; {where} ({how[self.transform.downscale]}); divided by its white"

    @property
    def output(self) -> str:
        """What it answers."""
        each = "of each label by itself" if self.several_labels else "of the classes, which add up to 1"
        by = self.temperature
        how = "not calibrated" if by is None else f"calibrated: logits divided by {by:g}"
        return f"probabilities: (batch, {len(self.classes)}) {each}; logits: the same before that; {how}"

    def metadata(self) -> dict[str, str]:
        """All of it as names and texts; JSON where it has structure."""
        return {
            "network": self.network,
            "classes": json.dumps(self.classes, ensure_ascii=False),
            "several_labels": json.dumps(self.several_labels),
            "input": self.input,
            "preprocessing": self.preprocessing,
            "transform": json.dumps(as_fields(self.transform)),
            "output": self.output,
            "temperature": json.dumps(self.temperature),
            "run": self.run,
            "weights_sha256": self.weights,
            "trained_in": f"{self.trained_in}, exported in float32",
        }


def of(tuned: Tuned, calibration: Path | None = None) -> Facts:
    """The facts of a run's network. `calibration`: a file that says its temperature; None: that of the run's folder,
    where there is one. UserError for one that cannot be read, or is of other weights."""
    file = calibration or tuned.path.resolve().parents[1] / CALIBRATION
    return Facts(
        network=str(tuned.about["network"]),
        classes=tuned.names,
        several_labels=tuned.many,
        transform=tuned.transform,
        temperature=temperature(file, tuned.checksum) if calibration or file.is_file() else None,
        run=str(tuned.about.get("run", "")),
        weights=tuned.checksum,
        trained_in=tuned.precision,
    )


def temperature(file: Path, weights: str) -> float:
    """What a file says that logits are divided by: one as `CALIBRATION`, or the about.json that `engine.evaluate --out
    --calibrate` writes of one file of predictions."""
    with reading(file, "a calibration", "name what engine.evaluate --calibrate wrote"):
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if "temperature" not in found and "predictions" in found:
            (found,) = found["predictions"]
        value, of_weights = found["temperature"], found.get("weights", weights)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{file} says temperature {value!r}; expected a number above 0; fit it again")
    if of_weights != weights:
        raise UserError(f"{file} was fitted to other weights than the run has now; fit it again, or remove it")
    return float(value)
