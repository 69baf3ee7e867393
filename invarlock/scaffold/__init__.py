"""A package for a new plugin, written from templates."""
