"""Data sets and the data module that serves them."""
