"""What several of the Triton kernels share."""

from importlib import import_module

import pytest
import torch
from kernel_checks import DEVICE, needs_triton


@needs_triton
@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (37, 5, 7), (3, 0), (0, 4)], ids=str)
def test_sums_of_partial_sums(shape):
    parts = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    sum_rows = import_module("mamba_ginr.kernels.triton_tiles").sum_rows
    assert torch.allclose(sum_rows(parts), parts.sum(0), atol=1e-5)
