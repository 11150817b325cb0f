from .find import find_source as find_source
from .find import kinds as kinds
from .options import Options as Options
from .spreading import pack as pack
