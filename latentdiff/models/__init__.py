"""The networks: U-Net, autoencoders and the attention they share. Knows nothing of the rest of the package."""
