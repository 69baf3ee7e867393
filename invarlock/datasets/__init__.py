"""Text, the model's own or somebody's, and the windows that are made of it."""
