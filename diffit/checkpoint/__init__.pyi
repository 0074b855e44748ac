from .config import CheckpointConfig as CheckpointConfig
from .config import default_config as default_config
from .resolve import find_checkpoint as find_checkpoint
from .weights import load_model as load_model
from .weights import load_weights as load_weights
from .weights import save_checkpoint as save_checkpoint
