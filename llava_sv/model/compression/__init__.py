"""Turning dense visual tokens into fewer: selection, merging, summaries. Pure functions and small modules on tensors."""
