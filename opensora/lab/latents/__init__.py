"""Whether an autoencoder's latents are what a diffusion model expects of them, and the figures that make them so."""
