"""Models that configs build: first stages and diffusion models."""
