"""Training: flags to a model, a data set and a Trainer; checkpoints, metrics and resumption."""
