"""MiDaS: relative depth from one image, as Stable Diffusion 2's depth model is conditioned on it."""
