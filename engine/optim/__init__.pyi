from .agc_sgd import AgcSgd as AgcSgd
from .agc_sgd import named_groups as named_groups
from .flat import FlatParameters as FlatParameters
from .standardized import StandardizedWeights as StandardizedWeights
