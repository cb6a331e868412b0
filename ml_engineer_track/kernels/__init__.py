"""GPU kernels of our own, in Triton: each file has the kernel, the same in plain PyTorch, and the operator that picks one."""
