"""The Triton kernels and their launchers, a family a file: the only rooms that import triton.

Each family has `variants()`, what it ships as data, so that `kernels.gpu.compile` can compile all of it
without a GPU. Nothing here is imported before `kernels.dispatch` is asked for a kernel.
"""
