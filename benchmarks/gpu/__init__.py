"""`make gpu`: build on a machine with a GPU, measure, test, look for races, and record the results, in 9 minutes.

`make gpu-rehearsal` runs the same steps on a machine without a GPU: our CUDA kernels under the emulator, Triton's under
its interpreter, gloo instead of NCCL, and tiny sizes. `python -m benchmarks.gpu --dry-run` lists the steps and what
each of them needs.

The modules that run before the package is built (`__main__`, `steps`, `runner`, `needs`, `summary`) import only the
standard library.
"""
