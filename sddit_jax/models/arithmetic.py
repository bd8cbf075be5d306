"""The network's arithmetic for an image, counted on paper: matrix products, a multiplication and an addition each.

What no implementation can do without: nothing that is recomputed, and no attention to masked tokens.
"""

from sddit_jax.models.layers import FREQUENCIES
from sddit_jax.models.transformer import ModelConfig


def embeddings(m: ModelConfig) -> float:
    """Of patches and noise levels; all tokens are embedded, seen or not."""
    return 2 * (m.tokens * m.patch**2 * m.channels * m.width + (FREQUENCIES + m.width) * m.width)


def encoder(m: ModelConfig, visible: int) -> float:
    """Embeddings, and the blocks on `visible` patch tokens and [CLS]."""
    tokens = visible + m.cls_token
    return embeddings(m) + m.depth * _block(tokens, m.width, m.mlp_ratio, condition=m.width)


def decoder(m: ModelConfig, bridged: int) -> float:
    """Bridge, blocks and final layer; `bridged` tokens pass the bridge."""
    outputs = m.patch**2 * m.channels * (1 + m.learn_sigma)
    if not m.decoder_depth:
        return _projection(m.tokens, m.width, outputs, condition=m.width)
    return (
        _projection(bridged, m.width, m.decoder_width, condition=m.width)
        + m.decoder_depth * _block(m.tokens, m.decoder_width, m.mlp_ratio, condition=m.width)
        + _projection(m.tokens, m.decoder_width, outputs, condition=m.width)
    )


def _block(tokens: int, width: int, mlp_ratio: float, condition: int) -> float:
    """Queries, keys, values and output; logits and their use; MLP; modulation."""
    linear = 4 * width**2 + 2 * width * int(width * mlp_ratio)
    return 2 * (tokens * linear + 2 * tokens**2 * width + condition * 6 * width)


def _projection(tokens: int, width: int, outputs: int, condition: int) -> float:
    return 2 * (tokens * width * outputs + condition * 2 * width)
