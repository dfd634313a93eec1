"""Muon for matrices and AdamW for all else, in one optimizer that a CUDA graph can hold; and clipping that adapts.

    from mamba_ginr.optimizers import AdaptiveClip, Muon

    optimizer = Muon([{"params": matrices, "muon": True}, {"params": others}], lr=2e-3)
    clip = AdaptiveClip(2.0, device)  # at twice the usual norm
    clip(parameters)  # after the backward pass

``torch.optim.Muon`` gives the same weights, one matrix at a time and with the learning rate as a number, which a graph
cannot change from step to step. Here matrices of one shape are one stack, stacks of one shorter side are one batch of
products, and the rate may be a tensor.
"""

import math

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)  # a x + b x³ + c x⁵ takes singular values from (0, 1] to 0.7 … 1.2 in five steps


def orthogonalise(updates: list[Tensor], dtype: torch.dtype = torch.bfloat16, steps: int = 5) -> list[Tensor]:
    """The nearest matrices with singular values near 1, by Newton–Schulz iterations (Jordan 2024, "Muon").

    Args:
        updates: stacks (n, rows, columns), any float dtype and scale. On a GPU those of one shorter side are multiplied
            together, the longer side filled up with zeros, which stay zeros.
        dtype: of the products; bfloat16 is exact enough, as the result need not be.

    Returns:
        Stacks of the same shapes in ``dtype``; of U S Vᵀ about U Vᵀ.
    """
    a, b, c = QUINTIC
    results = [None] * len(updates)
    wide = [u if u.shape[1] <= u.shape[2] else u.mT for u in updates]
    # A GPU multiplies zeros faster than it starts another product; a processor does not.
    kinds = [w.shape[1:2] if w.is_cuda else w.shape[1:] for w in wide]
    for kind in sorted(set(kinds)):
        members = [i for i, k in enumerate(kinds) if k == kind]
        counts, longest = [len(wide[i]) for i in members], max(wide[i].shape[2] for i in members)
        x = wide[members[0]].new_zeros(sum(counts), kind[0], longest, dtype=dtype)
        for i, part in zip(members, x.split(counts)):
            part[..., : wide[i].shape[2]] = wide[i]
        x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32).clamp(min=1e-7).to(dtype)
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        for i, part in zip(members, x.split(counts)):
            part = part[..., : wide[i].shape[2]]
            results[i] = part if wide[i] is updates[i] else part.mT
    return results


class Muon(torch.optim.AdamW):
    """Groups with ``"muon": True`` by Muon, all others by AdamW (``torch.optim.AdamW``, all its arguments).

    Of a matrix (rows, columns), in float32: m ← m + (1 − momentum) (g − m), u = g + momentum (m − g),
    W ← (1 − lr · weight_decay) W − lr · 0.2 √max(rows, columns) · orthogonalise(u).
    The factor gives an update the size of AdamW's (Liu et al. 2025, arXiv 2502.16982).

    A ``torch.amp.GradScaler`` that finds a gradient which is not finite leaves the whole step out, as with AdamW.
    ValueError if a group for Muon holds anything but matrices.
    """

    def __init__(self, groups: list[dict], lr, momentum: float = 0.95, **adamw):
        super().__init__(groups, lr=lr, **adamw)
        self.momentum = momentum
        for group in self.param_groups:
            shapes = [tuple(p.shape) for p in group["params"] if group.get("muon") and p.dim() != 2]
            if shapes:
                raise ValueError(f"Muon is for matrices; give parameters of shape {shapes[0]} to another group")

    @torch.no_grad()
    def step(self, closure=None):
        loss, groups = None, self.param_groups
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in groups:
            if group.get("muon"):
                self._step_of_matrices(group)
        try:
            self.param_groups = [group for group in groups if not group.get("muon")]
            super().step()
            return loss
        finally:
            self.param_groups = groups

    def _step_of_matrices(self, group: dict) -> None:
        stacks = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                stacks.setdefault(tuple(parameter.shape), []).append(parameter)
        fault = getattr(self, "found_inf", None)  # GradScaler's: 1 if the step is to change nothing
        counts = 1.0 if fault is None else (fault == 0).float().squeeze()
        updates = []
        for parameters in stacks.values():
            gradient, state = torch.stack([p.grad for p in parameters]), self.state[parameters[0]]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
                state["step"] = torch.zeros(())  # without a meaning here, but AdamW reads states with one only
            if fault is not None:
                gradient.nan_to_num_(0.0, 0.0, 0.0)
            state["momentum_buffer"].lerp_(gradient, (1 - self.momentum) * counts)
            updates.append(gradient.lerp_(state["momentum_buffer"], self.momentum))
        dtype = torch.bfloat16 if updates and updates[0].is_cuda else torch.float32
        rate = group["lr"] * counts
        for parameters, update, direction in zip(stacks.values(), updates, orthogonalise(updates, dtype)):
            update.copy_(direction).mul_(-0.2 * math.sqrt(max(parameters[0].shape)) * rate)
            torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
            torch._foreach_add_(parameters, list(update.unbind()))


class AdaptiveClip:
    """Clip gradients to ``ratio`` times their usual norm; as a tensor's arithmetic, so that a CUDA graph can hold it.

    ``usual`` is a running mean (over 100 steps) of the clipped norm. A norm that is not finite leaves it as it was, and
    the gradients too. With a fixed bound in its place, gradients that come a thousand times as large as their usual
    size for a few steps fill the momentum, whose direction is all that Muon goes by.
    """

    def __init__(self, ratio: float, device: torch.device | str):
        self.ratio, self.usual = ratio, torch.zeros((), device=device)

    @torch.no_grad()
    def __call__(self, parameters: list[Tensor]) -> Tensor:
        """Clip the gradients of ``parameters`` in place; returns their norm before that, a tensor ()."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return torch.zeros_like(self.usual)
        norm = torch.nn.utils.get_total_norm(gradients)
        usual = torch.where(self.usual > 0, self.usual, norm)
        limit = self.ratio * usual
        factor = (limit / norm.clamp(min=1e-30)).clamp(max=1.0)
        torch._foreach_mul_(gradients, torch.where(torch.isfinite(norm), factor, 1.0))
        new = usual.lerp(torch.minimum(norm, limit), 0.01)
        self.usual.copy_(torch.where(torch.isfinite(norm), new, self.usual))
        return norm
