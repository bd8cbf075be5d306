"""The FLOPs of the network for one image, counted from its formulas; see `cost.flops`.

Only matrix products count, a multiplication and an addition as one FLOP each, and only those that every implementation
needs: no recomputation, and no attention to invisible tokens.
"""

from sddit_jax.models.layers import FREQUENCIES
from sddit_jax.models.transformer import ModelConfig


def embeddings(m: ModelConfig) -> float:
    """The embeddings of the noise level and of all patches, visible or not."""
    return 2 * (m.tokens * m.patch**2 * m.channels * m.width + (FREQUENCIES + m.width) * m.width)


def encoder(m: ModelConfig, visible: int) -> float:
    """Embeddings, and the blocks on `visible` patch tokens and [CLS]."""
    tokens = visible + m.cls_token
    return embeddings(m) + m.depth * _block(m, tokens, m.width)


def decoder(m: ModelConfig, bridged: int) -> float:
    """The bridge for `bridged` tokens, the blocks and the final layer."""
    outputs = m.patch**2 * m.channels * (1 + m.learn_sigma)
    if not m.decoder_depth:
        return _final_layer(m, m.tokens, m.width, outputs)
    bridge = _final_layer(m, bridged, m.width, m.decoder_width)
    blocks = m.decoder_depth * _block(m, m.tokens, m.decoder_width)
    return bridge + blocks + _final_layer(m, m.tokens, m.decoder_width, outputs)


def _block(m: ModelConfig, tokens: int, width: int) -> float:
    """Queries, keys, values and output; logits and their products with values; MLP; modulation."""
    linear = 4 * width**2 + 2 * width * int(width * m.mlp_ratio)
    return 2 * (tokens * linear + 2 * tokens**2 * width + m.width * 6 * width)


def _final_layer(m: ModelConfig, tokens: int, width: int, outputs: int) -> float:
    return 2 * (tokens * width * outputs + m.width * 2 * width)
