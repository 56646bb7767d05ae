"""Encoder and decoder of VQGAN (Esser et al. 2021, table 7), with their sizes as parameters."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from vqkernels.checks import check_count, refuse
from vqkernels.models.autoencoder import ImageAutoencoder
from vqkernels.nn import Quantizer


class VQGAN(ImageAutoencoder):
    """The convolutional autoencoder of VQGAN.

    A level has `width * multiplier` channels and half the height and width of the one before. Encoder: a 3x3
    convolution; at each level `residual_blocks` blocks x + conv(swish(norm(conv(swish(norm(x)))))), each followed by
    self-attention at the levels of `attention`; at the coarsest level a block, attention and a block; norm, swish and
    a 3x3 convolution to `hidden_dim`, and a 1x1 convolution to `latent_dim`. The decoder mirrors it with one block
    more at each level. The defaults are the full size of the paper for 256x256 images: 5 levels, attention at 16x16.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        *,
        in_channels: int = 3,
        width: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        residual_blocks: int = 2,
        latent_dim: int = 256,
        hidden_dim: int | None = None,
        attention: Sequence[int] = (-1,),
    ) -> None:
        """Build the encoder and the decoder around a quantizer.

        Args:
            quantizer: maps (B, latent_dim, h, w) latents to `Quantized`, that is `channel_dim=1`.
            in_channels: channels of the images.
            width: channels of the first convolution.
            multipliers: channels of each level in units of `width`; height and width halve between levels.
            residual_blocks: residual blocks at each level of the encoder.
            latent_dim: channels of the latents, the D of the quantizer.
            hidden_dim: channels before and after the 1x1 convolutions around the quantizer; `latent_dim` if omitted.
            attention: levels with self-attention; 0 has the images' size, -1 is the coarsest.

        Raises:
            TypeError: if a size is not an int.
            ValueError: if a size is below 1, a count of blocks below 0, or a level is not there.
        """
        hidden_dim = latent_dim if hidden_dim is None else hidden_dim
        for name, value, minimum in (
            ("in_channels", in_channels, 1),
            ("width", width, 1),
            ("latent_dim", latent_dim, 1),
            ("hidden_dim", hidden_dim, 1),
            ("residual_blocks", residual_blocks, 0),
        ):
            check_count("VQGAN", name, value, minimum=minimum)
        levels = len(multipliers)
        if not levels:
            refuse(ValueError, "VQGAN", "multipliers", "name at least one level", "none", "Pass (1,) for one")
        for multiplier in multipliers:
            check_count("VQGAN", "multipliers", multiplier, minimum=1)
        for level in attention:
            if level not in range(-levels, levels):
                requirement = f"name levels from {-levels} to {levels - 1}"
                refuse(ValueError, "VQGAN", "attention", requirement, level, "Pass -1 for the coarsest")
        channels = [width * multiplier for multiplier in multipliers]
        attended = {level % levels for level in attention}
        encoder = nn.Sequential(
            *_down(in_channels, width, channels, residual_blocks, attended),
            *_last(channels[-1], hidden_dim),
            nn.Conv2d(hidden_dim, latent_dim, 1),
        )
        decoder = nn.Sequential(
            nn.Conv2d(latent_dim, hidden_dim, 1),
            *_up(hidden_dim, channels, residual_blocks + 1, attended),
            *_last(channels[0], in_channels),
        )
        super().__init__(encoder, quantizer, decoder, in_channels=in_channels, factor=2 ** (levels - 1))


def _down(
    in_channels: int, width: int, channels: list[int], blocks: int, attended: set[int]
) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, padding=1)]
    have = width
    for level, want in enumerate(channels):
        layers += _level(have, want, blocks, level in attended)
        # without a block the channels of the level before stay
        have = want if blocks else have
        if level < len(channels) - 1:
            layers.append(_Downsample(have))
    if have != channels[-1]:
        layers.append(nn.Conv2d(have, channels[-1], 1))
    return layers + _middle(channels[-1])


def _up(hidden_dim: int, channels: list[int], blocks: int, attended: set[int]) -> list[nn.Module]:
    have = channels[-1]
    layers: list[nn.Module] = [nn.Conv2d(hidden_dim, have, 3, padding=1), *_middle(have)]
    for level in reversed(range(len(channels))):
        layers += _level(have, channels[level], blocks, level in attended)
        have = channels[level]
        if level > 0:
            layers.append(_Upsample(have))
    return layers


def _level(have: int, want: int, blocks: int, attended: bool) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for block in range(blocks):
        layers.append(_Residual(want if block else have, want))
        if attended:
            layers.append(_Attention(want))
    return layers


def _middle(channels: int) -> list[nn.Module]:
    return [_Residual(channels, channels), _Attention(channels), _Residual(channels, channels)]


def _last(channels: int, out_channels: int) -> list[nn.Module]:
    return [_norm(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)]


def _norm(channels: int) -> nn.GroupNorm:
    # 32 groups as in the paper, but never of fewer channels than its smallest groups have
    most = min(32, max(1, channels // 4))
    groups = next(count for count in range(most, 0, -1) if channels % count == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class _Residual(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            _norm(in_channels),
            nn.SiLU(),
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            _norm(out_channels),
            nn.SiLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.branch(x)


class _Attention(nn.Module):
    """x + proj(softmax(q k^T / sqrt(C)) v) over all positions, with one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.projections = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.projections(self.norm(x)).flatten(2).mT[:, None]  # (B, 1, H W, 3 C)
        query, key, value = (part.contiguous() for part in rows.chunk(3, dim=-1))
        found = F.scaled_dot_product_attention(query, key, value)[:, 0]
        return x + self.out(found.mT.reshape(x.shape))


class _Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # a stride of 2 over an even size leaves one side without padding
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
