"""Where a run is, for people: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import timedelta

from tqdm import tqdm


class Progress:
    """Says where a run is: a bar on a terminal, a line per logged step elsewhere. Rank 0 only.

    The bar is drawn with the first step: an empty one would take the next line that is printed.
    """

    def __init__(self, first_step: int, total_steps: int, global_batch: int, speaks: bool) -> None:
        self._first, self._total, self._batch, self._speaks = first_step, total_steps, global_batch, speaks
        self._start = time.perf_counter()
        self._draws = speaks and sys.stderr.isatty()
        self._bar: tqdm | None = None

    def advance(self, images: int) -> None:
        if self._draws and self._bar is None:
            total, before = self._total * self._batch, self._first * self._batch
            self._bar = tqdm(total=total, initial=before, unit="img", unit_scale=True, dynamic_ncols=True)
        if self._bar is not None:
            self._bar.update(images)

    def report(self, step: int, values: Mapping[str, float], saved: str = "") -> None:
        """The newest training metrics, and what was saved since the last."""
        if self._bar is not None:
            self._bar.set_postfix(step=step, loss=f"{values['loss']:.4f}", lr=f"{values['learning_rate']:.2g}")
        elif self._speaks:
            each = (time.perf_counter() - self._start) / max(step - self._first, 1)
            left = timedelta(seconds=round(each * (self._total - step)))
            print(
                f"step {step}/{self._total}  loss {values['loss']:.4f}  lr {values['learning_rate']:.4g}  "
                f"{values['images_per_second']:.0f} images/s  data wait {values['data_wait']:.0%}  "
                f"{saved + '  ' if saved else ''}left {left}",
                flush=True,
            )

    def say(self, text: str) -> None:
        """A line for people."""
        if self._speaks:
            self._bar.write(text, file=sys.stdout) if self._bar is not None else print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Count:
    """How much of some work without steps is done: a bar on a terminal, elsewhere a line at times. Rank 0 only."""

    def __init__(self, total: int, speaks: bool, unit: str = "images", every_s: float = 10.0) -> None:
        self._total, self._unit, self._speaks, self._every = total, unit, speaks, every_s
        self._done = 0
        self._start = self._said = time.perf_counter()
        self._bar = (
            tqdm(total=total, unit=f" {unit}", unit_scale=True, dynamic_ncols=True)
            if speaks and sys.stderr.isatty()
            else None
        )

    def advance(self, count: int) -> None:
        """`count` more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._speaks and (now := time.perf_counter()) - self._said >= self._every:
            self._said = now
            left = timedelta(seconds=round((self._total - self._done) * (now - self._start) / max(self._done, 1)))
            print(f"{self._done:,} of {self._total:,} {self._unit}  {self.rate:,.0f} {self._unit}/s  left {left}",
                  flush=True)  # fmt: skip

    @property
    def rate(self) -> float:
        """So many a second."""
        return self._done / max(time.perf_counter() - self._start, 1e-9)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
