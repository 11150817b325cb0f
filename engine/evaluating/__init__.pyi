from .case import Case as Case
from .case import load as load
from .evaluation import Evaluation as Evaluation
from .evaluation import evaluate as evaluate
from .report import Asked as Asked
from .report import Report as Report
from .report import assess as assess
