from .launching import launching_seconds as launching_seconds
from .micro_batch import fastest as fastest
from .micro_batch import settled as settled
