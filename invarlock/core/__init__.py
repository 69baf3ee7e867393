"""Errors, results, plain data and progress, which everything else shares. Needs no torch but for ``lazy``."""
