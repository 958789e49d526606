SAMPLERS = ("ancestral", "ddim", "dpm-solver++")
"""Ways to sample a network that predicts noise or clean latents."""
