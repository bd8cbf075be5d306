"""Compiles a run's programs for a TPU topology without a TPU, and reads memory, arithmetic and collectives off them."""

import collections
import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from sddit_jax.config.border import flatten
from sddit_jax.config.parts import make_parts
from sddit_jax.config.schema import Config
from sddit_jax.cost import flops, hlo
from sddit_jax.errors import UserError
from sddit_jax.method.train_step import make_train_step
from sddit_jax.parallel import sharding
from sddit_jax.parallel.hooks import make_hooks
from sddit_jax.parallel.rows import full_size, split_rows
from sddit_jax.parallel.sharding import abstract_state
from sddit_jax.sampling.sampler import make_sample

# XLA's effort level O0: XLA spends the least time on making the program fast.
QUICK_OPTIONS = {"optimization_level": 9}
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A generation of TPUs. A JAX device is a chip; for v3 it is one of the two cores of a chip."""

    usable_gib: float  # memory of a device that the compiler lets a program use
    peak_tflops: float  # of a device, in bfloat16
    devices: int = 1  # of a chip
    options: tuple[tuple[str, Any], ...] = ()


CHIPS = {
    "v3": Chip(15.48, 61.5, devices=2),
    "v4": Chip(30.75, 275, options=(("chip_config_name", "megacore"),)),
    "v5e": Chip(15.75, 197),
    "v5p": Chip(95.73, 459),
    "v6e": Chip(31.24, 918),
}

# (kind of a collective, pattern of its op_name, what it sends): the first row that fits says why a program has it.
PURPOSES = (
    ("all-gather", r"transpose\(.*stack/", "weights of a block, for the backward pass"),
    ("all-gather", r"stack/", "weights of a block, for the forward passes of student and teacher"),
    ("all-gather", r"params|teacher|sharding_constraint", "weights outside of blocks"),
    ("reduce-scatter", r"transpose\(.*stack/", "gradients of a block"),
    ("reduce-scatter", r"transpose\(", "gradients outside of blocks"),
    ("all-reduce", r"transpose\(.*stack/", "gradients of a block"),
    ("all-reduce", r"transpose\(", "gradients outside of blocks"),
    ("all-reduce", r"stack/.*dot_general", "activations of a block, summed over the tensor axis"),
    ("all-reduce", r"reduce_(sum|max)|jvp\(\)|/div|norm", "means over the batch: losses, metrics, centers, norms"),
)


@dataclasses.dataclass(frozen=True)
class Report:
    """What a run takes on a topology; memory is that of one device."""

    topology: str
    chips: int
    mesh: dict[str, int]
    batch_size: int
    remat: str
    microbatches: int
    parameters: int
    usable_gib: float
    state_gib: float
    peak_gib: float  # of the train step, with the state; if it does not fit, what the compiler asked for
    sampler_peak_gib: float | None  # None if the sampler was not compiled
    fits: bool
    flops_per_image: dict[str, float]  # of a training step, by part, as `flops.training` counts
    compiled_flops_per_image: float
    collectives: list[dict[str, Any]]
    compile_seconds: dict[str, float]
    speed: dict[str, dict[str, float]]  # if this fraction of the peak FLOP/s is reached


def devices_of(topology: str) -> tuple[list[jax.Device], Chip]:
    """The devices of a topology such as v5e:4x4 or v4:2x2x4, for compilation only, and their generation.

    Raises UserError if there is no such topology, or if libtpu is not installed.
    """
    generation, _, shape = topology.partition(":")
    if generation not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise UserError(
            f"topology {topology!r} is not GENERATION:SHAPE with one of {', '.join(CHIPS)}, as in v5e:4x4 or v4:2x2x4"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the TPU compiler is not installed: pip install -e '.[tpu]'; no TPU is needed")
    # Without these libtpu looks for the metadata server of a TPU VM, and prints that it found none.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)
    chip = CHIPS[generation]
    # A host has 2 x 2 chips; the smallest slice has one.
    bounds = [min(int(size), 2) for size in shape.split("x")[:2]] + [1]
    options = dict(chip.options, chips_per_host_bounds=bounds)
    try:
        return topologies.get_topology_desc(topology, "tpu", **options).devices, chip
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"topology {topology}: {str(error).splitlines()[0]}") from error


def abstract_batch(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of the train step as `jax.ShapeDtypeStruct`s with their shardings."""
    m, rows = config.model, sharding.batch_sharding(mesh)
    image = (m.image_size, m.image_size, m.channels)
    batch = {"label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32, sharding=rows)}
    if config.codec.name == "pixels":
        batch["image"] = jax.ShapeDtypeStruct((config.batch_size, *image), jnp.uint8, sharding=rows)
    else:
        batch["moments"] = jax.ShapeDtypeStruct((config.batch_size, 2, *image), jnp.float16, sharding=rows)
    return batch


def state_bytes(state: Any) -> int:
    """The bytes that an abstract state takes on each device."""
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(state)
    )


def lower_train_step(config: Config, mesh: Mesh) -> jax.stages.Lowered:
    """The train step, lowered as `train` runs it."""
    parts = make_parts(config, make_hooks(mesh, config.model))
    state = abstract_state(parts, mesh)
    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jax.jit(make_train_step(parts), donate_argnums=0, out_shardings=(layout, sharding.replicated(mesh)))
    return step.lower(state, abstract_batch(config, mesh))


def lower_sampler(config: Config, mesh: Mesh) -> jax.stages.Lowered:
    """The sampler that draws a run's grids, lowered."""
    parts = make_parts(config, make_hooks(mesh, config.model))
    rows = split_rows(mesh)
    integers = jax.ShapeDtypeStruct((full_size(mesh, config.sampling.grid),), jnp.int32, sharding=rows)
    sample = make_sample(parts.network, parts.diffusion, parts.codec, config.sampling)
    params = abstract_state(parts, mesh)["ema"]["default"]
    seed = jax.ShapeDtypeStruct((), jnp.int32)
    return jax.jit(sample, out_shardings=rows).lower(params, seed, integers, integers)


def report(config: Config, topology: str, *, sampler: bool = True, quick: bool = False) -> Report:
    """Compiles a run's train step, and its sampler, for a topology. JAX has to run on the CPU (jax_platforms).

    quick: the compiler optimises less, in a fifth of the time; memory differs by a few percent, and collectives overlap
    less with other work. If a program does not fit, the report says so. Raises ConfigError for a wrong mesh, and
    UserError as `devices_of`.
    """
    devices, chip = devices_of(topology)
    mesh = sharding.make_mesh(config.parallel, devices)
    sharding.check_batch(mesh, config.batch_size, config.parallel.microbatches)
    sharding.check_width(mesh, config.model.width)
    state = abstract_state(make_parts(config), mesh)
    step, step_peak, step_seconds = _compiled(lower_train_step(config, mesh), quick)
    peaks, seconds = {"train_step": step_peak}, {"train_step": step_seconds}
    if sampler:
        _, peaks["sampler"], seconds["sampler"] = _compiled(lower_sampler(config, mesh), quick)
    text = step.as_text() if step else ""
    analytic = flops.training(config)
    speeds = {}
    for fraction in (0.3, 0.5):
        images = fraction * chip.peak_tflops * 1e12 / sum(analytic.values())
        days = config.steps * config.batch_size / (images * mesh.size) / 86400
        speeds[f"{fraction:.0%}"] = {"images_per_second_per_chip": images * chip.devices, "days": days}
    return Report(
        topology=topology,
        chips=mesh.size // chip.devices,
        mesh=dict(mesh.shape),
        batch_size=config.batch_size,
        remat=config.model.remat,
        microbatches=config.parallel.microbatches,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(state["params"])),
        usable_gib=chip.usable_gib,
        state_gib=state_bytes(state) / GIB,
        peak_gib=step_peak,
        sampler_peak_gib=peaks.get("sampler"),
        fits=max(peaks.values()) <= chip.usable_gib,
        flops_per_image=analytic,
        compiled_flops_per_image=hlo.matrix_flops(text) * mesh.size / config.batch_size if step else float("nan"),
        collectives=collectives_by_purpose(hlo.collectives(text)) if step else [],
        compile_seconds=seconds,
        speed=speeds,
    )


def smaller(config: Config) -> Iterator[tuple[list[str], Config]]:
    """Yields configs that take less memory, the cheapest change first: the flags of the change, and the config."""
    before = flatten(config)

    def changed(section: str, **changes: Any) -> tuple[list[str], Config]:
        nonlocal config
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})
        return [f"--config.{key}={x}" for key, x in flatten(config).items() if x != before[key]], config

    if config.parallel.fsdp == 1:
        yield changed("parallel", data=1, fsdp=-1)
    policies = ("none", "dots", "full")
    for policy in policies[policies.index(config.model.remat) + 1 :]:
        yield changed("model", remat=policy)
    microbatches = 2 * config.parallel.microbatches
    while config.batch_size % microbatches == 0:
        yield changed("parallel", microbatches=microbatches)
        microbatches *= 2


def _compiled(lowered: jax.stages.Lowered, quick: bool) -> tuple[jax.stages.Compiled | None, float, float]:
    """The compiled program, or None if it does not fit; its peak memory in GiB; the seconds of compilation."""
    began = time.monotonic()
    try:
        program = lowered.compile(QUICK_OPTIONS if quick else None)
        peak = program.memory_analysis().peak_memory_in_bytes / GIB
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # The message has "... (540.25G) exceeds available HBM (15.75G)" or "Used 22.3G of 15.75G hbm".
        asked = re.search(r"\(([\d.]+)([KMGT])\) exceeds|Used ([\d.]+)([KMGT]) of", str(error))
        if asked is None:
            raise
        number, unit = [group for group in asked.groups() if group]
        program, peak = None, float(number) * 1024.0 ** ("KMGT".index(unit) - 2)
    return program, peak, time.monotonic() - began


def collectives_by_purpose(found: list[hlo.Collective]) -> list[dict[str, Any]]:
    """Groups the collectives of a program: rows {kind, purpose, count, times, gib_per_step}, the largest first."""
    rows: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0, 0, 0.0])
    for collective in found:
        matching = (
            purpose
            for kind, pattern, purpose in PURPOSES
            if kind == collective.kind and re.search(pattern, collective.op_name)
        )
        row = rows[collective.kind, next(matching, f"unexplained: {collective.op_name}")]
        row[0] += 1
        row[1] += collective.times
        row[2] += collective.times * collective.bytes / GIB
    return [
        {"kind": kind, "purpose": purpose, "count": count, "times": times, "gib_per_step": gib}
        for (kind, purpose), (count, times, gib) in sorted(rows.items(), key=lambda item: -item[1][2])
    ]
