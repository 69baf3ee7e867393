"""The plugin framework: find plugins, bring them to one form, call their hooks."""
