"""Checkpoints on disk: read tensor by tensor; written to the side first, then renamed into place."""
