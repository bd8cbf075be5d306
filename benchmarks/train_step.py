"""Prints the time of a training step beside the same step in PyTorch, in float32 on CPUs, in bfloat16 on GPUs.

    python benchmarks/train_step.py --models=digits,S/2,B/4 --methods=dit,maskdit,sd_dit
    python benchmarks/train_step.py --models=XL/2 --batch_size=64  # on a GPU

Needs pip install -e '.[torch]' (on a GPU a PyTorch for CUDA), and for torch.compile a C++ compiler; --nocompiled leaves
torch.compile out.

Both have the same weights, data and number of threads; PyTorch runs in processes of its own. A step draws noise and
masks and updates parameters (AdamW, fused in PyTorch), EMA and teacher. PyTorch's step does not update the centers of
the discrimination; their cost is negligible. On a GPU PyTorch uses autocast: the residual stream is float32, products
with the prototypes are bfloat16, and nothing is recomputed. JAX's residual stream is bfloat16, its products with the
prototypes are float32, and it recomputes what `model.remat` says.

"fraction of the measured matmul rate": the FLOPs that every implementation needs (sddit_jax/cost/flops.py) per second
of the step, over the FLOPs per second of one large matrix product in the same run.
"""

import os
from collections.abc import Callable
from typing import Any

import harness
import jax
import models
import torch
from absl import flags
from twin import make_teacher, make_twin, to_torch

from sddit_jax.config.parts import make_parts
from sddit_jax.cost import flops
from sddit_jax.interop import pytorch
from sddit_jax.models.masking import visible_count

MODELS = flags.DEFINE_list("models", ["digits", "S/2", "B/4"], "digits, or sizes for latents of 256-pixel images.")
METHODS = flags.DEFINE_list("methods", ["dit", "maskdit", "sd_dit"], "Methods.")
COMPILED = flags.DEFINE_bool("compiled", True, "Whether to measure PyTorch under torch.compile too.")


def torch_step(model: str, method: str, compiled: bool, device: str) -> Callable[[], None]:
    """The step in PyTorch. device: "cpu" or "cuda"."""
    jax.config.update("jax_platforms", "cpu")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = models.configuration(model, method)
    batch = models.random_batch(config)
    parts = make_parts(config)
    state = jax.jit(parts.init_state)(jax.random.key(0))
    network = make_twin(config, state["params"]).to(device)
    ema = make_twin(config, state["params"]["network"]).to(device)
    trained = [*network.encoder.parameters(), *network.decoder.parameters()]
    pairs = [(list(ema.parameters()), trained, 1 - config.ema.decay)]
    teacher, d = None, config.objectives.discrimination
    if d.weight:
        teacher = make_teacher(config, state["params"], state["aux"]["discrimination"])
        for module in (teacher.encoder, teacher.head):
            module.to(device)
        teacher.center = {kind: center.to(device) for kind, center in teacher.center.items()}
        for name in ("encoder", "head"):
            own, students = (list(getattr(x, name).parameters()) for x in (teacher, network))
            pairs.append((own, students, 1 - d.teacher_momentum[0]))
    o, diffusion = config.optimizer, config.diffusion.edm
    optimizer = torch.optim.AdamW(
        network.parameters(), o.learning_rate, (o.b1, o.b2), o.eps, o.weight_decay, fused=True
    )
    clean = to_torch(jax.device_get(parts.codec.clean(batch, jax.random.key(0)))).to(device)
    label_B = to_torch(batch["label"]).to(device)
    tokens = parts.network.model.tokens
    visible = visible_count(tokens, config.masking.ratio)

    def total(x0: torch.Tensor, eps: torch.Tensor, sigma: torch.Tensor, label: torch.Tensor, mask: Any) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            return pytorch.training_losses(network, x0, eps, sigma, label, mask, teacher)["total"]

    loss_fn = torch.compile(total) if compiled else total

    def run() -> None:
        x0 = clean + 0.1 * torch.randn_like(clean) if config.codec.name == "latents" else clean
        sigma = (diffusion.log_sigma_mean + diffusion.log_sigma_std * torch.randn(len(x0), device=device)).exp()
        dropped = torch.rand(len(x0), device=device) < config.objectives.label_dropout
        label = torch.where(dropped, config.model.num_classes, label_B)
        mask = None
        if config.masking.ratio:
            mask = torch.rand(len(x0), tokens, device=device).argsort(1)[:, :visible].sort(1).values
        optimizer.zero_grad()
        loss_fn(x0, torch.randn_like(x0), sigma, label, mask).backward()
        optimizer.step()
        with torch.no_grad():
            for averages, values, rate in pairs:
                torch._foreach_lerp_(averages, values, rate)
        if device != "cpu":
            torch.cuda.synchronize()

    return run


def row(model: str, method: str) -> dict[str, Any]:
    """The cells of a row."""
    config = models.configuration(model, method, models.fastest())
    step = models.train_step(config, models.random_batch(config))
    cells, times, rate = harness.beside_torch(step, torch_step, (model, method), COMPILED.value)
    needed = config.batch_size * sum(flops.training(config).values())
    return {
        "model": model,
        "method": method,
        "batch": config.batch_size,
        **cells,
        "fraction of the measured matmul rate": needed / times["JAX"].median / rate,
        "PyTorch's fraction": needed / times["PyTorch"].median / rate,
        "measured matmul rate, GFLOP/s": rate / 1e9,
    }


def main() -> None:
    """Prints the table."""
    rows = [row(model, method) for model in MODELS.value for method in METHODS.value]
    harness.show(rows, device=jax.devices()[0].device_kind)


if __name__ == "__main__":
    harness.run(main)
