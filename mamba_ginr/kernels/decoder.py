"""The fast form of the notebook's LAINRDecoder: the same parameters and numbers, with maps applied where they are few.

A linear map and a mean over latents commute, so that maps of what attention reads are applied to the latents and not
to the queries, which are four times as many. The maps of the queries and that of the keys become one small matrix. The
text-book form is cell 6 of the notebook, against which cell 10 holds this one.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_ginr.kernels.mlp import mlp


def decode(decoder: nn.Module, latents: Tensor) -> Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor]:
    """``f(coords, bias, near) = decoder(near(latents), coords, bias)``; ``near`` takes (B, P, c) → (B, ..., K, c).

    Latents (B, P, latent_dim), coords (1 or B, ..., Q, 2), bias (..., Q, K) → (B, ..., Q, 3).
    """
    # mix(cat[features, modulation]) in two parts: that of the features is shared, that of the modulation commutes.
    width, attention = decoder.fourier.width, decoder.attention
    of_features, of_modulation = decoder.mix.weight.split([width, decoder.mix.in_features - width], dim=1)
    # The weights of a query sum to 1, so linear maps (and to_out's bias) commute with the mean that they take:
    # they are applied to P latents here, not to Q queries.
    values = F.linear(attention.to_out(attention.to_v(latents)), of_modulation)
    # (to_q to_query features) · (to_k latent) = (to_kᵀ to_q to_query features) · latent: one small map of the features.
    with torch.autocast(latents.device.type, enabled=False):
        read = attention.to_k.weight.T @ (attention.scale * attention.to_q.weight)
        to_query = read @ decoder.to_query.weight, read @ decoder.to_query.bias

    def decode_part(coords: Tensor, bias: Tensor, near: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.autocast(latents.device.type, enabled=False):
            features = decoder.fourier(coords)  # (1 or B, ..., Q, width)
            x = F.linear(features, of_features, decoder.mix.bias)
            # A logit of 8 in float16 is off by up to 0.4 %.
            weights = (F.linear(features, *to_query) @ near(latents).mT + bias).softmax(dim=-1)  # (B, ..., Q, K)
        x = x + weights @ near(values)
        for block in decoder.blocks:
            product, own_bias = mlp(x, block.layers[0], block.layers[2], "relu")
            x = x + (product + own_bias)
        to_rgb = decoder.to_rgb
        with torch.autocast(latents.device.type, enabled=False):
            if not x.is_cuda:
                return to_rgb(x)
            # Three sums, exact in float32, compiled into one pass with what precedes; a GPU's product would be TF32's.
            return torch.stack([(x * row).sum(-1) for row in to_rgb.weight], dim=-1) + to_rgb.bias

    return decode_part
