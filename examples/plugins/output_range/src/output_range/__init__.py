"""output_range: a guard for InvarLock, as a class."""
