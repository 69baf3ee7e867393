"""A model: its structure, facts, state, a fingerprint of it, and a snapshot to restore it."""
