from .deployed import Deployed as Deployed
from .facts import Facts as Facts
from .writing import export as export
