"""Evidence that a stranger can check: what a report says of itself, recomputed; and signatures."""
