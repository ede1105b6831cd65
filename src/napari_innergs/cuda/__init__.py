"""Fast kernels on NVIDIA GPUs: CUDA text compiled by CuPy, in memory and on streams of PyTorch."""
