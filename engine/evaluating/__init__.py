"""What predictions are worth: files of them are scored, compared, split by subgroups, shown as tables and figures."""

import lazy_loader

# The names in the stub beside this file are for others; each is imported when it is first asked for.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
