"""The plan of each attempt: as configured, repaired after a rollback, or searched."""
