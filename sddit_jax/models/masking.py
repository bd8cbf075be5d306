"""Which tokens the student sees: drawing masks, taking tokens out and putting them back."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sddit_jax.errors import ConfigError
from sddit_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class MaskingConfig:
    """Which tokens the student's encoder does not see, and what the decoder gets in their place."""

    ratio: float = setting(0.2, "S", "share of the student's tokens made invisible, in [0, 1)")
    fill: str = setting(
        "noisy",
        "P",
        "decoder input there: 'noisy' tokens, a learnt 'mask_token', or 'zeros' (MaskDiT with and without its loss on "
        "masked patches)",
        choices=("noisy", "mask_token", "zeros"),
    )

    def check(self) -> None:
        """Raises ConfigError for a share outside of [0, 1)."""
        if not 0 <= self.ratio < 1:
            raise ConfigError(f"masking.ratio is {self.ratio}, but must be in [0, 1)")


class Mask(NamedTuple):
    """Positions per image, int32, both in raster order, and the permutation that undoes the split.

    `restore_BN[b, n]` is where token n stands in the concatenation of visible and hidden tokens.
    """

    visible_BV: jax.Array
    hidden_BM: jax.Array
    restore_BN: jax.Array


def visible_count(tokens: int, ratio: float) -> int:
    """floor(tokens * (1 - ratio)), and what is exact in decimals does not fall to rounding: (10, 0.9) -> 1."""
    return math.floor(tokens * (1 - ratio) + 1e-9)


def sample_mask(key: jax.Array, batch: int, tokens: int, ratio: float) -> Mask:
    """A uniformly random set of visible tokens for each image. The ratio decides shapes, so it is static."""
    order_BN = jnp.argsort(jax.random.uniform(key, (batch, tokens)), axis=1)
    visible = visible_count(tokens, ratio)
    visible_BV = jnp.sort(order_BN[:, :visible], axis=1)
    hidden_BM = jnp.sort(order_BN[:, visible:], axis=1)
    return Mask(visible_BV, hidden_BM, jnp.argsort(jnp.concatenate([visible_BV, hidden_BM], axis=1), axis=1))


def take(tokens_BND: jax.Array, positions_BV: jax.Array) -> jax.Array:
    """The tokens at the given positions of each image: [B, V, D]."""
    return jnp.take_along_axis(tokens_BND, positions_BV[:, :, None], axis=1)


def put_back(visible_BVD: jax.Array, hidden_BMD: jax.Array, mask: Mask) -> jax.Array:
    """Visible and hidden tokens in raster order: [B, N, D]."""
    return take(jnp.concatenate([visible_BVD, hidden_BMD], axis=1), mask.restore_BN)
