"""Steps whose gradients are not finite: told on the device, so that the step changes nothing; counted; read later."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch

_LATER = 2
"""Steps after which the host looks: by then the device has long done them, so it does not wait."""


@dataclass(frozen=True)
class BadStep:
    """A step with which more than are allowed were bad in a row."""

    step: int  # completed steps, with it
    in_a_row: int
    sample_ids: list[torch.Tensor]  # of this rank's micro-batches


class BadSteps:
    """Looks at the gradients of each step, which are the same on all ranks: so is all that follows from them."""

    def __init__(self, device: torch.device, allowed: int) -> None:
        self._allowed = allowed
        self._later = _LATER if device.type == "cuda" else 0
        self._counts = torch.zeros(2, device=device)  # in a row; since the last reading
        # Where nobody looks, as in a dry run, old ones go.
        self._copies: deque[tuple[int, torch.Tensor, torch.cuda.Event | None, list[torch.Tensor]]] = deque(maxlen=8)

    def look(self, grads: torch.Tensor) -> torch.Tensor:
        """Whether the gradients of a step, summed over the ranks, are bad: (1,) float32, 1 or 0, on their device.

        A sum is finite where all numbers are.
        """
        bad = (~grads.sum().isfinite()).float()
        self._counts += 1
        self._counts[0] *= bad
        self._counts[1] -= 1 - bad
        return bad.reshape(1)

    def note(self, step: int, sample_ids: list[torch.Tensor]) -> None:
        """That step was looked at: the host will read what was found when the device has long done it."""
        copy, event = self._counts[0].clone(), None
        if self._later:
            copy = torch.empty((), pin_memory=True).copy_(copy, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._copies.append((step, copy, event, sample_ids))

    def beyond(self, *, all_steps: bool) -> BadStep | None:
        """The first step that was one too many, if one was; `all_steps`: the newest ones too, waiting for them."""
        while len(self._copies) > (0 if all_steps else self._later):
            step, copy, event, sample_ids = self._copies.popleft()
            if event is not None:
                event.synchronize()
            if copy.item() > self._allowed:
                return BadStep(step, int(copy.item()), sample_ids)
        return None

    def read(self) -> int:
        """How many were bad since it was last asked. Waits for the device."""
        found = int(self._counts[1].item())
        self._counts[1] = 0
        return found
