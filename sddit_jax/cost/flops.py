"""The arithmetic of an image, counted on paper: matrix products only, a multiplication and an addition each.

What no implementation can do without: nothing that is recomputed, and no attention to masked tokens.
"""

from sddit_jax.config.parts import make_parts
from sddit_jax.config.schema import Config
from sddit_jax.models import arithmetic
from sddit_jax.models.masking import visible_count


def training(config: Config) -> dict[str, float]:
    """Operations per image of a training step, by part: the encoder, the decoder and what the objectives add.

    A backward pass is two products for each of the forward pass; the first layers have no gradient of their input.
    """
    m = config.model
    visible = visible_count(m.tokens, config.masking.ratio)
    bridged = m.tokens if config.masking.fill == "noisy" else visible
    first = arithmetic.embeddings(m) - 2 * m.width**2
    parts = {
        "encoder": 3 * arithmetic.encoder(m, visible) - first,
        "decoder": 3 * arithmetic.decoder(m, bridged),
    }
    for objective in make_parts(config).objectives:
        for part, operations in objective.flops(visible).items():
            parts[part] = parts.get(part, 0) + operations
    return parts


def sampling(config: Config) -> float:
    """Operations per image of one pass of the network as a sampler calls it, without guidance."""
    m = config.model
    return arithmetic.encoder(m, m.tokens) + arithmetic.decoder(m, m.tokens)
