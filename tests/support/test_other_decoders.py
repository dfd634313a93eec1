"""The other decoders: their sizes, and multi-head attention written out."""

import pytest
import torch

from mamba_ginr import decoders


@pytest.mark.parametrize(("decoder", "millions"), [("gaussian", 10.35), ("scent", 12.7), ("hybrid", 17.9)])
def test_presets_stay_under_25_million_parameters(nb, decoder, millions):
    model = nb.MambaGINR(decoder=decoder, decoder_dim=256, decoder_blocks=2)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_multi_head_attention_is_softmax_of_products(nb):
    torch.manual_seed(0)
    attention = decoders.MultiHeadAttention(6, 5, heads=2, head_dim=4)
    queries, context, bias = torch.randn(1, 7, 6), torch.randn(3, 9, 5), torch.randn(1, 7, 9)
    q = attention.to_q(queries).view(1, 7, 2, 4)
    k, v = attention.to_kv(context).view(3, 9, 2, 2, 4).unbind(2)
    weights = (torch.einsum("oqhd,bphd->bhqp", q, k) / 2 + bias.unsqueeze(1)).softmax(-1)
    expected = attention.to_out(torch.einsum("bhqp,bphd->bqhd", weights, v).flatten(2))
    assert torch.allclose(attention(queries, context, bias), expected, atol=1e-6)
