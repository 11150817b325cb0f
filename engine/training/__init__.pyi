from .run import Run as Run
from .run import rehearse as rehearse
from .run import train as train
from .trainer import Hook as Hook
from .trainer import Trainer as Trainer
