"""The FLOPs of an image on paper: those of its matrix products, a multiplication and an addition each.

Every implementation needs them: nothing is counted that is recomputed, and no attention to masked tokens.
"""

from sddit_jax.config.parts import make_parts
from sddit_jax.config.schema import Config
from sddit_jax.models import arithmetic
from sddit_jax.models.masking import visible_count


def training(config: Config) -> dict[str, float]:
    """FLOPs per image of a training step, by part: "encoder", "decoder" and what the objectives add.

    The backward pass has two products for each product of the forward pass. The embeddings need no gradient of their
    input, so they have one.
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
    """FLOPs per image of one call of the network by a sampler without guidance."""
    m = config.model
    return arithmetic.encoder(m, m.tokens) + arithmetic.decoder(m, m.tokens)
