"""Public addresses of generative-models, which SDXL's configs and notebooks name; everything in here is defined in `ldm`."""
