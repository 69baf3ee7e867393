"""Model loaders."""
