"""What lies behind the one door for weights, `ldm.inference.checkpoint`: files, names of keys, families, diffusers folders, LoRA files."""
