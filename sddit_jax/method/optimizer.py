"""Optimisers of optax by name, split from their learning rate, which is a function of the step alone."""

import dataclasses

import optax

from sddit_jax.errors import ConfigError
from sddit_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimiser of optax by name, with its learning rate a function of the step."""

    name: str = setting("adamw", "I", "adamw, adam, lion, sgd, radam, nadamw, lamb or muon")
    learning_rate: float = setting(1e-4, "I", "peak learning rate", above=0)
    schedule: str = setting("constant", "I", "after warm-up: constant or cosine (to 0)", choices=("constant", "cosine"))
    warmup_steps: int = setting(0, "I", "steps of linear warm-up", least=0)
    b1: float = setting(0.9, "I", "decay of the first moment (momentum for sgd)", least=0, most=1)
    b2: float = setting(0.999, "I", "decay of the second moment", least=0, most=1)
    eps: float = setting(1e-8, "I", "added to the root of the second moment", above=0)
    weight_decay: float = setting(0.0, "I", "decoupled weight decay", least=0)
    clip_norm: float = setting(0.0, "I", "largest global gradient norm; 0 does not clip", least=0)
    max_skipped: int = setting(10, "C", "non-finite steps in a row, each skipped, before the run ends", least=1)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The optimiser at learning rate 1; the train step multiplies its updates by the rate of the step.

    Exact for each name below, since the learning rate is the last factor of all of them. (A rate inside the
    optimiser would follow its own count, which stands still when the non-finite guard skips a step.)
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
