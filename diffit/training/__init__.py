"""Floor 5, the parts of the training loop: parallelism, checkpoints, stopping, watching, previews, estimates."""
