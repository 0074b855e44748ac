"""Floor 3: data sets and cached latents."""
