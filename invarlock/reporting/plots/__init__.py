"""Plots of a report as SVG, to stand in a page: colours are the page's, and no text of a model or a plugin is in them.

Names go into the tables below the plots, where they can be escaped, wrapped and read aloud.
"""
