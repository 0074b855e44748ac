"""Weights: what a checkpoint says of itself (config), where it is (resolve), and loading and saving it (weights)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
