"""SGD with momentum and adaptive gradient clipping (AGC)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from engine.optim import ops
from engine.optim.agc import AgcOptimizer
from engine.optim.fused import ForwardWeights, Rule


class AgcSgd(AgcOptimizer):
    """`torch.optim.SGD` behind adaptive gradient clipping (arXiv 2102.06171, section 4.1).

    One step, for each parameter p with gradient g and momentum buffer m:

        g = g * c / max(|g|, 1e-6)  where |g| > c,  c = clipping * max(|p|, eps)      see `adaptive_clip`
        g = g + weight_decay * p
        m = momentum * m + g        (m = g in the first step)
        p = p - lr * (g + momentum * m  if nesterov else  m)

    Gradients are not changed. The state dict is that of `torch.optim.SGD`, and one of its state dicts loads.

    `params`: parameters, or groups of them, best from `named_groups`, since classifiers are not clipped. A group
    may override each hyper-parameter; `clipping` None means no clipping. `lr` may be a 0-D tensor. Parameters and
    gradients may be of different floating dtypes; the arithmetic is in fp32 at least, and momentum has the
    parameter's dtype.

    `implementation`: `fused`, the operator of csrc/, one call for the whole model; `foreach`, PyTorch's list
    operations; `auto`, fused where it is built and takes these parameters: float32, on one device, each row
    in one piece of memory. What was chosen is in the attribute of that name. All write and read the same
    state dict.

    With `torch.amp.GradScaler` use `scaler.step(optimizer)`. The fused step unscales, and skips itself on
    overflow, on the device; with foreach the scaler does that, and waits for the device.

    A fused step does not wait for a GPU and can be captured in a CUDA graph once a step was done outside: the
    graph has the learning rate of its capture unless `lr` is a tensor on the GPU. `forward_weights`, fused
    only, are copies of the parameters that each step writes in the same pass.

    `clipped()` says how many rows of each parameter were clipped.

    ValueError: hyper-parameters out of range. UserError: `fused` where it cannot be.
    """

    rule = Rule("agc_sgd_", ("momentum_buffer",), 960, ops.hyper_row)
    clip_eps = "eps"
    foreign = ("dampening", "maximize")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = True,
        clipping: float | None = 0.01,
        eps: float = 1e-3,
        implementation: str = "auto",
        forward_weights: ForwardWeights | None = None,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "clipping": clipping,
            "eps": eps,
        }
        super().__init__(params, defaults, implementation, forward_weights)

    def _check(self, group: dict[str, Any]) -> None:
        self._check_numbers(group, ("momentum", "weight_decay", "eps"))
        if group["nesterov"] and group["momentum"] == 0:
            raise ValueError("nesterov needs a momentum over 0; set nesterov=False for plain SGD")

    def _step_foreach(self, group: dict[str, Any], params: list[Tensor]) -> None:
        grads = self._clipped_gradients(group, params)
        if group["weight_decay"] != 0:
            torch._foreach_add_(grads, params, alpha=group["weight_decay"])
        updates = self._momentum(params, grads, group["momentum"], group["nesterov"])
        if isinstance(group["lr"], Tensor):
            # A tensor cannot be `alpha` without the host waiting for its value.
            torch._foreach_sub_(params, torch._foreach_mul(updates, group["lr"]))
        else:
            torch._foreach_add_(params, updates, alpha=-group["lr"])

    def _momentum(self, params: list[Tensor], grads: list[Tensor], momentum: float, nesterov: bool) -> list[Tensor]:
        if momentum == 0:
            return grads
        old_buffers, old_grads = [], []
        for p, g in zip(params, grads, strict=True):
            state = self.state[p]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.empty_like(p).copy_(g)
            else:
                old_buffers.append(state["momentum_buffer"])
                old_grads.append(g)
        if old_buffers:
            torch._foreach_mul_(old_buffers, momentum)
            torch._foreach_add_(old_buffers, old_grads)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        if nesterov:
            torch._foreach_add_(grads, buffers, alpha=momentum)
            return grads
        return buffers
