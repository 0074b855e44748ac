"""Data sets, cached latents, and the batches that training makes of them."""
