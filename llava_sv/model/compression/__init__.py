"""Turning dense visual tokens into fewer: selection, merging, summaries. Functions and small modules on tensors."""
