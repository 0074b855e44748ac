"""What knows nothing of images: files, devices, ranks."""
