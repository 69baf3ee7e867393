"""dead_rows: a guard as functions, and a timer around every guard."""
