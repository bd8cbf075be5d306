"""Masks of the student's tokens: drawing them, taking visible tokens out, putting tokens back."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sddit_jax.errors import ConfigError
from sddit_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class MaskingConfig:
    """Which tokens are invisible to the student's encoder, and what the decoder gets in their place."""

    ratio: float = setting(
        0.2, "S", "fraction of the student's tokens that are invisible, in [0, 1), drawn anew at each step; 0: none"
    )
    fill: str = setting(
        "noisy",
        "P",
        "what the decoder gets for an invisible token: the 'noisy' token itself, a learnt 'mask_token' (MaskDiT), or "
        "'zeros' (MaskDiT without its reconstruction loss)",
        choices=("noisy", "mask_token", "zeros"),
    )

    def check(self, prefix: str) -> None:
        """Raises ConfigError for a ratio outside [0, 1)."""
        if not 0 <= self.ratio < 1:
            raise ConfigError(f"{prefix}ratio is {self.ratio}, but must be in [0, 1)")


class Mask(NamedTuple):
    """The positions of visible and hidden tokens in each image, int32, both in raster order.

    restore_BN[b, n]: where token n stands in the concatenation of visible and hidden tokens.
    """

    visible_BV: jax.Array
    hidden_BM: jax.Array
    restore_BN: jax.Array


def visible_count(tokens: int, ratio: float) -> int:
    """The number of visible tokens: floor(tokens * (1 - ratio)) in decimal arithmetic, so that (10, 0.9) gives 1."""
    return math.floor(tokens * (1 - ratio) + 1e-9)


def sample_mask(key: jax.Array, batch: int, tokens: int, ratio: float) -> Mask:
    """A uniformly random set of visible tokens for each image. ratio: fraction of invisible tokens, a static number."""
    order_BN = jnp.argsort(jax.random.uniform(key, (batch, tokens)), axis=1)
    visible = visible_count(tokens, ratio)
    visible_BV = jnp.sort(order_BN[:, :visible], axis=1)
    hidden_BM = jnp.sort(order_BN[:, visible:], axis=1)
    return Mask(visible_BV, hidden_BM, jnp.argsort(jnp.concatenate([visible_BV, hidden_BM], axis=1), axis=1))


def take(tokens_BND: jax.Array, positions_BV: jax.Array) -> jax.Array:
    """The tokens at the positions of each image: [B, N, D] and [B, V] -> [B, V, D]."""
    return jnp.take_along_axis(tokens_BND, positions_BV[:, :, None], axis=1)


def put_back(visible_BVD: jax.Array, hidden_BMD: jax.Array, mask: Mask) -> jax.Array:
    """Visible and hidden tokens together, in raster order: [B, N, D]."""
    return take(jnp.concatenate([visible_BVD, hidden_BMD], axis=1), mask.restore_BN)
