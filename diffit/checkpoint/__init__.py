"""Weights: the config in a checkpoint's metadata, where a checkpoint is (resolve), loading and saving it (weights)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
