"""How good a model is, in numbers: distances between sets of pictures, a CLIP as judge, and `latentdiff evaluate` on top."""
