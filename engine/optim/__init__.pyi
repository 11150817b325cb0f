from .agc_adamw import AgcAdamW as AgcAdamW
from .agc_sgd import AgcSgd as AgcSgd
from .flat import FlatParameters as FlatParameters
from .groups import named_groups as named_groups
from .standardized import StandardizedWeights as StandardizedWeights
