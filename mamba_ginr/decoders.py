"""Three other decoders: what else can turn latents and a coordinate into a colour, with all else the same.

Each takes ``fourier``, a module that maps coordinates to their features (..., Q, fourier.width); latents
(B, ..., K, latent_dim), coords (1 or B, ..., Q, 2) and the attention's bias (..., Q, K) → (B, ..., Q, 3).
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class FourierBands(nn.Module):
    """Fourier features of several bands, side by side: (..., 2) → (..., width)."""

    def __init__(self, bands: list[nn.Module]):
        super().__init__()
        self.bands, self.width = nn.ModuleList(bands), sum(band.width for band in bands)

    def forward(self, coords: Tensor) -> Tensor:
        return torch.cat([band(coords) for band in self.bands], dim=-1)


class MultiHeadAttention(nn.Module):
    """Attention of queries (1 or B, ..., Q, dim) on context (B, ..., K, context_dim), bias (..., Q, K)."""

    def __init__(self, dim: int, context_dim: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(context_dim, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim)

    def forward(self, queries: Tensor, context: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = (
            rearrange(t, "... n (h d) -> ... h n d", h=self.heads)
            for t in (self.to_q(queries), *self.to_kv(context).chunk(2, dim=-1))
        )
        q = q.expand(*k.shape[:-2], -1, -1)
        if q.dim() == 5 and len(bias) == 1:  # of tiles: in four dimensions PyTorch keeps no logits
            together = (rearrange(t, "b t h n d -> t (b h) n d") for t in (q, k, v))
            bias = bias[0].to(q.dtype).unsqueeze(1).expand(-1, len(q) * self.heads, -1, -1)
            read = F.scaled_dot_product_attention(*together, bias)
            return self.to_out(rearrange(read, "t (b h) n d -> b t n (h d)", h=self.heads))
        if bias is not None:
            bias = bias.to(q.dtype).unsqueeze(-3).expand(*q.shape[:-1], -1)
        return self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v, bias), "... h n d -> ... n (h d)"))


class TwoScaleDecoder(nn.Module):
    """LAINR with two bands of frequencies, for ``gaussian``.

    Each band gives h = ReLU(Linear γ) and m = ReLU(h + Linear modulation), the second is added onto the first, and the
    RGB of both are summed.
    """

    def __init__(self, latent_dim: int, dim: int, fourier: nn.Module):
        super().__init__()
        self.fourier = fourier
        self.to_query = nn.Linear(fourier.width, dim)
        self.attention = MultiHeadAttention(dim, latent_dim, heads=2, head_dim=64)
        self.of_features = nn.ModuleList(nn.Linear(band.width, dim) for band in fourier.bands)
        self.of_modulation = nn.ModuleList(nn.Linear(dim, dim) for _ in fourier.bands)
        self.to_rgb = nn.ModuleList(nn.Linear(dim, 3) for _ in fourier.bands)
        nn.init.constant_(self.to_rgb[0].bias, 0.5)

    def forward(self, latents: Tensor, coords: Tensor, bias: Tensor) -> Tensor:
        bands = [band(coords) for band in self.fourier.bands]
        modulation = self.attention(self.to_query(torch.cat(bands, dim=-1)), latents, bias)
        x, rgb = 0.0, 0.0
        for features, h, m, out in zip(bands, self.of_features, self.of_modulation, self.to_rgb):
            x = x + F.relu(F.relu(h(features)) + m(modulation))
            with torch.autocast(latents.device.type, enabled=False):
                rgb = rgb + F.linear(x.float(), out.weight, out.bias)
        return rgb


class AttentionBlock(nn.Module):
    """Pre-norm attention on ``context``, or on x itself, and pre-norm GEGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, dim: int, context_dim: int, heads: int = 8, head_dim: int = 64):
        super().__init__()
        self.norm, self.context_norm, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(context_dim), nn.LayerNorm(dim)
        self.attention = MultiHeadAttention(dim, context_dim, heads, head_dim)
        self.up, self.down = nn.Linear(dim, 8 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, context: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm(x), self.context_norm(x if context is None else context), bias)
        value, gate = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(value * F.gelu(gate))


class TokenDecoder(nn.Module):
    """Queries read the latents in blocks of cross-attention and GEGLU, for ``scent`` and ``hybrid``; none sees another.

    After SCENT (Park et al. 2025, arXiv 2504.12262).
    """

    def __init__(self, latent_dim: int, dim: int, num_blocks: int, fourier: nn.Module):
        super().__init__()
        self.fourier = fourier
        self.to_query = nn.Linear(fourier.width, dim)
        self.blocks = nn.ModuleList(AttentionBlock(dim, latent_dim) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(dim)
        self.to_rgb = nn.Linear(dim, 3)
        self.skip = nn.Linear(fourier.width, 3, bias=False)
        nn.init.constant_(self.to_rgb.bias, 0.5)

    def forward(self, latents: Tensor, coords: Tensor, bias: Tensor) -> Tensor:
        features = self.fourier(coords)
        x = self.to_query(features)
        for block in self.blocks:
            x = block(x, latents, bias)
        with torch.autocast(latents.device.type, enabled=False):
            return F.linear(self.norm(x.float()), self.to_rgb.weight, self.to_rgb.bias) + self.skip(features)


def other_decoder(
    name: str, latent_dim: int, dim: int, num_blocks: int, fourier: FourierBands
) -> TwoScaleDecoder | TokenDecoder:
    """The decoder of this name: gaussian, scent or hybrid, which is scent behind layers over the latents."""
    if name == "gaussian":
        return TwoScaleDecoder(latent_dim, dim, fourier)
    return TokenDecoder(latent_dim, dim, num_blocks, fourier)
