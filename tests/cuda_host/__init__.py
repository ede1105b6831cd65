"""CUDA text on the CPU: test equipment."""
