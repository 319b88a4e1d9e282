"""Latent diffusion models: configs, training and sampling."""
