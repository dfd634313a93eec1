"""What the tests of runs share: the settings of a tiny one, and what is compared of its state and history."""

import torch

SETTINGS = {
    "EPOCHS": 3, "WARMUP_EPOCHS": 1, "BATCH_SIZE": 8, "EVAL_BATCH": 16, "LEARNING_RATE": 2e-3, "BETA2": 0.99,
    "WEIGHT_DECAY": 1e-4, "GRADIENT_CLIP": 2.0, "LOG_LOSS": True, "EMA_SHARE": 0.15, "SEED": 0, "COMPILE": False,
    "DECODER": "lainr", "HARD_FRACTION": 0.25, "SR_FRACTION": 0.25, "SR_QUERIES": 64, "OPTIMIZER": "muon",
    "MUON_DECAY": 0.1, "REFINE_STEPS": 0, "REFINE_RATE": 1e-4,
}  # fmt: skip

STEPS = 5  # an epoch of 44 images


def state_in(folder):
    return torch.load(folder / "checkpoints/mamba_ginr_state.pth", weights_only=True)


def tensors(tree):
    """All tensors of nested dicts and lists, by path."""
    if isinstance(tree, torch.Tensor):
        return {"": tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {f"{key}/{path}": tensor for key, value in items for path, tensor in tensors(value).items()}


def without_times(history):
    return [{k: v for k, v in row.items() if k not in ("minutes", "ms_per_step")} for row in history]
