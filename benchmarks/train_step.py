"""A training step beside the same one in PyTorch, in float32 on a CPU, in bfloat16 on a GPU: prints a table.

    python benchmarks/train_step.py [--models=digits,S/2,B/4] [--methods=dit,maskdit,sd_dit] [--nocompiled]
    python benchmarks/train_step.py --models=XL/2 --batch_size=64    # on a GPU

The same weights, data and threads; PyTorch in processes of its own, with memory as it manages it. A step draws noise
and masks, and updates parameters (AdamW, in PyTorch fused), EMA and teacher. PyTorch does not update the centers of the
discrimination, whose cost is negligible. On a GPU it has autocast, as its codes do: the stream between blocks is
float32, products by the prototypes bfloat16, and nothing is computed twice; here it is the other way round.
`products` are the matrix products that the step cannot do without (sddit_jax/cost/flops.py), over its time, as a share
of what one large one reaches in the same run. Needs pip install -e '.[torch]', for a GPU a PyTorch of CUDA, and for
torch.compile a C++ compiler (--nocompiled).
"""

import contextlib
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

MODELS = flags.DEFINE_list("models", ["digits", "S/2", "B/4"], "digits, or sizes of latents of 256 pixels.")
METHODS = flags.DEFINE_list("methods", ["dit", "maskdit", "sd_dit"], "Methods.")
COMPILED = flags.DEFINE_bool("compiled", True, "torch.compile too.")


def torch_step(model: str, method: str, compiled: bool, device: str) -> Callable[[], None]:
    """The same step in PyTorch on "cpu" or "cuda"."""
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
    product, operations = harness.matrix_product()
    ways = {"JAX": models.train_step(config, models.random_batch(config))}
    with contextlib.ExitStack() as processes:
        for name in ("PyTorch", "compiled") if COMPILED.value else ("PyTorch",):
            torch_way = harness.elsewhere(torch_step, model, method, name == "compiled", harness.torch_device())
            ways[name] = processes.enter_context(torch_way)
        times = harness.measure(ways | {"product": product}, harness.REPETITIONS.value)
    rate = operations / times["product"].median
    arithmetic = config.batch_size * sum(flops.training(config).values())
    own = times["JAX"].median
    cells = {"model": model, "method": method, "batch": config.batch_size}
    cells |= {f"{name}, s": times[name] for name in ways}
    cells |= {f"{name} / JAX": times[name].median / own for name in ways if name != "JAX"}
    cells |= {"products": arithmetic / own / rate, "of PyTorch": arithmetic / times["PyTorch"].median / rate}
    return cells | {"GFLOP/s": rate / 1e9}


def main() -> None:
    """Prints the table."""
    rows = [row(model, method) for model in MODELS.value for method in METHODS.value]
    harness.show(rows, device=jax.devices()[0].device_kind)


if __name__ == "__main__":
    harness.run(main)
