"""numba backends: fast on any processor."""
