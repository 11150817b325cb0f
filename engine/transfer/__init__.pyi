from .plan import Plan as Plan
from .plan import finetuning as finetuning
from .results import Result as Result
from .results import read as read
from .results import score as score
