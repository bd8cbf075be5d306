"""The state_dicts of the public MaskDiT and DiT codes, name by name, and ours.

A layout lists the tensors of a network in the order of that code's state_dict, each with the tensor of pytorch.py that
it holds. Both codes keep the fixed positions as tensors.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from sddit_jax.config.presets import default_config
from sddit_jax.config.sizes import SIZES
from sddit_jax.errors import WeightsError
from sddit_jax.interop.state_dict import places
from sddit_jax.method.codec import STABLE_DIFFUSION_SCALE
from sddit_jax.models.layers import positions_2d
from sddit_jax.models.transformer import ModelConfig, Network
from sddit_jax.weights.files import Tensor, misfits, read_finite

# The decoder of MaskDiT's code, the same for every size: depth, width -> heads.
MASKDIT_DECODERS = {(8, 512): 16}

PREFIXES = ("module.", "_orig_mod.", "model.")
# Positions lie in [-1, 1]: what rounding to bfloat16 does to them, and nothing else.
POSITION_TOLERANCE = 2**-8

BLOCK = {
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.out",
    "mlp.fc1": "mlp.hidden",
    "mlp.fc2": "mlp.out",
    "adaLN_modulation.1": "modulation.linear",
}


class Entry(NamedTuple):
    """A tensor of a layout: ours that it holds (None: the fixed positions, `value`), its shape, if it is transposed."""

    ours: str | None
    shape: tuple[int, ...]
    transposed: bool = False
    value: np.ndarray | None = None

    def to_file(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """What stands in the file, from the arrays of our state_dict."""
        if self.ours is None:
            return self.value
        array = arrays[self.ours]
        return np.ascontiguousarray((array.T if self.transposed else array).reshape(self.shape))

    def from_file(self, array: np.ndarray) -> np.ndarray:
        """What stands in our state_dict, but for its shape."""
        return array.T if self.transposed else array


Entries = dict[str, Entry]
Shapes = Mapping[str, tuple[int, ...]]


class Layout(NamedTuple):
    """A code's layout of parameters.

    entries: the layout of a network, of as much of it as the code has a place for. infer: the configuration that the
    shapes of a file tell. prefix: what the code puts before every name.
    """

    name: str
    entries: Callable[[Network], Entries]
    infer: Callable[[Shapes], ml_collections.ConfigDict] | None = None
    prefix: str = ""


def _own_entries(network: Network) -> Entries:
    return {name: Entry(name, place.shape) for name, place in places(network).items()}


def _maskdit_entries(network: Network) -> Entries:
    """Labels are a linear map without bias, [D, classes], of a one-hot vector that is zero for the null label."""
    m, ours = network.model, _own_entries(network)
    entries = {"pos_embed": _positions(m.width, m)}
    if m.decoder_depth:
        entries["decoder_pos_embed"] = _positions(m.decoder_width, m)
        if "decoder.mask_token" in ours:
            entries["mask_token"] = Entry("decoder.mask_token", (1, 1, m.decoder_width))
    entries |= _embeddings(ours)
    if m.num_classes and m.null_label == "zero":
        entries["y_embedder.embedding_table.weight"] = Entry("encoder.label.table", (m.width, m.num_classes), True)
    entries |= _blocks(ours, "blocks", "encoder", m.depth)
    if m.decoder_depth:
        entries |= _linear(ours, "decoder_layer.linear", "decoder.bridge.linear")
        entries |= _linear(ours, "decoder_layer.adaLN_modulation.1", "decoder.bridge.modulation.linear")
        entries |= _blocks(ours, "decoder_blocks", "decoder", m.decoder_depth)
    return entries | _final(ours)


def _dit_entries(network: Network) -> Entries:
    """Labels are a table, the null label its last row."""
    m, ours = network.model, _own_entries(network)
    entries = {"pos_embed": _positions(m.width, m)} | _embeddings(ours)
    if m.num_classes and m.null_label == "row":
        entries["y_embedder.embedding_table.weight"] = Entry("encoder.label.table", (m.num_classes + 1, m.width))
    entries |= _blocks(ours, "blocks", "encoder", m.depth)
    return entries | _final(ours)


def _infer_maskdit(shapes: Shapes) -> ml_collections.ConfigDict:
    """MaskDiT's training for the network of these shapes; without a mask token, without its loss on masked patches."""
    depth = _depth(shapes, "decoder_blocks")
    config = default_config("maskdit" if depth else "dit")
    table = shapes.get("y_embedder.embedding_table.weight", (0, 0))
    with config.unlocked():
        config.model.update(_encoder(shapes, classes=table[1]))
        if depth:
            width = _shape(shapes, "decoder_pos_embed", 3)[2]
            if (depth, width) not in MASKDIT_DECODERS:
                raise WeightsError(_unknown(f"a decoder of depth {depth} and width {width}"))
            heads = MASKDIT_DECODERS[depth, width]
            config.model.update({"decoder_depth": depth, "decoder_width": width, "decoder_heads": heads})
        if depth and "mask_token" not in shapes:
            config.masking.fill = "zeros"
            config.objectives.reconstruction.weight = 0.0
    return _trained_on_latents(config)


def _infer_dit(shapes: Shapes) -> ml_collections.ConfigDict:
    """DiT's network with its own DDPM; the variance that it learnt is used by the sampler, not trained."""
    config = default_config("dit")
    table = shapes.get("y_embedder.embedding_table.weight", (1, 0))
    with config.unlocked():
        config.model.update(_encoder(shapes, classes=table[0] - 1))
        config.model.null_label = "row"
        outputs = _shape(shapes, "final_layer.linear.bias", 1)[0] // config.model.patch**2
        config.model.learn_sigma = outputs == 2 * config.model.channels
        config.diffusion.name = "ddpm"
        config.sampling.solver, config.sampling.steps = "ddpm", 250
    return _trained_on_latents(config)


OWN = Layout("sddit_jax", _own_entries)
MASKDIT = Layout("MaskDiT", _maskdit_entries, _infer_maskdit, prefix="model.")
DIT = Layout("DiT", _dit_entries, _infer_dit)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors, without the prefix of their names."""
    prefix = shared_prefix(tensors)
    return {name.removeprefix(prefix): tensor.shape for name, tensor in tensors.items()}


def shared_prefix(names: Iterable[str]) -> str:
    """What all names start with and says nothing: prefixes of torch's wrappers, and MaskDiT's `model.`."""
    names, found = list(names), ""
    while added := next((p for p in PREFIXES if names and all(name.startswith(found + p) for name in names)), ""):
        found += added
    return found


def homeless(layout: Layout, network: Network) -> list[str]:
    """The tensors of a network that a code has no place for."""
    held = {entry.ours for entry in layout.entries(network).values()}
    return [name for name in places(network) if name not in held]


def fit(
    layout: Layout, network: Network, tensors: Mapping[str, Tensor], where: str, *, partial: bool
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The tensors of a file as arrays of our state_dict, float32, and a line for each that does not fit.

    where: names the file. Raises WeightsError with all the lines if there are any, unless `partial`: then what does not
    fit is left out, and it is an error if nothing is left.
    """
    prefix, entries = shared_prefix(tensors), layout.entries(network)
    faults = misfits(tensors, {prefix + name: entry.shape for name, entry in entries.items()})
    faults |= {name: f"{name} is missing, for which {layout.name} has no place" for name in homeless(layout, network)}
    arrays = {}
    for name, entry in entries.items():
        full = prefix + name
        if full in faults:
            continue
        array = read_finite(full, tensors[full], faults)
        if full in faults:
            continue
        if entry.ours is not None:
            arrays[entry.ours] = entry.from_file(array)
        elif (off := float(np.abs(array - entry.value).max())) > POSITION_TOLERANCE:
            faults[full] = f"{full} is up to {off:.2g} off the fixed sine-cosine positions"
    lines = list(faults.values())
    if lines and not (partial and arrays):
        raise WeightsError(f"{where} does not fit this network:\n  " + "\n  ".join(lines))
    return arrays, lines


def few(names: list[str], most: int = 8) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _positions(width: int, m: ModelConfig) -> Entry:
    value = positions_2d(width, m.image_size // m.patch)[None]
    return Entry(None, value.shape, value=value)


def _linear(ours: Entries, name: str, own_name: str) -> Entries:
    return {f"{name}.{kind}": ours[f"{own_name}.{kind}"] for kind in ("weight", "bias")}


def _embeddings(ours: Entries) -> Entries:
    names = {"x_embedder.proj": "patch", "t_embedder.mlp.0": "time.hidden", "t_embedder.mlp.2": "time.out"}
    return {k: v for name, part in names.items() for k, v in _linear(ours, name, f"encoder.{part}").items()}


def _blocks(ours: Entries, name: str, part: str, depth: int) -> Entries:
    return {
        key: entry
        for i in range(depth)
        for theirs, own_name in BLOCK.items()
        for key, entry in _linear(ours, f"{name}.{i}.{theirs}", f"{part}.stack.blocks.{i}.{own_name}").items()
    }


def _final(ours: Entries) -> Entries:
    modulation = _linear(ours, "final_layer.adaLN_modulation.1", "decoder.final.modulation.linear")
    return _linear(ours, "final_layer.linear", "decoder.final.linear") | modulation


def _encoder(shapes: Shapes, classes: int) -> dict[str, Any]:
    """The keys of config.model that the shapes tell; the number of heads is that of the published size."""
    _, tokens, width = _shape(shapes, "pos_embed", 3)
    _, channels, patch, _ = _shape(shapes, "x_embedder.proj.weight", 4)
    depth = _depth(shapes, "blocks")
    heads = {(d, w): h for d, w, h in SIZES.values()}
    if (depth, width) not in heads:
        raise WeightsError(_unknown(f"{depth} blocks of width {width}"))
    if channels != 4:
        raise WeightsError(_unknown(f"{channels} channels, which are not those of Stable Diffusion's latents"))
    return {
        "image_size": round(tokens**0.5) * patch, "channels": channels, "num_classes": classes, "patch": patch,
        "depth": depth, "width": width, "heads": heads[depth, width],
    }  # fmt: skip


def _trained_on_latents(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    with config.unlocked():
        config.codec.name, config.codec.scale = "latents", (STABLE_DIFFUSION_SCALE,)
        config.ema.warmup = False
    return config


def _unknown(what: str) -> str:
    return f"the file has {what}: no published model, so --config must say which network this is"


def _shape(shapes: Shapes, name: str, axes: int) -> tuple[int, ...]:
    if len(shapes.get(name, ())) != axes:
        found = f"is of shape {shapes[name]}" if name in shapes else "is missing"
        raise WeightsError(f"{name} {found}, so the file does not tell its network; it has {few(list(shapes))}")
    return shapes[name]


def _depth(shapes: Shapes, name: str) -> int:
    numbers = [key.split(".")[1] for key in shapes if key.startswith(f"{name}.")]
    return max((int(n) for n in numbers if n.isdecimal()), default=-1) + 1
