"""Counting and timing: FLOPs on paper, training steps and answers on a clock."""
