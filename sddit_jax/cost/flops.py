"""The arithmetic of an image, counted on paper: matrix products only, a multiplication and an addition each.

What no implementation can do without: nothing that is recomputed, and no attention to masked tokens.
"""

from sddit_jax.config.schema import Config, Model
from sddit_jax.models.layers import FREQUENCIES
from sddit_jax.models.masking import visible_count


def training(config: Config) -> dict[str, float]:
    """Operations per image of a training step, by part: {encoder, decoder, teacher, prototypes}.

    A backward pass is two products for each of the forward pass; the first layers have no gradient of their input.
    """
    m, d = config.model, config.objectives.discrimination
    tokens = _tokens(m)
    visible = visible_count(tokens, config.masking.ratio)
    sees_noise = config.masking.fill == "noisy"
    first = _embeddings(m) - 2 * m.width**2
    parts = {
        "encoder": 3 * _encoder(m, visible) - first,
        "decoder": 3 * _decoder(m, tokens if sees_noise else visible),
    }
    if d.weight:
        # Student: visible tokens and [CLS]. The teacher's head sees all, and its prototypes what the student sees.
        head = 2 * (m.width * d.head_width + d.head_width**2 + d.head_width * d.bottleneck)
        logits = 2 * d.bottleneck * d.prototypes
        parts["encoder"] += 3 * head * (visible + m.cls_token)
        parts["teacher"] = _encoder(m, tokens) + head * (tokens + m.cls_token)
        parts["prototypes"] = (3 + 1) * logits * (visible + m.cls_token)
    return parts


def sampling(config: Config) -> float:
    """Operations per image of one pass of the network as a sampler calls it, without guidance."""
    tokens = _tokens(config.model)
    return _encoder(config.model, tokens) + _decoder(config.model, tokens)


def _tokens(m: Model) -> int:
    return (m.image_size // m.patch) ** 2


def _embeddings(m: Model) -> float:
    """Of patches and noise levels; all tokens are embedded, seen or not."""
    return 2 * (_tokens(m) * m.patch**2 * m.channels * m.width + (FREQUENCIES + m.width) * m.width)


def _encoder(m: Model, visible: int) -> float:
    tokens = visible + m.cls_token
    return _embeddings(m) + m.depth * _block(tokens, m.width, m.mlp_ratio, condition=m.width)


def _decoder(m: Model, bridged: int) -> float:
    """Bridge, blocks and final layer; `bridged` tokens pass the bridge."""
    tokens, outputs = _tokens(m), m.patch**2 * m.channels * (1 + m.learn_sigma)
    if not m.decoder_depth:
        return _projection(tokens, m.width, outputs, condition=m.width)
    return (
        _projection(bridged, m.width, m.decoder_width, condition=m.width)
        + m.decoder_depth * _block(tokens, m.decoder_width, m.mlp_ratio, condition=m.width)
        + _projection(tokens, m.decoder_width, outputs, condition=m.width)
    )


def _block(tokens: int, width: int, mlp_ratio: float, condition: int) -> float:
    """Queries, keys, values and output; logits and their use; MLP; modulation."""
    linear = 4 * width**2 + 2 * width * int(width * mlp_ratio)
    return 2 * (tokens * linear + 2 * tokens**2 * width + condition * 6 * width)


def _projection(tokens: int, width: int, outputs: int, condition: int) -> float:
    return 2 * (tokens * width * outputs + condition * 2 * width)
