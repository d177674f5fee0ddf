"""The paper's figures and theory, redrawn from any checkpoint and pictures: one file a `llava-sv analyze` command."""
