"""The diffusion framework of generative-models (SDXL): continuous noise levels, preconditioned denoisers, guiders and samplers.

Configs name these files as `sgm.modules.diffusionmodules.*` and `sgm.models.diffusion`. The state of a sample is x = x0 + sigma eps
(EDM, arXiv:2206.00364), whatever the network was trained on.
"""
