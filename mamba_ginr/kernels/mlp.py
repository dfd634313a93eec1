"""A perceptron of two layers that leaves its last bias to what follows.

    from mamba_ginr.kernels import add_norm, mlp

    x, y = add_norm(x, branch, norm)  # the residual stream x + branch, and its LayerNorm
    branch = mlp(y, first, second, "gelu")  # a product and its bias, for the next add_norm to add

Both are Triton kernels in float16 and bfloat16 where the scan's Triton backend runs, and PyTorch's layers elsewhere.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_ginr.kernels.backends import autocast_dtype, implementation, is_fused
from mamba_ginr.kernels.inputs import expect_floats, expect_shapes

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


def mlp(x: Tensor, first: nn.Linear, second: nn.Linear, activation: str) -> tuple[Tensor, Tensor]:
    """second(activation(first(x))) as a product and a bias, whose sum is left to what follows, in float32.

    Equivalent to, with "gelu"::

        hidden = F.gelu(F.linear(x, first.weight, first.bias))
        return F.linear(hidden, second.weight), second.bias

    Args:
        x: (..., inputs), any float dtype; under autocast cast to its dtype, as a Linear does.
        first, second: inputs → hidden and hidden → outputs, with biases.
        activation: "relu" or "gelu" (exact, with the error function).

    Returns:
        (..., outputs), and the bias of ``second`` (outputs,).

    Raises ValueError for another activation, shapes that do not fit, a layer without bias, integers or several devices.
    """
    biases = {"first.bias": first.bias, "second.bias": second.bias}
    if missing := [name for name, bias in biases.items() if bias is None]:
        raise ValueError(f"mlp: {missing[0]} is None; make the layer with bias=True")
    expect_floats("mlp", x=x, **{"first.weight": first.weight, "second.weight": second.weight}, **biases)
    expected = {"x": (x, (*x.shape[:-1], first.in_features))}
    expected["second.weight"] = (second.weight, (second.out_features, first.out_features))
    expect_shapes("mlp", expected)
    if activation not in ACTIVATIONS:
        raise ValueError(f"mlp: unknown activation {activation!r}; choose one of: {', '.join(ACTIVATIONS)}")
    dtype = autocast_dtype(x)
    x, weight1, weight2 = (t.to(dtype) for t in (x, first.weight, second.weight))
    with torch.autocast(x.device.type, enabled=False):
        if is_fused(x, dtype):
            fused = implementation("mlp", "triton")
            product = fused(x.flatten(0, -2), weight1, first.bias, weight2, activation == "gelu")
            return product.unflatten(0, x.shape[:-1]), second.bias
        hidden = ACTIVATIONS[activation](F.linear(x, weight1, first.bias.to(dtype)))
        return F.linear(hidden, weight2), second.bias
