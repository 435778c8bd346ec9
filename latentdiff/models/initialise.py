"""How weights start before training; the constructors leave it out, so that a network on `meta` costs nothing."""

from torch import nn


def init_for_training(module: nn.Module) -> None:
    """Draw all weights anew, in place, and set the last layer of every res block, transformer and U-Net to zero.

    Each block then starts as the identity and the U-Net's output as zero (Ho et al. 2020 do so in their code;
    Goyal et al. 2017, arXiv 1706.02677, sec. 5.1, found that it steadies early training). It also fills a network that
    came from `meta` by `to_empty`.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.GroupNorm | nn.LayerNorm):
            layer.reset_parameters()
    for name, layer in module.named_modules():
        if name.endswith((".conv2", ".proj_out")) or name == "conv_out":
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
