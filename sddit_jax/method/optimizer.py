"""Optimisers of optax by name. The learning rate is applied by the train step."""

import dataclasses

import optax

from sddit_jax.errors import ConfigError
from sddit_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser, one of optax, and its learning rate, a function of the step."""

    name: str = setting("adamw", "I", "adamw, adam, lion, sgd, radam, nadamw, lamb or muon")
    learning_rate: float = setting(1e-4, "I", "peak learning rate, reached at the end of the warm-up", above=0)
    schedule: str = setting(
        "constant",
        "I",
        "learning rate after the warm-up: 'constant', or 'cosine', which falls to 0 at the last step",
        choices=("constant", "cosine"),
    )
    warmup_steps: int = setting(0, "I", "steps in which the learning rate rises linearly to its peak; 0: none", least=0)
    b1: float = setting(
        0.9,
        "I",
        "decay of the running mean of gradients (first moment); for sgd and muon the momentum",
        least=0,
        most=1,
    )
    b2: float = setting(
        0.999, "I", "decay of the running mean of squared gradients (second moment); sgd has none", least=0, most=1
    )
    eps: float = setting(1e-8, "I", "added to the root of the second moment, so that nothing is divided by 0", above=0)
    weight_decay: float = setting(
        0.0, "I", "decoupled weight decay, times the learning rate; 0: none; adam, radam and sgd take only 0", least=0
    )
    clip_norm: float = setting(
        0.0, "I", "norm of all gradients together, above which they are scaled down to it; 0: no clipping", least=0
    )
    max_skipped: int = setting(
        10,
        "C",
        "steps in a row, each skipped for a non-finite loss or gradient, that end the run (exit code 3)",
        least=1,
    )


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The optimiser with learning rate 1. The train step multiplies its updates by the learning rate of the step.

    That is exact, since the learning rate is the last factor of each optimiser below. Inside the optimiser the rate
    would follow the optimiser's own count, which stands still when the step is skipped as not finite. Raises
    ConfigError for an unknown name, and for weight decay of an optimiser that has none.
    """
    c = config
    adam = {"b1": c.b1, "b2": c.b2, "eps": c.eps}
    decay = {"weight_decay": c.weight_decay}
    makers = {
        "adamw": lambda: optax.adamw(1.0, **adam, **decay),
        "adam": lambda: optax.adam(1.0, **adam),
        "radam": lambda: optax.radam(1.0, **adam),
        "nadamw": lambda: optax.nadamw(1.0, **adam, **decay),
        "lamb": lambda: optax.lamb(1.0, **adam, **decay),
        "lion": lambda: optax.lion(1.0, b1=c.b1, b2=c.b2, **decay),
        "sgd": lambda: optax.sgd(1.0, momentum=c.b1 or None),
        "muon": lambda: optax.contrib.muon(1.0, beta=c.b1, eps=c.eps, adam_b1=c.b1, adam_b2=c.b2, **decay),
    }
    if c.name not in makers:
        raise ConfigError(f"optimizer.name is {c.name!r}, but must be one of {', '.join(makers)}")
    if c.weight_decay and c.name in ("adam", "radam", "sgd"):
        raise ConfigError(f"optimizer.weight_decay is {c.weight_decay}, but {c.name} has none; set it to 0")
    clip = [optax.clip_by_global_norm(c.clip_norm)] if c.clip_norm else []
    return optax.chain(*clip, makers[c.name]())
