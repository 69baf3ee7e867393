"""A package for a new plugin, written from templates."""

TEMPLATES = {"guard": "invarlock.guards", "adapter": "invarlock.adapters", "hooks": "invarlock.hooks"}
"""The kinds of plugins that there are templates for, and the group of their entry point."""
