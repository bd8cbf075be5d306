"""Layouts of the public MaskDiT and DiT codes and of our own: which tensor of a file is which tensor of ours.

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

# Prefixes of all names: of torch's wrappers, and of MaskDiT's.
PREFIXES = ("module.", "_orig_mod.", "model.")
# Rounding to bfloat16 moves positions, which lie in [-1, 1], by at most this much.
POSITION_TOLERANCE = 2**-8

# Linear layers: name in the public codes -> our name.
BLOCK = {
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.out",
    "mlp.fc1": "mlp.hidden",
    "mlp.fc2": "mlp.out",
    "adaLN_modulation.1": "modulation.linear",
}
EMBEDDINGS = {
    "x_embedder.proj": "encoder.patch",
    "t_embedder.mlp.0": "encoder.time.hidden",
    "t_embedder.mlp.2": "encoder.time.out",
}
BRIDGE = {
    "decoder_layer.linear": "decoder.bridge.linear",
    "decoder_layer.adaLN_modulation.1": "decoder.bridge.modulation.linear",
}
FINAL = {
    "final_layer.linear": "decoder.final.linear",
    "final_layer.adaLN_modulation.1": "decoder.final.modulation.linear",
}


class Entry(NamedTuple):
    """A tensor of a file.

    ours: the name of our tensor that it holds; None for the fixed positions, whose values are `value`. shape: in the
    file. transposed: whether the file has the transpose of ours.
    """

    ours: str | None
    shape: tuple[int, ...]
    transposed: bool = False
    value: np.ndarray | None = None

    def to_file(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """The array to write. arrays: our state_dict."""
        if self.ours is None:
            return self.value
        array = arrays[self.ours]
        return np.ascontiguousarray((array.T if self.transposed else array).reshape(self.shape))


Entries = dict[str, Entry]
Shapes = Mapping[str, tuple[int, ...]]


class Layout(NamedTuple):
    """How a code names and shapes its parameters.

    name: the code. entries(network): name -> tensor, for the part of the network that the code can hold.
    infer(shapes): the configuration of the network in a file, from the shapes of the file's tensors by name; raises
    WeightsError for no published network. prefix: stands before every name in a file that the code writes.
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
    entries |= _linear(ours, EMBEDDINGS)
    if m.num_classes and m.null_label == "zero":
        entries["y_embedder.embedding_table.weight"] = Entry("encoder.label.table", (m.width, m.num_classes), True)
    entries |= _linear(ours, _blocks("blocks", "encoder", m.depth))
    if m.decoder_depth:
        entries |= _linear(ours, BRIDGE | _blocks("decoder_blocks", "decoder", m.decoder_depth))
    return entries | _linear(ours, FINAL)


def _dit_entries(network: Network) -> Entries:
    """Labels are a table whose last row is the null label."""
    m, ours = network.model, _own_entries(network)
    entries = {"pos_embed": _positions(m.width, m)} | _linear(ours, EMBEDDINGS)
    if m.num_classes and m.null_label == "row":
        entries["y_embedder.embedding_table.weight"] = Entry("encoder.label.table", (m.num_classes + 1, m.width))
    return entries | _linear(ours, _blocks("blocks", "encoder", m.depth) | FINAL)


def _infer_maskdit(shapes: Shapes) -> ml_collections.ConfigDict:
    """MaskDiT's training of the network; a file without a mask token is trained without the reconstruction loss."""
    depth = _depth(shapes, "decoder_blocks")
    config = default_config("maskdit" if depth else "dit")
    table = shapes.get("y_embedder.embedding_table.weight", (0, 0))
    with config.unlocked():
        config.model.update(_encoder(shapes, classes=table[1]))
        if depth:
            width = _shape(shapes, "decoder_pos_embed", 3)[2]
            if (depth, width) not in MASKDIT_DECODERS:
                raise _unknown(f"a decoder of depth {depth} and width {width}")
            heads = MASKDIT_DECODERS[depth, width]
            config.model.update({"decoder_depth": depth, "decoder_width": width, "decoder_heads": heads})
        if depth and "mask_token" not in shapes:
            config.masking.fill = "zeros"
            config.objectives.reconstruction.weight = 0.0
        config.codec.name, config.codec.scale = "latents", (STABLE_DIFFUSION_SCALE,)
    return config


def _infer_dit(shapes: Shapes) -> ml_collections.ConfigDict:
    """DiT's network with its DDPM. The sampler uses the learnt variance; training does not train it."""
    config = default_config("dit")
    table = shapes.get("y_embedder.embedding_table.weight", (1, 0))
    with config.unlocked():
        config.model.update(_encoder(shapes, classes=table[0] - 1))
        config.model.null_label = "row"
        outputs = _shape(shapes, "final_layer.linear.bias", 1)[0] // config.model.patch**2
        config.model.learn_sigma = outputs == 2 * config.model.channels
        config.diffusion.name = "ddpm"
        config.sampling.solver, config.sampling.steps = "ddpm", 250
        config.codec.name, config.codec.scale = "latents", (STABLE_DIFFUSION_SCALE,)
    return config


OWN = Layout("sddit_jax", _own_entries)
MASKDIT = Layout("MaskDiT", _maskdit_entries, _infer_maskdit, prefix="model.")
DIT = Layout("DiT", _dit_entries, _infer_dit)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors, without the prefix of their names."""
    prefix = shared_prefix(tensors)
    return {name.removeprefix(prefix): tensor.shape for name, tensor in tensors.items()}


def shared_prefix(names: Iterable[str]) -> str:
    """The `PREFIXES` that all names start with, such as 'module.model.'; empty if there is none."""
    names, found = list(names), ""
    while added := next((p for p in PREFIXES if names and all(name.startswith(found + p) for name in names)), ""):
        found += added
    return found


def homeless(layout: Layout, network: Network) -> list[str]:
    """The names of a network's tensors that a layout cannot hold."""
    held = {entry.ours for entry in layout.entries(network).values()}
    return [name for name in places(network) if name not in held]


def fit(
    layout: Layout, network: Network, tensors: Mapping[str, Tensor], where: str, *, partial: bool
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The float32 arrays of our state_dict in a file, but for their shapes, and a line for each tensor that misfits.

    where: the file, for messages. Raises WeightsError with these lines if there are any. With `partial` tensors that do
    not fit are left out, and only a file in which none fits is an error.
    """
    prefix, entries = shared_prefix(tensors), layout.entries(network)
    faults = misfits(tensors, {prefix + name: entry.shape for name, entry in entries.items()})
    faults |= {name: f"{name} is missing: {layout.name}'s files cannot hold it" for name in homeless(layout, network)}
    arrays = {}
    for name, entry in entries.items():
        full = prefix + name
        if full in faults:
            continue
        array = read_finite(full, tensors[full], faults)
        if full in faults:
            continue
        if entry.ours is not None:
            arrays[entry.ours] = array.T if entry.transposed else array
        elif (off := float(np.abs(array - entry.value).max())) > POSITION_TOLERANCE:
            faults[full] = f"{full} is up to {off:.2g} off the fixed sine-cosine positions"
    lines = list(faults.values())
    if lines and not (partial and arrays):
        raise WeightsError(f"{where} does not fit this network:\n  " + "\n  ".join(lines))
    return arrays, lines


def few(names: list[str]) -> str:
    """The first eight names, and how many more there are."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def _positions(width: int, m: ModelConfig) -> Entry:
    value = positions_2d(width, m.image_size // m.patch)[None]
    return Entry(None, value.shape, value=value)


def _linear(ours: Entries, names: Mapping[str, str]) -> Entries:
    """The weight and the bias of linear layers. names: name of a layer in the code -> our name."""
    return {f"{name}.{kind}": ours[f"{own}.{kind}"] for name, own in names.items() for kind in ("weight", "bias")}


def _blocks(name: str, part: str, depth: int) -> dict[str, str]:
    """The linear layers of all blocks: name in the code -> our name."""
    return {
        f"{name}.{i}.{theirs}": f"{part}.stack.blocks.{i}.{own}" for i in range(depth) for theirs, own in BLOCK.items()
    }


def _encoder(shapes: Shapes, classes: int) -> dict[str, Any]:
    """The keys of config.model that follow from the shapes; the heads are those of the published network."""
    _, tokens, width = _shape(shapes, "pos_embed", 3)
    _, channels, patch, _ = _shape(shapes, "x_embedder.proj.weight", 4)
    depth = _depth(shapes, "blocks")
    heads = {(d, w): h for d, w, h in SIZES.values()}
    if (depth, width) not in heads:
        raise _unknown(f"{depth} blocks of width {width}")
    if channels != 4:
        raise _unknown(f"{channels} channels, and Stable Diffusion's latents have 4")
    return {
        "image_size": round(tokens**0.5) * patch, "channels": channels, "num_classes": classes, "patch": patch,
        "depth": depth, "width": width, "heads": heads[depth, width],
    }  # fmt: skip


def _unknown(what: str) -> WeightsError:
    return WeightsError(f"the file has {what}: no published model, so --config must say which network this is")


def _shape(shapes: Shapes, name: str, axes: int) -> tuple[int, ...]:
    if len(shapes.get(name, ())) != axes:
        found = f"has the shape {list(shapes[name])}" if name in shapes else "is missing"
        raise WeightsError(f"{name} {found}, so the file does not tell its network; it has {few(list(shapes))}")
    return shapes[name]


def _depth(shapes: Shapes, name: str) -> int:
    numbers = [key.split(".")[1] for key in shapes if key.startswith(f"{name}.")]
    return max((int(n) for n in numbers if n.isdecimal()), default=-1) + 1
