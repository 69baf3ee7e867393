"""Formats in which an accepted model is saved."""
