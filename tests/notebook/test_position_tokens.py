"""Learnable position tokens: where they go in, that they come out whole, and how they start."""

import math

import pytest
import torch


@pytest.mark.parametrize(
    ("num_lp", "num_patches"), [(2, 1), (2, 16), (5, 16), (16, 16), (17, 16), (256, 256), (64, 256)]
)
def test_lp_tokens_go_in_evenly_and_come_out_whole(nb, num_lp, num_patches):
    lp, length = nb.LearnablePositionTokens(num_lp, num_patches, 4), num_lp + num_patches
    patches = torch.randn(3, num_patches, 4)
    sequence = lp.insert(patches)
    places = [math.floor(i * (length - 1) / (num_lp - 1)) for i in range(num_lp)]
    assert sequence.shape == (3, length, 4)
    assert lp.inverse[:num_lp].tolist() == places
    assert places[0] == 0
    assert places[-1] == length - 1
    assert torch.equal(sequence[:, places], lp.tokens.expand(3, -1, -1))
    assert torch.equal(lp.extract(sequence), lp.tokens.expand(3, -1, -1))
    patches.requires_grad_()
    weights = torch.randn_like(sequence)
    (gradient,) = torch.autograd.grad((lp.insert(patches) * weights).sum(), patches)
    rest = [i for i in range(length) if i not in set(places)]
    assert torch.equal(gradient, weights[:, rest])
    assert torch.equal(sequence[:, rest], patches)


def test_lp_token_i_of_256_stands_beside_patch_i(nb):
    lp = nb.LearnablePositionTokens(256, 256, 4)
    assert lp.patch.tolist() == list(range(256))
    where = lp.order.argsort()  # place in the sequence of [LP tokens, patches]
    assert (where[256:] - where[:256]).abs().max() <= 2


def test_lp_tokens_start_as_sinusoids(nb):
    tokens = nb.LearnablePositionTokens(16, 16, 8).tokens
    for i in (0, 3, 15):
        for k in range(4):
            angle = i / 10_000 ** (2 * k / 8)
            assert tokens[i, 2 * k].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert tokens[i, 2 * k + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


@pytest.mark.parametrize("num_lp", [0, 1, 18])
def test_a_number_of_lp_tokens_that_does_not_fit(nb, num_lp):
    with pytest.raises(ValueError, match=rf"num_lp \(NUM_LP\) must lie in 2 … num_patches \+ 1 = 17, got {num_lp}"):
        nb.LearnablePositionTokens(num_lp, 16, 4)
