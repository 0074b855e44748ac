"""Training: the loop, its step, and what they need: parallelism, checkpoints, EMA, logs, previews, estimates."""
