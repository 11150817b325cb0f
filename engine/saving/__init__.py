"""What keeps a run safe: checkpoints that are whole or not there, and that a run stops in good order."""

import lazy_loader

# The names in the stub beside this file are for others; each is imported when it is first asked for.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
