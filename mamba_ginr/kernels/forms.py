"""Do the text-book cells of the notebook and their fast forms, encoder.py and decoder.py, still say the same?"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mamba_ginr.kernels.backends import backend_set_to

SMALL = {"dim": 32, "depth": 2, "d_state": 4, "num_lp": 16, "decoder_dim": 32, "decoder_blocks": 1}
SMALL |= {"head_dim": 8, "head_blocks": 1, "head_hidden": 8}


def difference_of_forms(build: Callable[..., nn.Module], config: dict) -> float:
    """The largest difference between plain and fast form, of outputs and of gradients, as a share of the largest value.

    Both are asked for two images by one small model, ``build(**config)`` in few and narrow layers, on the CPU in
    float32, whose rounding leaves some 1e-6. ``build`` makes models with ``fused``, the switch between the forms, and
    ``own_coords``. What the plain form raises is raised; where only the fast form fails, the difference is infinite.
    """
    patch = config["patch_size"]
    small = {**config, **SMALL, "image_size": 4 * patch, "num_frequencies": max(8, patch)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, images = build(**small), torch.rand(2, 3, 4 * patch, 4 * patch)
    with backend_set_to("torch"):  # what was chosen for a GPU may not run here
        model.fused = False
        plain = _outputs_and_gradients(model, images)
        model.fused = True
        try:
            fast = _outputs_and_gradients(model, images)
        except Exception:  # an edited cell may have other parameters, or another signature
            return math.inf
    if [getattr(t, "shape", None) for t in plain] != [getattr(t, "shape", None) for t in fast]:
        return math.inf
    pairs = [(a, b) for a, b in zip(plain, fast) if a is not None]
    shares = [(a - b).abs().max() / a.abs().max().clamp(min=1e-30) for a, b in pairs]
    return torch.stack(shares).max().item()  # NaN if one is, which Python's max may pass over


def forms_agree(build: Callable[..., nn.Module], config: dict) -> bool:
    """Whether the two forms differ by less than 1e-3, and a line that says so."""
    difference = difference_of_forms(build, config)
    agree = difference < 1e-3
    what = "agree" if agree else "were edited, and run as they stand: they no longer agree"
    print(f"Cells 3 to 6 {what} with their fast forms (difference {difference:.1g}).")
    return agree


def _outputs_and_gradients(model: nn.Module, images: Tensor) -> list[Tensor | None]:
    output = model(images, model.own_coords)
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)  # so that no sum of gradients is 0 by chance
    gradients = torch.autograd.grad((output * weights).sum(), list(model.parameters()), allow_unused=True)
    return [output.detach(), *gradients]
