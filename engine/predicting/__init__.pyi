from .table import Predictions as Predictions
from .table import read as read
from .table import write as write
from .tuned import Tuned as Tuned
from .tuned import load as load
