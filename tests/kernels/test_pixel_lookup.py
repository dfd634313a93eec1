"""What the super-resolution head is made of: a Linear of few inputs, and the four nearest pixels."""

import torch

from mamba_ginr.kernels.head import LinearOfFew, four_nearest


def test_a_linear_of_few_inputs_is_a_linear():
    torch.manual_seed(0)
    layer, inputs = LinearOfFew(3, 5), torch.randn(2, 7, 3)
    expected = torch.nn.functional.linear(inputs, layer.weight, layer.bias)
    assert torch.allclose(layer(*inputs.split(1, dim=-1)), expected, atol=1e-6)
    shared = layer(*inputs[:1, :, :2].split(1, dim=-1), torch.ones(2, 1, 1))  # inputs of other shapes are broadcast
    assert shared.shape == (2, 7, 5)


def test_the_four_nearest_pixels_and_the_way_from_them():
    pixels = torch.arange(2 * 16.0).view(2, 16, 1)  # 4 × 4, each with its number
    coords = torch.tensor([[[0.5, 0.5], [0.3125, 0.375], [0.0, 1.0]]])  # in pixels: 1.5, 1.5; 0.75, 1; -0.5, 3.5
    values, way = four_nearest(pixels, coords, 4)
    assert values[0, ..., 0].tolist() == [[5, 6, 9, 10], [1, 2, 5, 6], [3, 3, 3, 3]]
    assert torch.equal(values[1], values[0] + 16)
    assert way[0, 0].tolist() == [[0.5, 0.5], [0.5, -0.5], [-0.5, 0.5], [-0.5, -0.5]]
    assert way[0, 1].tolist() == [[0.75, 0.0], [0.75, -1.0], [-0.25, 0.0], [-0.25, -1.0]]
    own = coords.expand(2, -1, -1).clone()  # the same places, as each image's own
    assert torch.equal(four_nearest(pixels, own, 4)[0], values)
