"""Floor 0: tensor modules that know nothing of images, classes or diffusion."""
