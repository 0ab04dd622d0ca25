"""The kernels on this machine's GPU, beside the best library there; or compiled and rehearsed without one."""
