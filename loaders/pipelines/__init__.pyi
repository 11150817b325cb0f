from .batches import Batch as Batch
from .batches import eval_batches as eval_batches
from .batches import train_batches as train_batches
from .order import EvalPlan as EvalPlan
from .order import TrainPlan as TrainPlan
from .transform import Transform as Transform
