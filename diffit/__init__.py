"""DiffiT: diffusion vision transformers (ECCV 2024), an open implementation.

`from diffit import DiffiT, create_model, load_model, sample_images, ImageSampler, DiffiTPipeline`. Nothing heavy is
imported until it is used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
