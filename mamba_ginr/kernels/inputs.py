"""What the public functions check of their inputs: names, kinds, devices and shapes; nothing that waits for a GPU."""

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def expect_floats(caller: str, **tensors: Tensor | None) -> None:
    """TypeError or ValueError for the first that is no tensor of real floats, or not on the device of the first."""
    device = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{caller}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{caller}: {name} is {tensor.dtype}, which would be cut to real floats without a word; convert it to "
                f"one of {', '.join(str(dtype).removeprefix('torch.') for dtype in FLOATS)}"
            )
        if device is None:
            first, device = name, tensor.device
            if tensor.is_meta:
                raise ValueError(
                    f"{caller}: {name} is on the device meta, which holds no numbers; for shapes and costs alone take "
                    f"torch._subclasses.FakeTensorMode"
                )
        elif tensor.device != device:
            raise ValueError(
                f"{caller}: {name} is on {tensor.device} and {first} on {device}; move all tensors to one device"
            )


def expect_shapes(caller: str, expected: dict) -> None:
    """ValueError for the first tensor, if it is given, that has not the shape beside it."""
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{caller}: {name} must have shape {shape}, got {tuple(tensor.shape)}")
