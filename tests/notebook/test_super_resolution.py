"""The super-resolution test: pictures decoded on a grid, and scored against the truth."""

import pytest
import torch
from PIL import Image
from stand_ins import Interpolation
from torchvision.transforms import functional as TF


def test_a_grid_is_decoded_in_raster_order_whatever_the_chunk(nb, tiny):
    model, images = tiny().eval(), torch.rand(2, 3, 8, 8)
    pictures = nb.decode_grid(model, model.encode(images), 20, 64)
    assert pictures.shape == (2, 3, 20, 20)
    values = model(images, torch.tensor([[2.5 / 20, 7.5 / 20]]), 1 / 20)[:, 0]
    assert torch.allclose(pictures[:, :, 2, 7], values, atol=1e-5)
    assert torch.allclose(pictures, nb.decode_grid(model, model.encode(images), 20, 400), atol=1e-5)


@pytest.mark.parametrize("scale", [2, 3, 8])
def test_at_whole_multiples_a_picture_averages_back_to_its_pixels(nb, tiny, scale):
    model = tiny().eval()
    torch.nn.init.normal_(model.head.to_rgb.weight)
    with torch.no_grad():
        latents = model.encode(torch.rand(2, 3, 8, 8))
        own = nb.decode_grid(model, latents, 8, 100)
        assert torch.allclose(own, nb.decode_grid(model, latents, 8, 7), atol=1e-5)
        pictures = nb.decode_grid(model, latents, 8 * scale, 100)
        plain = model.decode(latents, nb.pixel_grid(8 * scale), pixel_width=1 / (8 * scale)).transpose(1, 2)
    back = torch.nn.functional.avg_pool2d(pictures, scale)
    assert torch.allclose(back, own, atol=1e-5)
    assert (plain.unflatten(2, pictures.shape[2:]) - pictures).abs().max() > 1e-3  # without that they do not


def test_enlargements_are_scored_against_the_truth(nb):
    truth = torch.rand(5, 3, 16, 16)
    inputs = (255 * torch.nn.functional.avg_pool2d(truth, 2)).round().byte()
    scores = nb.enlargement_scores(Interpolation(nb.HistoSpline(8)), inputs, truth, 1, 2, 100)
    for name, method in [("nearest", "NEAREST"), ("bicubic", "BICUBIC"), ("lanczos", "LANCZOS")]:
        large = [TF.to_pil_image(x).resize((16, 16), Image.Resampling[method]) for x in inputs]
        values = nb.psnr(torch.stack([TF.to_tensor(x) for x in large]), truth)
        assert scores[name] == pytest.approx(values.mean().item(), abs=1e-3)
    linear = torch.nn.functional.interpolate(inputs / 255, size=16, mode="bilinear", align_corners=False)
    error = inputs / 255 - torch.nn.functional.avg_pool2d(linear, 2)
    spread = nb.HistoSpline(8)(error, nb.pixel_grid(16)[None], torch.tensor([1 / 16]))
    linear = (linear + spread.transpose(1, 2).unflatten(2, (16, 16))).clamp(0, 1)  # as decode_grid does
    assert scores["model"] == pytest.approx(nb.psnr(linear, truth).mean().item(), abs=1e-3)
    back = torch.nn.functional.avg_pool2d(linear, 2)
    assert scores["consistency"] == pytest.approx(nb.psnr(back, inputs / 255).mean().item(), abs=0.5)  # near 80 dB


def test_seams_of_a_mosaic_do_not_count(nb):
    inputs, truth = nb.mosaic(torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8), 2, 2)
    model = Interpolation(nb.HistoSpline(8))
    before = nb.enlargement_scores(model, inputs, truth, 2, 1, 100)
    truth[..., 4:12, :] = 0.5  # two pixels of the input on each side of the seam
    assert nb.enlargement_scores(model, inputs, truth, 2, 1, 100) == before
    truth[..., 3, 3] += 0.1
    assert nb.enlargement_scores(model, inputs, truth, 2, 1, 100) != before
