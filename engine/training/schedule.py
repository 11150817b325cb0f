"""Learning rates as pure functions of the step."""

import math
from bisect import bisect_right

from loaders.errors import UserError

KINDS = ("step", "cosine", "constant")


def learning_rate(
    step: int,
    *,
    kind: str,
    peak: float,
    total_steps: int,
    warmup_steps: int = 0,
    milestones: tuple[int, ...] = (),
    factor: float = 0.1,
    ahead: int = 0,
) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    Warm-up is linear from 0: `peak * step / warmup_steps` while `step < warmup_steps`, so the peak is reached
    at step `warmup_steps` (and the first step, at rate 0, only fills the momentum), as in BiT's published
    code. `ahead` steps of it are left out: with 1 it starts at `peak / warmup_steps`. Then

    * `step`: `peak * factor**k`, where `k` milestones are at or before `step` (as torch's MultiStepLR);
    * `cosine`: `peak * (1 + cos(π t)) / 2`, `t` running from 0 at the end of warm-up to 1 at `total_steps`
      (arXiv 1608.03983, equation 5, without restarts);
    * `constant`: `peak`.

    Steps past the end keep the last value. UserError: unknown kind, negative or unordered steps, warm-up that
    outlasts the run or the first milestone.
    """
    _check(kind, step, total_steps, warmup_steps, milestones)
    if step < warmup_steps:
        return peak * min(step + ahead, warmup_steps) / warmup_steps
    if kind == "step":
        return peak * factor ** bisect_right(milestones, step)
    if kind == "cosine":
        if step >= total_steps:
            return 0.0
        progress = (step - warmup_steps) / (total_steps - warmup_steps)
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    return peak


def linear_scaling(base_lr: float, base_batch: int, global_batch: int) -> float:
    """The peak rate for a global batch, in proportion to it (arXiv 1706.02677, section 2.1)."""
    if base_batch < 1 or global_batch < 1:
        raise UserError(f"batch sizes are {base_batch} (base) and {global_batch} (global); expected 1 or more")
    return base_lr * global_batch / base_batch


def _check(kind: str, step: int, total_steps: int, warmup_steps: int, milestones: tuple[int, ...]) -> None:
    if kind not in KINDS:
        raise UserError(f"no schedule is called {kind!r}; there are: {', '.join(KINDS)}")
    if step < 0 or not 0 <= warmup_steps <= total_steps:
        raise UserError(
            f"step {step}, warm-up of {warmup_steps} and {total_steps} steps in total do not fit: expected a "
            "step of 0 or more and a warm-up no longer than the run; lengthen the run or shorten the warm-up"
        )
    if kind == "step" and milestones:
        if any(a >= b for a, b in zip(milestones, milestones[1:], strict=False)):
            raise UserError(f"milestones {list(milestones)} are not in rising order")
        if milestones[0] < warmup_steps:
            raise UserError(
                f"the first milestone, step {milestones[0]}, comes before the end of the warm-up at step "
                f"{warmup_steps}; shorten the warm-up or move the milestone"
            )
