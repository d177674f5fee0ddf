"""Several processes on one node or many: how they are started, how they meet, and whether they agree."""
