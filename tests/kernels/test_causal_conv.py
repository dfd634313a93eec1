"""Mamba's short convolution against PyTorch's own, gradients too."""

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DEVICES, TOLERANCE, needs_triton, relative_error

from mamba_ginr.kernels import causal_conv


def conv_reference(x, weight, bias, both):
    """PyTorch's own depthwise convolution, the second half of the channels on the reversed sequence."""
    parts, half = [], x.shape[2] // 2 if both else x.shape[2]
    for part, backwards in ((slice(0, half), False), (slice(half, None), True)):
        u, w = x[..., part].transpose(1, 2), weight[part].unsqueeze(1)
        u = F.conv1d(u.flip(2) if backwards else u, w, bias[part], padding=weight.shape[1] - 1, groups=len(w))
        u = F.silu(u[..., : x.shape[1]])
        parts.append((u.flip(2) if backwards else u).transpose(1, 2))
        if not both:
            break
    return torch.cat(parts, dim=2)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("length", "channels", "taps"), [(1, 2, 4), (3, 6, 4), (70, 130, 4), (66, 256, 2)])
def test_the_short_convolution_equals_conv1d(length, channels, taps, dtype, both, backend):
    generator, device = torch.Generator().manual_seed(length), DEVICES[backend]
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    # Wider than what is read, so that rows are not contiguous.
    wide, weight, bias = draw(2, length, channels + 3), draw(channels, taps), draw(channels)
    wide = wide.to(dtype).double()
    exact = [t.clone().requires_grad_() for t in (wide[..., :channels], weight, bias)]
    truth = conv_reference(*exact, both)
    weights = draw(*truth.shape).to(dtype).double()
    true_gradients = torch.autograd.grad((truth * weights).sum(), exact)

    x = wide.to(device, dtype)[..., :channels].detach().requires_grad_()
    inputs = (x, *(t.to(device, torch.float32).requires_grad_() for t in (weight, bias)))
    y = causal_conv(*inputs, both, backend)
    gradients = torch.autograd.grad(y, inputs, weights.to(device, dtype))
    assert y.dtype == dtype
    for name, value, exact_value in zip("yxwb", (y, *gradients), (truth, *true_gradients)):
        assert relative_error(value, exact_value) < TOLERANCE[dtype], name


def test_wrong_shapes_of_the_convolution_are_named():
    x, weight, bias = torch.ones(1, 5, 3), torch.ones(3, 4), torch.ones(3)
    with pytest.raises(ValueError, match=r"got \(1, 5, 3\), \(2, 4\) and \(3,\)"):
        causal_conv(x, weight[:2], bias)
    with pytest.raises(ValueError, match="even number of channels, got 3"):
        causal_conv(x, weight, bias, bidirectional=True)
