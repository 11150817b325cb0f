from .checkpoint import Checkpoint as Checkpoint
from .checkpoint import find as find
