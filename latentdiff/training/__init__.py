"""Training: data, the three networks' losses and loops, EMA, checkpoints."""
