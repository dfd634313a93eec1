"""The selective scan of Mamba (S6), behind one function with interchangeable backends.

Glossary, with the letters of Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State
Spaces" (arXiv 2312.00752), Section 3.2 and Algorithm 2:

    u      input sequence             delta  step size, positive, in units of one token
    h      state, one per channel     A      decay rate of the state per unit of delta, negative
    y      output sequence            B, C   how the input enters the state, how the state is read
    z      gate                       D      skip connection from input to output
"""

from mamba_ginr.kernels.selective_scan import chunked, mamba_ssm  # noqa: F401  (they register themselves)
from mamba_ginr.kernels.selective_scan.interface import selective_scan

__all__ = ["selective_scan"]
