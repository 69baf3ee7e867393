"""What a model is: its facts, its state, a fingerprint of it, and a snapshot to bring it back."""
