from .checkpoint import load_model as load_model
from .models.config import create_model as create_model
from .models.image import ImageDiffiT as ImageDiffiT
from .models.latent import DiffiT as DiffiT

__version__: str
