"""Scores: PSNR against scikit-image, and what evaluate reports."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio


def test_colours_are_clamped_before_they_are_scored(nb, tiny):
    model, images = tiny(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    images[1] = 255
    for bias, first, second in ((-3.0, 100.0, 0.0), (3.0, 0.0, 100.0)):
        with torch.no_grad():
            model.decoder.to_rgb.weight.zero_()
            model.decoder.to_rgb.bias.fill_(bias)
        each = [nb.evaluate(model, images[i : i + 1], 2) for i in range(2)]
        assert [row["psnr_mean"] for row in each] == pytest.approx([first, second])
        assert [row["bit_exact_share"] for row in each] == [first == 100, second == 100]
        assert (nb.decode_grid(model, model.encode(images / 255), 8, 64) == (bias > 0)).all()


def test_psnr_is_scikit_images(nb):
    rng = np.random.default_rng(0)
    target = rng.random((4, 8, 8, 3), dtype=np.float32)
    prediction = target + rng.normal(0, 0.3, target.shape).astype(np.float32)  # some values leave [0, 1]
    ours = nb.psnr(torch.from_numpy(prediction), torch.from_numpy(target))
    theirs = [peak_signal_noise_ratio(t, p, data_range=1.0) for t, p in zip(target, prediction)]
    assert ours.tolist() == pytest.approx(theirs, abs=1e-3)


def test_evaluate_reports_each_number_as_defined(nb, tiny):
    class Constant(torch.nn.Module):
        own_coords = nb.pixel_grid(8)

        def forward(self, images, coords):
            return images.flatten(2).transpose(1, 2) + offset[: len(images)]

    images = torch.randint(1, 254, (3, 3, 8, 8), dtype=torch.uint8)
    offset = torch.tensor([0.4, 0.6, 3.0]).view(3, 1, 1) / 255  # only the first rounds back to what it was
    metrics = nb.evaluate(Constant(), images, batch_size=3)
    errors = (offset.flatten().double() ** 2).tolist()
    assert metrics["psnr_mean"] == pytest.approx(np.mean([-10 * math.log10(e) for e in errors]), abs=1e-2)
    assert metrics["psnr_of_mean_mse"] == pytest.approx(-10 * math.log10(np.mean(errors)), abs=1e-2)
    assert metrics["psnr_worst"] == pytest.approx(-10 * math.log10(max(errors)), abs=1e-2)
    assert metrics["bit_exact_share"] == pytest.approx(1 / 3)


def test_evaluate_does_not_depend_on_the_batch(nb, tiny):
    model, images = tiny().eval(), torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8)
    whole, parts = nb.evaluate(model, images, 7), nb.evaluate(model, images, 2)
    assert whole == pytest.approx(parts, abs=1e-3)
