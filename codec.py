"""A small learned video codec: every frame by itself, deterministic, unit-variance latents.

The latent is standardised by a batch norm without parameters and gets noise of a fixed size while the codec
learns. That is a variational autoencoder with the variance held fixed: the noise, not a KL weight, sets how
much a latent may say. And latents are asked to move in straight lines: three frames at equal distances shall
have latents at equal distances. Without that a pixel's motion is a tangle in latent space which a small
transformer cannot follow: it learns colours and shapes, and no motion at all (docs/log.md).
"""

from collections.abc import Callable

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from config import BadInput, Config


class _Res(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Codec(nn.Module):
    """Pixels (b F 3 H W) in [0, 1] ↔ latents (b F c H/8 W/8) of unit variance. Frames are independent."""

    time_stride = 1

    def __init__(self, cfg: Config, width: int = 96):
        super().__init__()
        if cfg.stride != 8 or cfg.time_stride != self.time_stride:
            given = f"stride={cfg.stride} time_stride={cfg.time_stride}"
            raise BadInput(f"{given} is not possible with the learned codec; allowed: 8, {self.time_stride}")
        self.noise, self.straight = cfg.codec_noise, cfg.codec_straight
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(12, width // 3, 3, padding=1), nn.SiLU(),
            nn.Conv2d(width // 3, 2 * width // 3, 3, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(2 * width // 3, width, 3, stride=2, padding=1),
            _Res(width), nn.SiLU(), nn.Conv2d(width, cfg.channels, 1),
        )  # fmt: skip
        self.unit = nn.BatchNorm2d(cfg.channels, affine=False, momentum=0.02)
        self.decoder = nn.Sequential(
            nn.Conv2d(cfg.channels, width, 3, padding=1), _Res(width), _Res(width),
            nn.Conv2d(width, 4 * width // 2, 1), nn.PixelShuffle(2), _Res(width // 2),
            nn.Conv2d(width // 2, 4 * width // 3, 1), nn.PixelShuffle(2), _Res(width // 3), nn.SiLU(),
            nn.Conv2d(width // 3, 12, 3, padding=1), nn.PixelShuffle(2),
        )  # fmt: skip

    def encode(self, video01: Tensor) -> Tensor:
        """(b F 3 H W) in [0, 1] → (b F c h w). Raises ValueError outside that range."""
        low, high = video01.aminmax()
        if low < -1e-3 or high > 1 + 1e-3:
            raise ValueError(f"video01 must lie in [0, 1]; it spans [{low:.3f}, {high:.3f}]")
        z = self.unit(self.encoder(rearrange(video01, "b f c h w -> (b f) c h w") * 2 - 1))
        return rearrange(z, "(b f) c h w -> b f c h w", b=len(video01))

    def decode(self, x: Tensor) -> Tensor:
        """(b F c h w) → (b F 3 H W) in [0, 1]. Frame by frame, so a stream decodes chunk by chunk."""
        return self._decode(x).clamp(0, 1)

    def stream(self) -> Callable[[Tensor], Tensor]:
        """A decoder for a clip's latents part after part. Frames are independent: it needs no memory."""
        return self.decode

    def _decode(self, x: Tensor) -> Tensor:
        pixels = self.decoder(rearrange(x, "b f c h w -> (b f) c h w"))
        return rearrange(pixels, "(b f) c h w -> b f c h w", b=len(x)) / 2 + 0.5

    def loss(self, video01: Tensor, noise: Tensor) -> Tensor:
        """Reconstruction of (b 3 3 H W) through noised latents, and bend over change of the latents' path,
        |z0 - 2 z1 + z2|² / |z2 - z0|².

        The ratio leaves the size of the change alone; the bend by itself would shrink whatever moves against
        the background.
        """
        z = self.encode(video01)
        out = self._decode(z + self.noise * noise)
        z0, z1, z2 = z.float().unbind(1)
        bend, change = (z0 - 2 * z1 + z2).square().mean(), (z2 - z0).square().mean().clamp(min=1e-6)
        return F.mse_loss(out, video01) + 0.1 * F.l1_loss(out, video01) + self.straight * (bend / change)
