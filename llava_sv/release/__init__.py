"""Making checkpoints into what others load."""
