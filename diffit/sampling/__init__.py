"""Sampling: from noise to images in memory, and from a command line to a folder of samples."""
