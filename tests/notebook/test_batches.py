"""Batches: mosaics and their truth, and a sampler that depends on seed, epoch and step only."""

import pytest
import torch

from mamba_ginr.mosaics import finer_places


def test_a_mosaic_holds_images_side_by_side_and_averages_down(nb):
    images = torch.randint(0, 256, (35, 3, 8, 8), dtype=torch.uint8)
    inputs, truth = nb.mosaic(images, 4, 4)
    assert (inputs.shape, inputs.dtype, truth.shape) == ((2, 3, 8, 8), torch.uint8, (2, 3, 32, 32))
    for row in range(4):
        for column in range(4):
            tile = truth[1, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            assert torch.equal((255 * tile).round().byte(), images[16 + 4 * row + column])
    assert (255 * torch.nn.functional.avg_pool2d(truth, 4) - inputs).abs().max() <= 0.5001
    half = nb.mosaic(images, 4, 2)
    assert torch.equal(half[0], inputs)
    assert torch.allclose(half[1], torch.nn.functional.avg_pool2d(truth, 2), atol=1e-6)


def test_places_away_from_seams_are_two_input_pixels_off(nb):
    assert len(nb.away_from_seams(1, 8)) == 256**2  # no mosaic, no seams
    places = nb.away_from_seams(2, 2)  # seams at 16 of 32 input pixels: 4 of 64 rows on each side are near
    rows = [r for r in range(64) if r < 28 or r >= 36]
    assert places.tolist() == [64 * r + c for r in rows for c in rows]
    assert len(nb.away_from_seams(4, 4)) == (128 - 3 * 16) ** 2


def test_finer_pixels_lie_where_the_truth_is(nb):
    """A picture whose brightness is its row: each finer pixel's truth is that of its centre."""
    rows = torch.arange(32).view(1, 1, 32, 1).expand(16, 3, 32, 32)
    images = rows + 32 * (torch.arange(16) // 4).view(-1, 1, 1, 1)  # 4 × 4 tiles, 128 rows one after the other
    for tiles, scale, step in nb.MOSAICS:
        chosen = images if tiles == 4 else images[[0, 0, 4, 4]]
        _, truth = nb.mosaic(chosen.byte(), tiles, scale, step)
        places = finer_places(scale, step, 32)
        assert truth.shape[2:] == (len(places), len(places))
        assert torch.allclose(255 * truth[0, 0, :, 0], 32 * tiles * places - 0.5, atol=1e-3)
        assert places[0].item() == pytest.approx(0.5 / (32 * scale))
        assert (places + places.flip(0)).tolist() == pytest.approx([1.0] * len(places))


def test_a_batch_depends_on_seed_epoch_and_step_only(nb):
    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)
    first, other = (nb.Sampler(images, 8, 2, 2, 64, seed) for seed in (0, 1))
    batches = [first(0, step) for step in range(5)]
    again = nb.Sampler(images, 8, 2, 2, 64, 0)
    again(1, 3)
    assert all(torch.equal(a, b) for a, b in zip(batches[3], again(0, 3)))
    for different in (batches[2], again(1, 3), other(0, 3)):
        assert not any(torch.equal(a, b) for a, b in zip(batches[3][:3], different[:3]))
    seen = torch.cat([b.images[:4] for b in batches])
    assert len({bytes(x) for x in seen.numpy()}) == 20  # no image twice in an epoch
    shapes = [tuple(x.shape) for x in batches[0]]
    assert shapes == [(6, 3, 8, 8), (2, 3, 8, 8), (2, 64, 2), (2,), (2, 64, 3)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_batches_made_ahead_are_those_made_in_place(nb):
    images = torch.randint(0, 256, (400, 3, 32, 32), dtype=torch.uint8).cuda()
    ahead, in_place = (nb.Sampler(images, 40, 8, 8, 256, 0) for _ in range(2))
    for now in (0, 1, 2, 9, 10, 11, 5):  # in turn, over the end of an epoch, and out of turn
        epoch, step = divmod(now, ahead.steps)
        assert all(torch.equal(a, b) for a, b in zip(ahead(epoch, step), in_place.make(epoch, step)))


def test_the_finer_pixels_of_a_batch_are_those_of_its_mosaics(nb):
    # Images of one colour each: away from seams a finer pixel has the colour of the input's pixel in which it lies.
    images = torch.randint(0, 256, (64, 3, 1, 1), dtype=torch.uint8).expand(-1, -1, 32, 32).contiguous()
    sampler = nb.Sampler(images, 8, 0, 3, 256, 0)
    for step in range(8):
        batch = sampler(0, step)
        pixel = (batch.coords * 32).long()  # row and column
        index = (pixel[..., 0] * 32 + pixel[..., 1]).unsqueeze(-1).expand(-1, -1, 3)
        colours = batch.mosaics.flatten(2).transpose(1, 2).gather(1, index) / 255
        assert torch.allclose(batch.rgb, colours, atol=1e-6)
        assert [round(1 / (32 * width)) for width in batch.pixel_width.tolist()] == [2, 4, 2]


def test_mosaics_are_turned_and_mirrored_in_turn(nb):
    images = torch.arange(4 * 3 * 64).view(4, 3, 8, 8).remainder(256).byte()
    sampler = nb.Sampler(images, 4, 0, 1, 64, 0)
    assert [(of.tiles, of.kind) for of in sampler.kinds] == [(2, (2, 2, 1))]  # 8 pixels are too few for 4 × 4 tiles
    drawn = []
    for epoch in range(8):
        batch = sampler(epoch, 0)
        generator = torch.Generator().manual_seed(epoch)
        tiles = images[torch.randint(4, (4,), generator=generator)]
        plain = nb.mosaic(tiles, 2, 2)[0]
        views = [v.rot90(k, (2, 3)) for v in (plain, plain.flip(3)) for k in range(4)]
        drawn.append([torch.equal(batch.mosaics, v) for v in views].index(True))
    assert drawn == list(range(8))


def test_images_too_small_for_mosaics_are_named(nb):
    with pytest.raises(ValueError, match="images of 4 pixels a side be large enough for mosaics"):
        nb.Sampler(torch.zeros(8, 3, 4, 4, dtype=torch.uint8), 8, 0, 2, 64, 0)


def test_larger_pictures_give_crops_and_mosaics_without_seams(nb):
    """Pictures that are ramps: a crop is a piece of one, and a mosaic's finer pixels lie on it wherever asked."""
    rows, columns = torch.meshgrid(torch.arange(48), torch.arange(64), indexing="ij")
    pictures = [torch.stack([2 * rows, 2 * columns, (rows + columns) + i]).byte() for i in range(6)]
    sampler = nb.Sampler(nb.Pictures(pictures, 8), 8, 2, 3, 64, 0)
    assert [(of.tiles, of.kind.reduction) for of in sampler.kinds] == [(1, 2), (1, 4), (1, 4)]
    assert sampler.steps == 6 * 48 // 8
    for step in range(4):
        batch = sampler(0, step)
        assert [len(x) for x in batch] == [5, 3, 3, 3, 3]
        steps = batch.images[:3, 0, 1:].int() - batch.images[:3, 0, :-1].int()
        assert (steps == 2).all()
        # The input's colours fall or rise by 2 · reduction from pixel to pixel, and so do those in between.
        for image, coords, rgb in zip(batch.mosaics.float(), batch.coords, batch.rgb):
            places = coords.unsqueeze(1) * 8 - 0.5
            by_row, by_column = image[:, 1, 0] - image[:, 0, 0], image[:, 0, 1] - image[:, 0, 0]
            expected = image[:, 0, 0] + places[..., 0] * by_row + places[..., 1] * by_column
            assert (255 * rgb - expected).abs().max() <= 9  # each input is rounded, up to 7.5 pixels from the corner
    other = nb.Sampler(nb.Pictures(pictures, 8), 8, 2, 3, 64, 0)
    assert all(torch.equal(a, b) for a, b in zip(other(1, 5), sampler(1, 5)))
