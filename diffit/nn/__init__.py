"""Tensor modules that know nothing of images, classes or diffusion."""
