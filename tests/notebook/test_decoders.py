"""Decoding, with each decoder: the spatial bias, any resolution, each query for itself."""

import pytest
import torch


def test_bias_is_two_dimensional_and_in_units_of_a_patch(nb, tiny):
    centres = tiny().centres[0]  # of 4×4 patches
    bias = nb.spatial_bias(torch.tensor([[0.125, 0.125]]), centres, 1 / 4, 10.0).view(4, 4)  # at that of patch (0, 0)
    for row in range(4):
        for column in range(4):
            assert bias[row, column].item() == pytest.approx(-10.0 * (row**2 + column**2), abs=1e-4)


# Any place will do to compare answers, though training shows the decoder the centres of pixels only.
pytestmark = pytest.mark.filterwarnings("ignore:coords lie up to")
DECODERS = pytest.mark.parametrize("decoder", ["lainr", "gaussian", "scent", "hybrid"])


@DECODERS
def test_any_resolution_and_any_chunk_decode_alike(nb, tiny, decoder):
    model = tiny(decoder=decoder).eval()
    with torch.no_grad():
        latents = model.encode(torch.rand(2, 3, 8, 8))
        for size in (1, 5, 8, 24):
            whole = model.decode(latents, nb.pixel_grid(size))
            assert whole.shape == (2, size**2, 3)
            for chunk in (1, 7, 1000):
                if size * size / chunk <= 100:
                    assert torch.allclose(model.decode(latents, nb.pixel_grid(size), chunk), whole, atol=1e-5)


@DECODERS
def test_a_query_does_not_depend_on_the_others(nb, tiny, decoder):
    model, coords = tiny(decoder=decoder).eval(), torch.rand(50, 2)
    with torch.no_grad():
        latents = model.encode(torch.rand(1, 3, 8, 8))
        together = model.decode(latents, coords)
        alone = torch.cat([model.decode(latents, coords[i : i + 1]) for i in range(50)], dim=1)
    assert torch.allclose(together, alone, atol=1e-5)


@DECODERS
def test_coordinates_of_each_image_or_shared(nb, tiny, decoder):
    model, coords = tiny(decoder=decoder).eval(), torch.rand(2, 6, 2)
    with torch.no_grad():
        latents = model.encode(torch.rand(2, 3, 8, 8))
        own = model.decode(latents, coords)
        shared = [model.decode(latents, coords[i])[i] for i in range(2)]
    assert torch.allclose(own, torch.stack(shared), atol=1e-5)


def test_an_unknown_decoder_is_named(tiny):
    with pytest.raises(ValueError, match="decoder = 'siren': choose one of lainr, gaussian, scent, hybrid"):
        tiny(decoder="siren")
