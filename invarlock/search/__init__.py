"""The smallest model that passes: how much each weight matters, and bits allocated by it."""
