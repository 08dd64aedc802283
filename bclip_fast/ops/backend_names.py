"""The names of the backends, which dispatch, tuning records and messages share."""

# The order of `auto` without measurements. `torch` is a kernel of torch's library for operators whose reference is not.
BACKENDS = ("triton", "cuda", "cpu", "torch", "reference")
