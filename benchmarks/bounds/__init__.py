"""Lower bounds of the time of GPU kernels, from their machine code and published rates, without a GPU."""
