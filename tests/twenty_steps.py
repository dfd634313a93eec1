"""Twenty steps of a tiny model in this process or in each of several, for test_parallel.py: python twenty_steps.py.

CELLS and OUT are paths, in the environment; COMPILED=1 makes the step one CUDA graph.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

from mamba_ginr import parallel

parallel.start()  # a second time where the launcher has done it, and nothing then

import torch  # noqa: E402
from tiny_runs import SETTINGS  # noqa: E402


def run(nb, compiled: bool = False) -> dict:
    """Losses, weights before and after, and this process's batches, moved to the CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = {"image_size": 8, "patch_size": 2, "dim": 128, "depth": 1, "d_state": 4, "num_lp": 16, "decoder_dim": 128}
    model = nb.MambaGINR(**config, head_dim=8, head_blocks=1, head_hidden=16, decoder_blocks=1, num_frequencies=8)
    images = torch.randint(0, 256, (44, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    before = {name: tensor.clone().cpu() for name, tensor in model.state_dict().items()}
    settings = {**SETTINGS, "COMPILE": compiled, "GRADIENT_CLIP": 1.1, "SEED": 3}
    sampler, step = nb.set_up(model.to(device), images.to(device), SimpleNamespace(**settings))
    batches = [sampler(*divmod(i, sampler.steps)) for i in range(20)]
    losses = torch.stack([step(batch, 1e-3 * (i + 1) / 20).clone() for i, batch in enumerate(batches)])
    parallel.check_weights(step.model, step.average)
    weights = {name: tensor.detach().cpu() for name, tensor in step.model.state_dict().items()}
    batches = [[x.cpu() for x in batch] for batch in batches]
    return {"losses": losses.cpu(), "before": before, "weights": weights, "batches": batches}


if __name__ == "__main__":
    from run_notebook import import_script

    cells = Path(os.environ["CELLS"])
    found = run(import_script(cells), bool(os.environ.get("COMPILED")))
    torch.save(found, Path(os.environ["OUT"]) / f"{os.environ.get('RANK', 0)}.pt")
    print("printed by one", file=sys.stderr)
    print("printed by one")
