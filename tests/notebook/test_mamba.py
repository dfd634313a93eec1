"""Mamba: the parameters and values of mamba-ssm's, and the two directions."""

import math

import pytest
import torch
import torch.nn.functional as F

from mamba_ginr.kernels import mamba_ssm_fault


def mamba_ssm_shapes(dim, d_state=16, d_conv=4, expand=2):
    """Names and shapes of a mamba_ssm.Mamba state dict (mamba_simple.py of release 2.3.2)."""
    inner, rank = expand * dim, math.ceil(dim / 16)
    return {
        "A_log": (inner, d_state),
        "D": (inner,),
        "in_proj.weight": (2 * inner, dim),
        "conv1d.weight": (inner, 1, d_conv),
        "conv1d.bias": (inner,),
        "x_proj.weight": (rank + 2 * d_state, inner),
        "dt_proj.weight": (inner, rank),
        "dt_proj.bias": (inner,),
        "out_proj.weight": (dim, inner),
    }


def test_a_mamba_ssm_state_dict_loads(nb):
    state = {name: torch.randn(shape) for name, shape in mamba_ssm_shapes(40).items()}
    mamba = nb.Mamba(40)
    mamba.load_state_dict(state)
    assert {k: tuple(v.shape) for k, v in mamba.state_dict().items()} == mamba_ssm_shapes(40)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_mamba_equals_mamba_ssm(nb):
    if fault := mamba_ssm_fault("cuda"):
        pytest.skip(fault)
    import mamba_ssm

    torch.manual_seed(0)
    theirs, ours, x = mamba_ssm.Mamba(64).cuda(), nb.Mamba(64).cuda(), torch.randn(2, 33, 64, device="cuda")
    ours.load_state_dict(theirs.state_dict())
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


def test_mamba_starts_as_mamba_ssm_does(nb):
    torch.manual_seed(0)
    mamba = nb.Mamba(64, d_state=8)
    assert torch.allclose(mamba.A_log.exp(), torch.arange(1.0, 9).expand(128, 8))
    assert torch.equal(mamba.D, torch.ones(128))
    delta = F.softplus(mamba.dt_proj.bias)
    assert 0.001 <= delta.min() < 0.002
    assert 0.05 < delta.max() <= 0.1001
    assert mamba.dt_proj.weight.abs().max() <= mamba.dt_rank**-0.5


def test_mamba_is_causal_and_bimamba_is_not(nb):
    torch.manual_seed(0)
    x = torch.randn(1, 12, 16)
    changed = x.clone()
    changed[:, 7] += 1
    mamba, bimamba = nb.Mamba(16), nb.BiMamba(16)
    assert torch.equal(mamba(x)[:, :7], mamba(changed)[:, :7])
    assert (bimamba(x)[:, 0] - bimamba(changed)[:, 0]).abs().max() > 0


def test_bimamba_is_a_mamba_each_way_and_a_join(nb):
    torch.manual_seed(0)
    bimamba, x = nb.BiMamba(16), torch.randn(2, 11, 16)
    forward, backward = bimamba.forward_mamba(x), bimamba.backward_mamba(x.flip(1)).flip(1)
    assert (forward - backward).abs().max() > 1e-3
    assert torch.equal(bimamba(x), bimamba.join(torch.cat([forward, backward], dim=-1)))
