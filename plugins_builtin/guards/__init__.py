"""Judges of an edit."""
