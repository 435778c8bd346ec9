"""GroupNorm followed by SiLU, the pair that stands before every convolution of these networks."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def norm_silu(norm: nn.GroupNorm, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """silu(norm(x)) (Wu & He 2018, arXiv 1803.08494, eq. 1 and 2)."""
    return F.silu(norm(x))
