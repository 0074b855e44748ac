"""The networks, and their sizes by name."""
