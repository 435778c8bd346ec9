"""latentdiff: latent text-to-image diffusion."""
