"""Text to windows, one pass over them, taps on modules, and the paired comparison of two passes."""
