"""The CPU's native path: C++ for AVX-512, compiled on the machine that runs it."""
