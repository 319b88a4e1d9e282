"""Measures of what a model draws."""
