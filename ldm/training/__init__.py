"""Training from a config: the command line, the run, its callbacks and its checkpoints."""
