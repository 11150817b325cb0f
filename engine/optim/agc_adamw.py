"""AdamW with adaptive gradient clipping (AGC) and a moving average of the parameters (EMA)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from engine.optim import ops
from engine.optim.agc import AgcOptimizer, is_finite
from engine.optim.clipping import wide
from engine.optim.fused import ForwardWeights, Rule
from loaders.errors import UserError


class AgcAdamW(AgcOptimizer):
    """`torch.optim.AdamW` behind adaptive gradient clipping (arXiv 2102.06171, section 4.1), with a moving average.

    One step, the t-th, for each parameter p with gradient g:

        g = g * c / max(|g|, 1e-6)  where |g| > c,  c = clipping * max(|p|, clip_eps)      see `adaptive_clip`
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g²
        p = p - lr * (weight_decay * p + m / (1 - beta1^t) / (√(v / (1 - beta2^t)) + eps))    arXiv 1711.05101
        ema = ema_decay * ema + (1 - ema_decay) * p         where there is an ema_decay; at first it is p

    Gradients are not changed. The state dict is that of `torch.optim.AdamW` with an `ema` besides, and one of AdamW's
    loads. Averages are of parameters, not of a network's buffers; `averaged()` puts them in their place.

    Parameters, groups, `implementation`, `forward_weights`, GradScaler, CUDA graphs and `clipped()` are as in `AgcSgd`.
    Fused, clipping, AdamW, average and copies are one pass over memory. The average of a parameter has 32 bits at
    least, m and v its dtype.

    ValueError: hyper-parameters out of range. UserError: `fused` where it cannot be.
    """

    rule = Rule("agc_adamw_", ("exp_avg", "exp_avg_sq"), 640, ops.adamw_row, counts_steps=True, average="ema")
    clip_eps = "clip_eps"
    foreign = ("amsgrad", "maximize")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        clipping: float | None = 0.01,
        clip_eps: float = 1e-3,
        ema_decay: float | None = None,
        implementation: str = "auto",
        forward_weights: ForwardWeights | None = None,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "clipping": clipping,
            "clip_eps": clip_eps,
            "ema_decay": ema_decay,
        }
        super().__init__(params, defaults, implementation, forward_weights)

    def _check(self, group: dict[str, Any]) -> None:
        self._check_numbers(group, ("eps", "weight_decay", "clip_eps"))
        betas, decay = group["betas"], group["ema_decay"]
        if not (isinstance(betas, tuple | list) and len(betas) == 2 and all(_is_share(beta) for beta in betas)):
            raise ValueError(f"betas is {betas!r}; expected two numbers, 0 or more and less than 1")
        if decay is not None and not _is_share(decay):
            raise ValueError(
                f"ema_decay is {decay!r}; expected a number, 0 or more and less than 1, or None for no EMA"
            )

    def _check_saved(self, saved: dict[str, Any], own: dict[str, Any]) -> None:
        super()._check_saved(saved, own)
        if saved.get("decoupled_weight_decay") is False and saved["weight_decay"]:
            raise UserError("the optimizer state is of Adam, whose weight decay is part of the gradient; start afresh")

    def _choose(self) -> None:
        super()._choose()
        if self.implementation == "foreach":  # which counts for each parameter by itself, and on the host
            for state in self.state.values():
                if "step" in state:
                    state["step"] = torch.tensor(float(state["step"]))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any `AgcOptimizer`."""
        super().load_state_dict(state_dict)
        keys = (key for group in state_dict["param_groups"] for key in group["params"])
        params = (p for group in self.param_groups for p in group["params"])
        for key, param in zip(keys, params, strict=True):
            average = state_dict["state"].get(key, {}).get("ema")
            if average is not None:  # torch has made it the parameter's dtype
                self.state[param]["ema"] = average.to(device=param.device, dtype=wide(param.dtype), copy=True)

    def _step_foreach(self, group: dict[str, Any], params: list[Tensor]) -> None:
        grads = [g.to(p.dtype) for p, g in zip(params, self._clipped_gradients(group, params), strict=True)]
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            if "exp_avg" not in state:
                state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            if group["ema_decay"] is not None and "ema" not in state:
                state["ema"] = p.detach().to(wide(p.dtype), copy=True)
        adamw(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if group["ema_decay"] is not None:
            values = [p.detach().to(wide(p.dtype)) for p in params]
            torch._foreach_lerp_([state["ema"] for state in states], values, 1 - group["ema_decay"])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Encloses what is to see the averages, such as evaluation: they lie in the parameters, and in forward weights
        that copy these, which are as they were afterwards. UserError where there is none yet."""
        averages = {p: state["ema"] for p, state in self.state.items() if "ema" in state}
        if not averages:
            raise UserError("there is no average yet: set ema_decay, and take a step")
        weights = self._forward_weights
        places, values = list(averages), list(averages.values())
        for param, average in averages.items():
            if weights is not None and param in weights.copies:
                places.append(weights.copies[param])
                values.append(ops.eager_standardize(average, weights.eps) if param in weights.standardized else average)
        with torch.no_grad():
            kept = [place.clone() for place in places]
            for place, value in zip(places, values, strict=True):
                place.copy_(value)
        try:
            yield
        finally:
            with torch.no_grad():
                for place, before in zip(places, kept, strict=True):
                    place.copy_(before)


def _is_share(value: Any) -> bool:
    return is_finite(value) and 0 <= value < 1
