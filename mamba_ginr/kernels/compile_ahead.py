"""The kernels of a training step compiled before it, side by side, while something else goes on."""

import torch

from mamba_ginr.kernels.backends import threads_of, triton


def compile_ahead(device: torch.device | str, dim: int, decoder_dim: int, dtype: torch.dtype) -> None:
    """Compile the Triton kernels of short convolution, perceptrons and norms for these widths, if they can run there.

    A head start and no more: what is missing is compiled where it is first asked for, and what goes wrong shows there.
    The scan's kernels, the longest, are compiled by ``use_backend``.
    """
    if torch.device(device).type != "cuda" or triton is None or dtype == torch.float32:
        return
    from mamba_ginr.kernels import add_norm_triton, causal_conv_triton, mlp_triton

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    def conv() -> None:
        x, weight, bias = zeros(1, 128, 4 * dim, dtype=dtype), zeros(4 * dim, 4), zeros(4 * dim)
        y = causal_conv_triton.conv_forward(x, weight, bias, True)
        causal_conv_triton.conv_backward(y, x, weight, bias, True, torch.empty_like(x))

    def mlp(width: int, hidden: int, gelu: bool) -> None:
        x, weight = zeros(128, width, dtype=dtype), zeros(hidden, width, dtype=dtype)
        y, kept = mlp_triton._mlp(x, weight, zeros(hidden), weight.t().contiguous(), gelu, True)
        mlp_triton._mlp_backward(y, kept, x, weight, weight.t().contiguous(), gelu)

    def norm(branch: torch.Tensor | None) -> None:
        vector = zeros(dim)
        inputs = zeros(128, dim), branch, None if branch is None else vector
        total, normed = add_norm_triton._add_norm(*inputs, vector, vector, 1e-5, dtype)
        add_norm_triton._add_norm_backward(normed, normed, total, vector, 1e-5)

    with threads_of(device) as pool:
        pool.submit(conv)
        pool.submit(mlp, dim, 4 * dim, True)
        pool.submit(mlp, decoder_dim, decoder_dim, False)
        pool.submit(norm, None)
        pool.submit(norm, zeros(128, dim, dtype=dtype))
