"""A reference: a baseline that was measured once, and is kept for many subjects."""
