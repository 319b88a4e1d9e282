"""Latent diffusion models: configs, training and sampling."""

__version__ = "0.1.0"
