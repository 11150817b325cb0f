"""What fine-tuning adds: targets, shots, the BiT-HyperRule, sweeps, results."""
