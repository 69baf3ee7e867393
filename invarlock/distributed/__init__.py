"""Several processes on one run: how they meet, share work, and hold parts of one model."""
