"""What plugins and the pipeline share: the class form of a plugin, results, errors. Imports no torch."""
