"""The names of the backends, which dispatch, tuning records and messages share."""

# The kernels of torch's scaled_dot_product_attention. Its own choice among them is the backend `torch`.
SDPA = ("sdpa_cudnn", "sdpa_flash", "sdpa_efficient")

# The order of `auto` without measurements. `torch` is a kernel of torch's library for operators whose reference is not.
BACKENDS = ("triton", "cuda", "cpu", "torch", *SDPA, "reference")
