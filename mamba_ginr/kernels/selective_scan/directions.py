"""Both directions from a scan that walks forwards only."""

import torch
from torch import Tensor


def one_direction_at_a_time(scan):
    """Make a scan that walks forwards only do both directions, by flipping the second half of the channels."""

    def both(u, delta, A, B, C, D, z, delta_bias, delta_softplus, bidirectional) -> Tensor:
        if not bidirectional:
            return scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        half = u.shape[2] // 2
        ys = []
        for direction, channels in enumerate((slice(None, half), slice(half, None))):
            sequences = [None if t is None else t[..., channels] for t in (u, delta, z)]
            sequences += [B[:, :, direction], C[:, :, direction]]
            if direction:
                sequences = [None if t is None else t.flip(1) for t in sequences]
            parameters = [None if t is None else t[channels] for t in (A, D, delta_bias)]
            (u_, delta_, z_, B_, C_), (A_, D_, delta_bias_) = sequences, parameters
            y = scan(u_, delta_, A_, B_, C_, D_, z_, delta_bias_, delta_softplus)
            ys.append(y.flip(1) if direction else y)
        return torch.cat(ys, dim=2)

    return both
