"""Weights that are stored as codes and scales: one module for each layout, which unpacks them tensor by tensor."""
