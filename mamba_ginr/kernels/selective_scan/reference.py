"""The recurrence of the selective scan as the paper writes it: what the tests hold every backend to."""

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus) -> Tensor:
    """``selective_scan``, one channel and one state at a time, in their dtype; both directions if B has two."""
    batch, length, channels = u.shape
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = F.softplus(delta)
    rows = []
    for b in range(batch):
        for d in range(channels):
            backwards = B.dim() == 4 and d >= channels // 2
            B_b, C_b = (m[b] if m.dim() == 3 else m[b, :, int(backwards)] for m in (B, C))
            h, ys = [u.new_zeros(()) for _ in range(A.shape[1])], {}
            for t in reversed(range(length)) if backwards else range(length):
                for n in range(A.shape[1]):
                    h[n] = torch.exp(delta[b, t, d] * A[d, n]) * h[n] + delta[b, t, d] * B_b[t, n] * u[b, t, d]
                y = sum(C_b[t, n] * h[n] for n in range(A.shape[1]))
                y = y if D is None else y + D[d] * u[b, t, d]
                ys[t] = y if z is None else y * z[b, t, d] * torch.sigmoid(z[b, t, d])
            rows.append(torch.stack([ys[t] for t in range(length)]))
    return torch.stack(rows).view(batch, channels, length).transpose(1, 2)
