from .bit import Bit as Bit
from .bit import build as build
from .family import MEMBERS as MEMBERS
from .family import cost as cost
from .weights import apply as apply
from .weights import load as load
