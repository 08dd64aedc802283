"""`make gpu`: build on a machine with a GPU, measure, test, look for races, and record the results in 9 minutes.

`make gpu-rehearsal` runs the same steps on a machine without a GPU, with tiny sizes. The emulator runs our CUDA kernels
and the interpreter Triton's, and gloo replaces NCCL. `python -m benchmarks.gpu --dry-run` lists the requirements.

The modules that run before the package is built (`__main__`, `steps`, `runner`, `needs`, `summary`) import only the
standard library.
"""
