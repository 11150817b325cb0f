"""AGC-SGD over flat parameters: the optimizer, its compiled operators, and standardized weights."""
