"""A network of a few parameters, one of which takes part in nothing."""

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.GroupNorm(1, 5)
        self.head = nn.Linear(5, 7)
        self.unused = nn.Parameter(torch.randn(3))

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).mean((2, 3)))
