"""Distributions over latents."""
