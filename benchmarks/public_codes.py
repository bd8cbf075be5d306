"""Prints how much this package's networks differ from the public codes of MaskDiT and DiT with the same weights.

    git clone https://github.com/Anima-Lab/MaskDiT && git clone https://github.com/facebookresearch/DiT
    pip install -e '.[torch]' timm
    python benchmarks/public_codes.py --maskdit=MaskDiT --dit=DiT --models=S/2,XL/2 --image_sizes=32,64

The layouts of `convert` turn random weights into the state_dict of the public code, which loads it strictly. "flax" is
the Flax network, "twin" the PyTorch network of this package. All values are float32.

    D, guided      largest absolute difference of MaskDiT's denoised image, without and with guidance
    F              largest absolute difference of DiT's 8 output channels
    DDIM, DDPM     difference of DiT's samples, relative to their norm
    loss           relative difference of MaskDiT's training loss with a mask
    gradient       difference of the gradients of that loss, relative to their norm, largest of all tensors
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import flags
from twin import namespaces, to_torch

from sddit_jax import cli
from sddit_jax.config.border import resolve
from sddit_jax.config.parts import make_parts
from sddit_jax.config.presets import default_config
from sddit_jax.config.sizes import parse_size
from sddit_jax.errors import UserError
from sddit_jax.interop import pytorch
from sddit_jax.interop.layouts import DIT, MASKDIT, Layout
from sddit_jax.interop.state_dict import to_state_dict
from sddit_jax.method.objectives.base import Drawn
from sddit_jax.method.state import Parts
from sddit_jax.method.train_step import Gradients, gradients_of
from sddit_jax.models.masking import sample_mask
from sddit_jax.sampling.guidance import make_denoise, make_output
from sddit_jax.sampling.solvers import ancestral, euler, respaced_levels

MASKDIT_CODE = flags.DEFINE_string("maskdit", None, "Clone of the public MaskDiT code.")
DIT_CODE = flags.DEFINE_string("dit", None, "Clone of the public DiT code.")
MODELS = flags.DEFINE_list("models", ["S/2", "S/4", "S/8"], "Sizes.")
IMAGE_SIZES = flags.DEFINE_list("image_sizes", ["32"], "Sides of the latents: 32 for 256 px, 64 for 512 px.")
GRADIENTS = flags.DEFINE_bool("gradients", True, "Compare MaskDiT's loss and gradients too; XL/2 needs over 24 GB.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of weights and inputs.")
GUIDANCE = 1.5
STEPS = 5

Row = dict[str, float]


class Case:
    """A model with random weights for this package's networks and the public code, and inputs."""

    def __init__(self, layout: Layout, method: str, size: str, image_size: int, changes: dict) -> None:
        config = default_config(method)
        config.model.update(parse_size(size) | {"image_size": image_size})
        config.update_from_flattened_dict(changes)
        self.config = resolve(config)
        self.parts: Parts = make_parts(self.config)
        network, rng = self.parts.network, np.random.default_rng(SEED.value)
        shapes = jax.eval_shape(network.init, jax.random.key(0))
        self.params = jax.tree.map(lambda leaf: 0.05 * rng.standard_normal(leaf.shape, np.float32), shapes)
        arrays = to_state_dict(self.params, network)
        self.entries = layout.entries(network)
        self.theirs = {
            layout.prefix + name: torch.from_numpy(entry.to_file(arrays)) for name, entry in self.entries.items()
        }
        self.twin = pytorch.SDDiT(namespaces(self.config))
        # Shared with the arrays: a large model fits into memory only once.
        self.twin.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()}, assign=True)
        shape = (2, image_size, image_size, 4)
        self.x_BHWC = np.float32(rng.standard_normal(shape))
        self.eps_BHWC = np.float32(rng.standard_normal(shape))
        self.label_B = np.array([3, 1000])


def run_maskdit(models: ModuleType, losses: ModuleType, size: str, image_size: int) -> Row:
    """The differences from MaskDiT's code."""
    case = Case(MASKDIT, "maskdit", size, image_size, {})
    network, diffusion = case.parts.network, case.parts.diffusion
    theirs = models.Precond_models["edm"](
        image_size, 4, 1000, model_type=f"DiT-{size}", use_decoder=True, mae_loss_coef=0.1
    )
    theirs.load_state_dict(case.theirs, assign=True)
    label_B = torch.tensor(case.label_B)
    one_hot_BK = torch.nn.functional.one_hot(label_B, 1001)[:, :1000]
    sigma_B = np.array([0.5, 2.0], np.float32)
    x, sigma = to_torch(case.x_BHWC), torch.tensor(sigma_B)
    row = {}
    theirs.eval()
    with torch.no_grad():
        plain = theirs(x, sigma, one_hot_BK)["x"]
        row["twin D"] = apart(case.twin(x, sigma, label_B), plain)
        guided = theirs(x, sigma[:1], one_hot_BK, cfg_scale=GUIDANCE)["x"]
        row["twin guided"] = apart(case.twin.guided(x, sigma[:1].expand(2), label_B, GUIDANCE), guided)
    inputs = diffusion.network_input(case.x_BHWC, sigma_B)
    f_BHWC = jax.jit(network)(case.params, *inputs, case.label_B)
    row["flax D"] = apart(diffusion.denoised(case.x_BHWC, f_BHWC, sigma_B), plain)
    output = jax.jit(
        lambda p: make_denoise(make_output(network, diffusion, p, case.label_B, GUIDANCE), diffusion)(
            case.x_BHWC, jnp.float32(0.5)
        )
    )
    row["flax guided"] = apart(output(case.params), guided)
    return row | (masked(case, theirs, losses.EDMLoss(), one_hot_BK, sigma_B) if GRADIENTS.value else {})


def masked(
    case: Case, theirs: torch.nn.Module, loss_fn: Callable, one_hot_BK: torch.Tensor, sigma_B: np.ndarray
) -> Row:
    """The differences of loss and gradients, with the same noise, mask and labels."""
    network = case.parts.network
    mask = sample_mask(jax.random.key(SEED.value), 2, network.model.tokens, case.parts.mask_ratio)
    order_BN = np.concatenate([mask.visible_BV, mask.hidden_BM], axis=1)
    rank_BN = torch.tensor(np.argsort(order_BN, axis=1) / network.model.tokens, dtype=torch.float32)
    log_sigma = torch.tensor((np.log(sigma_B) + 1.2) / 1.2, dtype=torch.float32).view(2, 1, 1, 1)
    eps = to_torch(case.eps_BHWC)
    theirs.train()
    wrapped = Wrapped(theirs)
    with drawn(log_sigma, eps, rank_BN):
        loss = loss_fn(wrapped, to_torch(case.x_BHWC), one_hot_BK.float(), mask_ratio=0.5, mae_loss_coef=0.1)
    loss.mean().backward()

    @jax.jit
    def flax_gradients(params: dict, batch: Drawn) -> Gradients:
        aux = {objective.name: {} for objective in case.parts.objectives}
        state = {"params": {"network": params}, "aux": aux, "ema": {"default": {}}, "step": 0}
        return gradients_of(case.parts, state, batch)

    batch = Drawn(case.x_BHWC, case.eps_BHWC, sigma_B, case.label_B, mask, features={})
    gradients, metrics, _ = flax_gradients(case.params, batch)
    tensors = map(to_torch, (case.x_BHWC, case.eps_BHWC, sigma_B, case.label_B, mask.visible_BV))
    ours = pytorch.training_losses(case.twin, *tensors)
    ours["total"].backward()
    total = float(loss.detach().mean())
    row = {
        "twin loss": abs(float(ours["total"].detach()) - total) / total,
        "flax loss": abs(float(metrics["train/loss"]) - total) / total,
    }
    found = {
        "twin gradient": {name: p.grad.numpy() for name, p in case.twin.named_parameters()},
        "flax gradient": to_state_dict(gradients["network"], network),
    }
    reference = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for key, arrays in found.items():
        row[key] = max(
            relative(torch.tensor(entry.to_file(arrays)), reference[MASKDIT.prefix + name])
            for name, entry in case.entries.items()
            if entry.ours is not None
        )
    return row


def run_dit(models: ModuleType, diffusions: ModuleType, size: str, image_size: int) -> Row:
    """The differences from DiT's code."""
    changes = {"model.learn_sigma": True, "model.null_label": "row", "diffusion.name": "ddpm"}
    case = Case(DIT, "dit", size, image_size, changes)
    network, diffusion = case.parts.network, case.parts.diffusion
    theirs = models.DiT_models[f"DiT-{size}"](input_size=image_size, num_classes=1000)
    theirs.load_state_dict(case.theirs, assign=True)
    theirs.eval()
    t_B, x, label_B = np.array([10.0, 500.0], np.float32), to_torch(case.x_BHWC), torch.tensor(case.label_B)
    row = {}
    with torch.no_grad():
        reference = theirs(x, torch.tensor(t_B), label_B)
        row["twin F"] = apart(case.twin.output(x, torch.tensor(t_B), label_B), reference)
    row["flax F"] = apart(jax.jit(network)(case.params, case.x_BHWC, t_B, case.label_B), reference)

    # One image, guided on three channels. In DiT's samplers the second half of a batch has the null label.
    label_B, start = np.array([3]), to_torch(case.eps_BHWC[:1])
    doubled = {"y": torch.tensor([3, 1000]), "cfg_scale": GUIDANCE}
    noises = np.float32(np.random.default_rng(SEED.value).standard_normal((STEPS, *start.shape)))
    respaced = diffusions.create_diffusion(str(STEPS))
    output = make_output(network, diffusion, case.params, label_B, GUIDANCE, 3)
    sigmas = respaced_levels(STEPS, diffusion)
    noise_BHWC = case.eps_BHWC[:1] * (1 + 1 / sigmas[0] ** 2) ** 0.5
    arguments = {"clip_denoised": False, "model_kwargs": doubled, "device": "cpu"}
    with torch.no_grad():
        ddim = respaced.ddim_sample_loop(
            theirs.forward_with_cfg, (2, *start.shape[1:]), start.repeat(2, 1, 1, 1), **arguments
        )
        draws = [torch.tensor(noise).repeat(2, 1, 1, 1) for noise in noises]
        with mock.patch.object(torch, "randn_like", side_effect=draws):
            ddpm = respaced.p_sample_loop(
                theirs.forward_with_cfg, (2, *start.shape[1:]), start.repeat(2, 1, 1, 1), **arguments
            )
    ours = euler(make_denoise(output, diffusion), noise_BHWC, sigmas)
    row["flax DDIM"] = relative(to_torch(ours), ddim[:1])
    noises_SBHWC = jnp.asarray(noises.transpose(0, 1, 3, 4, 2))
    ours = ancestral(output, diffusion, noise_BHWC, sigmas, lambda i: noises_SBHWC[i])
    row["flax DDPM"] = relative(to_torch(ours), ddpm[:1])
    return row


class Wrapped(torch.nn.Module):
    """Holds the network as `module`, as DistributedDataParallel does, for MaskDiT's loss."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: object, **kwargs: object) -> object:
        """The network itself."""
        return self.module(*args, **kwargs)


@contextmanager
def drawn(log_sigma: torch.Tensor, eps: torch.Tensor, rank_BN: torch.Tensor) -> Iterator[None]:
    """Makes MaskDiT's loss draw the given noise level, noise and order of tokens."""
    with (
        mock.patch.object(torch, "randn", return_value=log_sigma),
        mock.patch.object(torch, "randn_like", return_value=eps),
        mock.patch.object(torch, "rand", return_value=rank_BN),
    ):
        yield


def apart(ours: object, theirs: torch.Tensor) -> float:
    """The largest absolute difference of an image of PyTorch or JAX from one of PyTorch."""
    ours = ours if isinstance(ours, torch.Tensor) else to_torch(ours)
    return float((ours - theirs).abs().max())


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The norm of the difference over the norm of `theirs`."""
    return float((ours - theirs).norm() / theirs.norm())


@contextmanager
def code(path: str) -> Iterator[None]:
    """Lets imports come from a clone, and forgets them at the end: both codes have modules of the same names."""
    before, here = set(sys.modules), Path(__file__).resolve().parent
    # Without this folder, whose models.py would hide MaskDiT's folder models.
    others = [entry for entry in sys.path if Path(entry).resolve() != here]
    try:
        with mock.patch.object(sys, "path", [path, *others]):
            yield
    finally:
        tops = {entry.stem for entry in Path(path).iterdir()}
        for name in set(sys.modules) - before:
            if name.split(".")[0] in tops:
                del sys.modules[name]


def main() -> None:
    """Prints a line for each code and model."""
    if not (MASKDIT_CODE.value or DIT_CODE.value):
        raise UserError("--maskdit=DIR or --dit=DIR is needed: a clone of the public code")
    for image_size in map(int, IMAGE_SIZES.value):
        for size in MODELS.value:
            if MASKDIT_CODE.value:
                with code(MASKDIT_CODE.value):
                    models = importlib.import_module("models.maskdit")
                    losses = importlib.import_module("train_utils.loss")
                report("MaskDiT", size, image_size, run_maskdit(models, losses, size, image_size))
            if DIT_CODE.value and not size.startswith("H"):
                with code(DIT_CODE.value):
                    models, diffusions = importlib.import_module("models"), importlib.import_module("diffusion")
                report("DiT", size, image_size, run_dit(models, diffusions, size, image_size))


def report(name: str, size: str, image_size: int, row: Row) -> None:
    """Prints the line of a model."""
    print(f"{name}-{size} {image_size}x{image_size}:", ", ".join(f"{k} {v:.1e}" for k, v in row.items()), flush=True)


if __name__ == "__main__":
    cli.run(main)
