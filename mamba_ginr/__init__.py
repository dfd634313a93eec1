"""What MAMBA-GINR's notebook needs and a reader of the method does not come for; see ``mamba_ginr.kernels``."""
