"""What stands beside the notebook: kernels, optimizers, data, checkpoints and figures. It knows no notebook."""
