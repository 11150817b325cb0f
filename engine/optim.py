"""SGD with momentum and adaptive gradient clipping (AGC)."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loaders.errors import UserError

TINY_NORM = 1e-6
"""Gradient norms below this count as this in the quotient, as in the published AGC code."""


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

    With `torch.amp.GradScaler` use `scaler.step(optimizer)`: the scaler unscales, and skips the step on
    overflow.

    `implementation`: `foreach`, PyTorch's list operations; `auto`, the fastest there is for these parameters.
    What was chosen is in the attribute of that name. ValueError: hyper-parameters out of range.
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
    ):
        if implementation not in ("auto", "foreach"):
            raise ValueError(f"implementation is {implementation!r}; expected 'foreach', or 'auto' to choose")
        self.implementation = "foreach"
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "clipping": clipping,
            "eps": eps,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters; ValueError where the group's hyper-parameters (or the defaults) are out of
        range."""
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

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
    def step(self, closure=None):
        """One step on all parameters that have a gradient. Returns what `closure` does, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_foreach(group)
        return loss

    def _step_foreach(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        if any(p.grad.is_sparse for p in params):
            raise RuntimeError("AgcSgd does not support sparse gradients; use dense ones")
        # New tensors, so that what follows may be in place and the gradients stay as they are.
        grads = [p.grad.to(_wide(p.dtype), copy=group["clipping"] is None) for p in params]
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

    def _momentum(
        self, params: list[Tensor], grads: Sequence[Tensor], momentum: float, nesterov: bool
    ) -> Sequence[Tensor]:
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


def adaptive_clip(params: Sequence[Tensor], grads: Sequence[Tensor], clipping: float, eps: float) -> list[Tensor]:
    """The gradients, each unit scaled down to a norm of `clipping * max(norm of its parameters, eps)` at
    most.

    A unit is an output row (`p[i]`) of a parameter with 2 or more dimensions, and the whole of one with
    fewer. The quotient is `max_norm / max(grad_norm, 1e-6)`, used only where `grad_norm > max_norm`. Norms
    are in fp32 at least: a gradient row with a norm over 1.8e19 counts as infinite and becomes zero. Returns
    new tensors, in the gradients' dtypes. arXiv 2102.06171, equation 3, with the details of its published
    code.
    """
    if not grads:
        return []
    param_norms = [_unit_norm(p) for p in params]
    grad_norms = [_unit_norm(g) for g in grads]
    limits = torch._foreach_mul(torch._foreach_maximum(param_norms, eps), clipping)
    quotients = torch._foreach_div(limits, torch._foreach_maximum(grad_norms, TINY_NORM))
    # `where` and not a minimum with 1: below TINY_NORM the quotient is not the test.
    scales = [
        torch.where(norm > limit, quotient, 1.0)
        for norm, limit, quotient in zip(grad_norms, limits, quotients, strict=True)
    ]
    return [(g * scale).to(g.dtype) for g, scale in zip(grads, scales, strict=True)]


def adaptive_clip_(params: Sequence[Tensor], grads: Sequence[Tensor], clipping: float, eps: float) -> None:
    """`adaptive_clip` in place."""
    for g, clipped in zip(grads, adaptive_clip(params, grads, clipping, eps), strict=True):
        g.copy_(clipped)


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


def _unit_norm(x: Tensor) -> Tensor:
    """(o, ...) → (o, 1, ...), and 0-D or 1-D → 0-D: the units' 2-norms."""
    dims = tuple(range(1, x.ndim)) if x.ndim > 1 else None
    return torch.linalg.vector_norm(x, dim=dims, keepdim=x.ndim > 1, dtype=_wide(x.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


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
