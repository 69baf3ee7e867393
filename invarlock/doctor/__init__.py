"""Obstacles to a run, found before one is started."""
