"""Talking with a checkpoint."""
