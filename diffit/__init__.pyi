from .checkpoint.weights import load_model as load_model
from .models.config import create_model as create_model
from .models.image import ImageDiffiT as ImageDiffiT
from .models.latent import DiffiT as DiffiT
from .pipeline import DiffiTPipeline as DiffiTPipeline
from .sampling.images import ImageSampler as ImageSampler
from .sampling.images import sample_images as sample_images

__version__: str
