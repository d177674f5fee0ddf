"""Checkpoints made ready for other uses than the run that wrote them."""
