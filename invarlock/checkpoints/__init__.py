"""What is written to disk: to the side first, then renamed into place."""
