"""Hard images: what they are made of, that a generator's state decides them, and the fixed set to test with."""

import hashlib

import pytest
import torch

from mamba_ginr.hard_images import KINDS, TILES, _channels, hard_images, pattern_images


def photos(count, size=32):
    """Smooth coloured pictures, as photographs are."""
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(count, 3, 4, 4, generator=generator)
    large = torch.nn.functional.interpolate(small, size=size, mode="bicubic", align_corners=False)
    return (255 * large).clamp(0, 255).byte()


def drawn(count, seed=0, size=32):
    return hard_images(photos(3 * count, size), count, torch.Generator().manual_seed(seed))


def test_the_generators_state_decides_them():
    assert torch.equal(drawn(16), drawn(16))
    different = (drawn(20) != drawn(20, seed=1)).flatten(1).any(1)
    assert different.tolist() == [i % len(KINDS) != 7 for i in range(20)]  # channels of three images draw nothing


@pytest.mark.parametrize("size", [8, 32])
def test_each_kind_is_what_it_says(size):
    count = 30 * len(KINDS)
    images, sources = drawn(count, size=size).float(), photos(3 * count, size).float().unflatten(0, (3, count))
    noisy, binary, tiled, blocks, two_colours, ramps, contrast, channels, saturation, patchwork = (
        slice(i, None, len(KINDS)) for i in range(len(KINDS))
    )
    added = (images[noisy] - sources[0][noisy]).abs().mean((1, 2, 3))  # of noise alone: 85 for uniform against grey
    assert added.min() < 25
    assert added.max() > 70
    drawn_anew = (images != sources[0]).flatten(1).any(1)  # black and white ones are their photographs again
    for row in images[binary][drawn_anew[binary]]:
        assert all(len(channel.unique()) <= 2 for channel in row)
    assert all(len(image.flatten(1).unique(dim=1).T) <= 2 for image in images[two_colours])
    assert (images[contrast].std((1, 2, 3)) >= 0.99 * sources[0][contrast].std((1, 2, 3))).all()
    for i in range(3):
        assert torch.equal(images[channels][:, i], sources[i][channels][:, i])
    for image in images[tiled]:
        for dim in (1, 2):
            sides = [
                n
                for n in TILES
                if n < size and torch.equal(image.narrow(dim, n, size - n), image.narrow(dim, 0, size - n))
            ]
            assert sides or size < max(TILES)
    bends = images[ramps].diff(n=2, dim=2).abs().flatten(1).amax(1)  # none but from rounding, and where colours end
    assert ((bends <= 1) | ((images[ramps] == 0) | (images[ramps] == 255)).flatten(1).any(1)).all()
    flat = (images[ramps].flatten(2).std(2) == 0).all(1).float().mean()
    assert 0.1 < flat < 0.6
    chroma = (images[saturation].amax(1) - images[saturation].amin(1)).mean((1, 2))
    assert (chroma > 0.95 * (sources[0][saturation].amax(1) - sources[0][saturation].amin(1)).mean((1, 2))).all()
    saturated = ((images[blocks] == 0) | (images[blocks] == 255)).flatten(1).all(1)
    assert 0.2 < saturated.float().mean() < 0.8
    own = (images[patchwork] == sources[0][patchwork]).all(1).float().mean((1, 2))
    assert 0.3 < own.mean() < 0.7


def test_blocks_have_sides_of_1_to_16_pixels():
    runs = set()
    for image in drawn(60 * len(KINDS))[3 :: len(KINDS)]:
        same = (image[:, :, 1:] == image[:, :, :-1]).all(0).all(0)  # columns like their neighbour
        borders = (~same).nonzero().flatten()
        runs |= set(borders.diff().tolist())
    assert {1, 2, 4, 8} <= runs


def test_a_wrong_number_of_photographs_is_named():
    with pytest.raises(ValueError, match="2 hard images are made of 6 photographs, got 5"):
        hard_images(photos(5), 2, torch.Generator())


def test_few_images_take_their_kinds_in_turn():
    sources = photos(3 * 8)
    for batch in (0, 1, 2):
        images = hard_images(sources, 8, torch.Generator().manual_seed(0), batch)
        where = (KINDS.index(_channels) - 8 * batch) % len(KINDS)  # the one kind that draws nothing
        expected = torch.stack([sources[8 * i + where, i] for i in range(3)]) if where < 8 else None
        assert [expected is not None and torch.equal(image, expected) for image in images] == [
            i == where for i in range(8)
        ]


def test_black_and_white_are_kept_for_testing():
    """Each of these draws made an image of one of them, from blocks of 16 pixels."""
    for seed, extreme in ((109, 0), (640, 255), (1036, 255)):
        sources = photos(3 * 16)
        images = hard_images(sources, 16, torch.Generator().manual_seed(seed))
        assert not (images == extreme).flatten(1).all(1).any()
        assert (images == sources[:16]).flatten(1).all(1).any()


def test_no_training_image_repeats_as_the_fixed_ones_do():
    """Checkerboards and stripes of the fixed set have periods of 2, 4 or 8 pixels along both axes."""
    fixed, images = pattern_images().float(), drawn(40 * len(KINDS))[2 :: len(KINDS)].float()
    for period in (2, 4, 8):
        repeats = [(x[:, :, :, period:] == x[..., :-period]).flatten(1).all(1) for x in (fixed, images)]
        assert repeats[0][:6].any()
        assert not repeats[1].any()


def test_the_fixed_set_is_what_it_says():
    images = pattern_images()
    assert (images.shape, images.dtype) == ((64, 3, 32, 32), torch.uint8)
    assert torch.equal(images, pattern_images())
    assert len(images.flatten(1).unique(dim=0)) == 64
    for i, side in enumerate((1, 2, 4)):
        board = images[2 * i, 0]
        assert board[0, 0] == 255
        assert torch.equal(board, board.roll((side, side), (0, 1)))
        assert torch.equal(board, 255 - board.roll(side, 0))
    assert torch.equal(images[6, 0], torch.tensor([255, 0] * 16, dtype=torch.uint8)[:, None].expand(32, 32))
    noise = images[10:26]
    assert set(noise.unique().tolist()) == {0, 255}
    assert (noise[:8, 0] == noise[:8, 1]).all()
    assert 0.45 < (noise == 255).float().mean() < 0.55
    text = images[26:38].float()
    assert (text.std((2, 3)).amax(1) > 5).all()
    assert torch.equal(images[38:46, :, ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3), images[38:46])
    assert images[46, 0, [0, -1], 0].tolist() == [0, 255]
    assert images[47, 0, 0, [0, -1]].tolist() == [0, 255]
    assert (images[54:62].float().std((2, 3)) == 0).all()
    assert images[62].max() == 0
    assert images[63].min() == 255
    assert pattern_images(30).shape == (64, 3, 30, 30)


def test_the_fixed_set_is_the_same_everywhere():
    """Also with another Pillow, whose fonts differ, or another NumPy."""
    assert hashlib.sha256(pattern_images().numpy().tobytes()).hexdigest()[:16] == "835bcf1bc55858b9"
