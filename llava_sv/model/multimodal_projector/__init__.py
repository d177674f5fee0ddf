"""Projectors: encoder features in, each image's `TokenGroups` out. The one place that decides roles."""
