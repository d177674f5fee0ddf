"""Asking a checkpoint a benchmark's questions, scoring and timing it."""
