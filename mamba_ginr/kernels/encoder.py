"""The fast form of the notebook's MambaEncoder: the same parameters, the same numbers, in fewer and larger steps.

Both directions of a BiMamba run side by side, in one product, one convolution and one scan; a layer's residual and the
next one's norm are one pass; and tokens that nobody reads leave before the last layers that treat each token alone.
The text-book form is cells 3 and 4 of the notebook, against which cell 10 holds this one.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_ginr.kernels.add_norm import add_norm
from mamba_ginr.kernels.mamba_inner import mamba_inner
from mamba_ginr.kernels.mlp import mlp

Branch = tuple[Tensor, Tensor]  # (B, L, dim) and (dim,): their sum is to be added to the residual stream


def encode(encoder: nn.Module, tokens: Tensor, select: Callable[[Tensor], Tensor]) -> Tensor:
    """``select(encoder(tokens))``: (B, L, dim) → what ``select`` takes of (B, L, dim) along L."""
    x, branch = tokens, None
    for block in encoder.blocks[:-1]:
        x, branch = _block(block, x, branch)
    x, branch = _block(encoder.blocks[-1], x, branch, select)
    product, bias = branch
    return encoder.norm(x + (product + bias))


def _block(block: nn.Module, x: Tensor, branch: Branch | None, select=None) -> tuple[Tensor, Branch]:
    """A block hands on the residual stream and the branch that is yet to be added to it."""
    x, y = add_norm(x, branch, block.norm1)
    product, bias = _bimamba(block.mixer, y)
    if select is not None:
        x, product = select(x), select(product)
    x, y = add_norm(x, (product, bias), block.norm2)
    return x, mlp(y, block.feed_forward[0], block.feed_forward[2], "gelu")


def _bimamba(mixer: nn.Module, x: Tensor) -> Branch:
    mambas = [mixer.forward_mamba, mixer.backward_mamba]
    y = _scan_directions(x, mambas)
    # join · out_proj is one linear map, a product of small matrices, applied to y at once.
    maps = [part @ m.out_proj.weight for part, m in zip(mixer.join.weight.chunk(2, dim=1), mambas)]
    return F.linear(y, torch.cat(maps, dim=1)), mixer.join.bias


def _scan_directions(x: Tensor, mambas: list[nn.Module]) -> Tensor:
    """Two Mambas up to their out_proj, side by side: (B, L, dim) → (B, L, 2 · d_inner).

    The second reads from the last token to the first: its channels lie beside the first one's, and no sequence is
    flipped or copied.
    """
    rank, n = mambas[0].dt_rank, mambas[0].d_state
    # Rows of in_proj: u of each direction, then z of each.
    in_proj = torch.cat([half for halves in zip(*(m.in_proj.weight.chunk(2) for m in mambas)) for half in halves])
    taps = torch.cat([m.conv1d.weight for m in mambas]).squeeze(1)
    # A direction's delta, B and C come from its own channels: the weights are block-diagonal.
    pieces = zip(*(m.x_proj.weight.split([rank, n, n]) for m in mambas))
    x_proj = torch.cat([torch.block_diag(*piece) for piece in pieces])
    dt_proj = torch.block_diag(*(m.dt_proj.weight for m in mambas))
    A = -torch.cat([m.A_log for m in mambas]).float().exp()
    bias, D, dt_bias = (torch.cat(v) for v in zip(*((m.conv1d.bias, m.D, m.dt_proj.bias) for m in mambas)))
    return mamba_inner(F.linear(x, in_proj), taps, bias, x_proj, dt_proj, A, D, dt_bias, bidirectional=True)
