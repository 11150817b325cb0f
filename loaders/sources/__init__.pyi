from .listing import Listing as Listing
from .listing import Table as Table
from .listing import TableBuilder as TableBuilder
