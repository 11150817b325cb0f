"""SGD with momentum and adaptive gradient clipping (AGC)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from engine import compiled
from engine.optim import fused, ops
from engine.optim.clipping import adaptive_clip, wide
from engine.optim.fused import ForwardWeights
from loaders.errors import UserError


class AgcSgd(torch.optim.Optimizer):
    """`torch.optim.SGD` behind adaptive gradient clipping (arXiv 2102.06171, section 4.1).

    One step, for each parameter p with gradient g and momentum buffer m:

        g = g * c / max(|g|, 1e-6)  where |g| > c,  c = clipping * max(|p|, eps)      see `adaptive_clip`
        g = g + weight_decay * p
        m = momentum * m + g        (m = g in the first step)
        p = p - lr * (g + momentum * m  if nesterov else  m)

    Gradients are not changed. The state dict is that of `torch.optim.SGD`, and one of its state dicts loads.

    `params`: parameters, or groups of them, best from `named_groups`. A group may override each
    hyper-parameter; `clipping` None means no clipping. `lr` may be a 0-D tensor. Parameters and gradients may
    be of different floating dtypes; the arithmetic is in fp32 at least, and momentum has the parameter's
    dtype.

    `implementation`: `fused`, the operator of csrc/, one call for the whole model; `foreach`, PyTorch's list
    operations; `auto`, fused where it is built and takes these parameters: float32, on one device, each row
    in one piece of memory. What was chosen is in the attribute of that name. All write and read the same
    state dict.

    With `torch.amp.GradScaler` use `scaler.step(optimizer)`. The fused step unscales, and skips itself on
    overflow, on the device; with foreach the scaler does that, and waits for the device.

    A fused step does not wait for a GPU and can be captured in a CUDA graph once a step was done outside: the
    graph has the learning rate of its capture unless `lr` is a tensor on the GPU. `forward_weights`, fused
    only, are copies of the parameters that each step writes in the same pass.

    ValueError: hyper-parameters out of range. UserError: `fused` where it cannot be.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = True,
        clipping: float | None = 0.01,
        eps: float = 1e-3,
        implementation: str = "auto",
        forward_weights: ForwardWeights | None = None,
    ):
        if implementation not in ("auto", "fused", "foreach"):
            raise ValueError(f"implementation is {implementation!r}; expected 'fused', 'foreach', or 'auto' to choose")
        if forward_weights is not None and implementation == "auto":
            implementation = "fused"
        if forward_weights is not None and implementation == "foreach":
            raise UserError("forward weights are written by the fused implementation only; choose fused or auto")
        self._wanted = implementation
        self._forward_weights = forward_weights
        self._tables: fused.Tables | None = None
        self._plan: fused.Plan | None = None
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "clipping": clipping,
            "eps": eps,
        }
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        kept = {"_wanted": self._wanted, "_forward_weights": self._forward_weights}
        return super().__getstate__() | kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tables = self._plan = None
        self._choose()

    def _choose(self) -> None:
        """Settles on an implementation for the parameters there are."""
        params = [p for group in self.param_groups for p in group["params"]]
        problem = fused.problem_with(params)
        if self._wanted == "fused":
            if problem is not None:
                raise UserError(f"the fused optimizer does not take this model: {problem}; choose foreach or auto")
            ops.require(params[0].device)
        chosen = self._wanted != "foreach" and problem is None and compiled.supports(params[0].device, "agc_sgd_")
        self.implementation = "fused" if chosen else "foreach"
        # What torch.amp.GradScaler asks for: the scale and the overflow flag are then left on the device.
        self._step_supports_amp_scaling = chosen

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters; ValueError where the group's hyper-parameters (or the defaults) are out of
        range."""
        # torch's own method in a wrapper that imports its compiler, hundreds of files for each rank, only to say that
        # this is not to be compiled. What it wraps is called instead, where it is there.
        adds = torch.optim.Optimizer.add_param_group
        getattr(adds, "__wrapped__", adds)(self, param_group)
        try:
            _check(self.param_groups[-1])
            self._choose()
        except ValueError:
            self.param_groups.pop()
            raise
        self._plan = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from the state of an `AgcSgd` or a `torch.optim.SGD`, whichever implementation wrote it.

        Settings that the state does not have stay as they are. UserError where it is of other parameters, or
        of an SGD that does something this optimizer cannot.
        """
        groups = []
        for saved, own in zip(state_dict["param_groups"], self.param_groups, strict=False):
            _check_saved(saved, own)
            # Not own's parameters, and not SGD's switches for its own code.
            kept = {key: value for key, value in own.items() if key != "params"}
            kept.update({key: value for key, value in saved.items() if key in own})
            groups.append(kept)
        groups.extend(state_dict["param_groups"][len(groups) :])
        super().load_state_dict({"state": state_dict["state"], "param_groups": groups})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on all parameters that have a gradient. Returns what `closure` does, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.implementation == "fused":
            self._step_fused()
        else:
            for group in self.param_groups:
                self._step_foreach(group)
        return loss

    def _step_fused(self) -> None:
        if self._plan is None or not self._plan.fits(self.param_groups, self.state):
            self._plan = fused.Plan(self.param_groups, self.state, self._forward_weights)
        if not self._plan.members:
            return
        device = self._plan.members[0].param.device
        if self._tables is None or self._tables.device != device:
            self._tables = fused.Tables(device)
        lr, hyper = self._tables.current(self.param_groups, self._forward_weights)
        self._plan.run(lr, hyper, getattr(self, "grad_scale", None), getattr(self, "found_inf", None))

    def _step_foreach(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        if any(p.grad.is_sparse for p in params):
            raise RuntimeError("AgcSgd does not support sparse gradients; use dense ones")
        # New tensors, so that what follows may be in place and the gradients stay as they are.
        grads = [p.grad.to(wide(p.dtype), copy=group["clipping"] is None) for p in params]
        if group["clipping"] is not None:
            grads = adaptive_clip(params, grads, group["clipping"], group["eps"])
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


def named_groups(
    model: nn.Module, weight_decay: float, no_decay: str = "none", head: str = "head.conv"
) -> list[dict[str, Any]]:
    """Parameter groups for `AgcSgd`, told apart by parameter names alone.

    The classifier, the module named `head`, is not clipped. `no_decay` says what has no weight decay: `none`
    of the parameters, or `norm_bias`: group norms' and all biases. Each group has `params`, their `names`,
    `weight_decay`, and for the head `clipping` None; empty ones are left out, and so are frozen parameters.
    UserError: another `no_decay`, or a model without that head.
    """
    if no_decay not in ("none", "norm_bias"):
        raise UserError(f"no_decay is {no_decay!r}; expected none or norm_bias")
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for is_head in (False, True):
        for decays in (True, False):
            groups[is_head, decays] = {
                "params": [],
                "names": [],
                "weight_decay": weight_decay if decays else 0.0,
            } | ({"clipping": None} if is_head else {})
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = no_decay == "none" or not _is_norm_or_bias(name)
            group = groups[name.startswith(head + "."), decays]
            group["params"].append(parameter)
            group["names"].append(name)
    if not any(group["params"] for (is_head, _), group in groups.items() if is_head):
        raise UserError(f"no trainable parameter is in a module {head!r}; the classifier is known by name")
    return [group for group in groups.values() if group["params"]]


def _is_norm_or_bias(name: str) -> bool:
    module, _, leaf = name.rpartition(".")
    return leaf == "bias" or module.rpartition(".")[2].startswith("gn")


def _check(group: dict[str, Any]) -> None:
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr is a tensor of shape {tuple(lr.shape)}; expected one number")
    elif not lr >= 0:
        raise ValueError(f"lr is {lr}; expected 0 or more")
    for key in ("momentum", "weight_decay", "eps"):
        if not group[key] >= 0:
            raise ValueError(f"{key} is {group[key]}; expected 0 or more")
    if group["clipping"] is not None and not group["clipping"] > 0:
        raise ValueError(f"clipping is {group['clipping']}; expected more than 0, or None for no clipping")
    if group["nesterov"] and group["momentum"] == 0:
        raise ValueError("nesterov needs a momentum over 0; set nesterov=False for plain SGD")
    for p in group["params"]:
        if not p.is_floating_point():
            raise ValueError(f"AgcSgd takes real floating-point parameters; found {p.dtype}")


def _check_saved(saved: dict[str, Any], own: dict[str, Any]) -> None:
    for key in ("dampening", "maximize"):
        if saved.get(key):
            raise UserError(f"the optimizer state has {key}={saved[key]}, which AgcSgd does not do; start afresh")
    for before, now in zip(saved.get("names", ()), own.get("names", ()), strict=False):
        if before != now:
            raise UserError(
                f"the optimizer state is of other parameters: it has {before} where this model has {now}; "
                "resume with the network and the no_decay choice that wrote it"
            )
