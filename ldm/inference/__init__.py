"""Drawing pictures with a trained model: weights, prompts, pipeline, what happens after the sampler."""
