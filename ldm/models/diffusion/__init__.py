"""Diffusion models and their samplers."""
