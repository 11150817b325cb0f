from .loading import load as load
from .loading import to_yaml as to_yaml
from .schema import FinetuneConfig as FinetuneConfig
from .schema import PretrainConfig as PretrainConfig
