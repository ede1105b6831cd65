"""Dense volumes made of 3D Gaussians from sparse slices."""
