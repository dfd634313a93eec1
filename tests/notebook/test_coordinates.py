"""Coordinates: the pixel grid, Fourier features, and the harmonics of a patch."""

import math

import pytest
import torch
import torch.nn.functional as F


def test_grid_holds_pixel_centres_in_raster_order(nb):
    grid = nb.pixel_grid(4)
    assert grid.shape == (16, 2)
    for index in range(16):
        row, column = divmod(index, 4)
        assert grid[index].tolist() == [(row + 0.5) / 4, (column + 0.5) / 4]


def test_fourier_frequencies_are_drawn_once(nb, tiny):
    coords = torch.rand(5, 2)
    a, b = nb.FourierFeatures(8, 10.0, seed=3), nb.FourierFeatures(8, 10.0, seed=3)
    torch.manual_seed(99)
    assert torch.equal(a(coords), b(coords))
    assert torch.equal(a(coords), a(coords))
    assert not torch.equal(a(coords), nb.FourierFeatures(8, 10.0, seed=4)(coords))
    assert nb.FourierFeatures(4096, 10.0, 0).frequencies.std().item() == pytest.approx(10, rel=0.05)
    names = [name for name in tiny().state_dict() if name.endswith("frequencies")]
    assert len(names) == 2  # of the patches and of the queries
    trained = [name for name, _ in tiny(decoder="gaussian").named_parameters() if name.endswith("frequencies")]
    assert trained == [f"decoder.fourier.bands.{i}.frequencies" for i in range(2)]
    assert not any(name.endswith("frequencies") for name, _ in tiny().named_parameters())


def test_fourier_features_of_a_known_frequency(nb):
    features = nb.FourierFeatures(1, 1.0, 0)
    features.frequencies.copy_(torch.tensor([[2.0], [1.0]]))
    angle = 2 * math.pi * (2 * 0.3 + 0.9)
    assert features(torch.tensor([0.3, 0.9])).tolist() == pytest.approx([math.sin(angle), math.cos(angle)], abs=1e-5)


@pytest.mark.parametrize("patch", [1, 2, 3, 4, 6])
def test_place_within_a_patch_is_linear_in_the_harmonics(nb, patch):
    size = 12
    harmonics = nb.patch_harmonics(patch, size)
    assert harmonics.shape == (2, 2 * (patch // 2))
    if patch == 1:
        return  # one place only
    features = nb.FourierFeatures(harmonics.shape[1], 1.0, 0, harmonics)(nb.pixel_grid(size)).double()
    features = torch.cat([features, torch.ones(len(features), 1)], dim=1)
    row, column = torch.arange(size**2) // size % patch, torch.arange(size**2) % patch
    wanted = torch.cat([F.one_hot(row, patch), F.one_hot(column, patch)], dim=1).double()
    solution = torch.linalg.pinv(features, rtol=1e-4) @ wanted
    assert (features @ solution - wanted).abs().max() < 1e-4


def test_harmonics_are_among_the_frequencies_of_the_decoder(nb, tiny):
    for seed in (0, 1):
        frequencies = nb.MambaGINR(**{**tiny().config, "seed": seed}).decoder.fourier.frequencies
        assert frequencies[:, :2].tolist() == [[4.0, 0.0], [0.0, 4.0]]  # an image of four patches a side
        assert frequencies.shape == (2, 8)
    with pytest.raises(ValueError, match="num_frequencies must be at least 4 for patch_size 4, got 3"):
        tiny(patch_size=4, num_lp=4, num_frequencies=3)
