"""What leaves the engine: a tuned network as ONNX, as a program of torch.export, and as a folder for timm."""

import lazy_loader

# The names in the stub beside this file are for others; each is imported when it is first asked for.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
