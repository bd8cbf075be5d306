"""Says what a run takes on a TPU: python -m sddit_jax.preflight --config=FILE --topology=v5e:4x4 [--batch=N].

Compiles the train step and the sampler for that topology on any Linux machine, without a TPU (pip install -e '.[tpu]').
Prints a table to stderr and one JSON object to stdout. If the run does not fit in a chip's memory, the command names
the first change that makes it fit, and ends with exit code 2.
"""

import dataclasses
import json
import logging

import jax
from absl import flags
from ml_collections import config_flags

from sddit_jax import cli
from sddit_jax.config.border import resolve
from sddit_jax.config.schema import Config
from sddit_jax.cost import aot
from sddit_jax.errors import UserError
from sddit_jax.parallel import sharding

log = logging.getLogger("sddit_jax")

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file of the run, as for main.", lock_config=True)
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "GENERATION:SHAPE, with v3, v4, v5e, v5p or v6e and chips a side, such as v5e:4x4 or v4:2x2x4."
)
BATCH = flags.DEFINE_integer("batch", None, "Images in the global batch. Left out: the config's.", lower_bound=1)
QUICK = flags.DEFINE_bool("quick", False, "Optimise less, in a fifth of the time; memory differs by a few percent.")


def report_table(report: aot.Report) -> str:
    """The table that the command prints."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    paper, compiled = sum(report.flops_per_image.values()), report.compiled_flops_per_image
    parts = ", ".join(f"{name} {value / paper:.0%}" for name, value in report.flops_per_image.items())
    seconds = report.compile_seconds
    lines = [
        ("run", f"{report.parameters:,} parameters on {report.topology}, {report.chips} chips, mesh {mesh}"),
        ("step", f"batch {report.batch_size} in {report.microbatches} microbatch(es), remat {report.remat}"),
        ("memory", f"of a device {report.usable_gib:.2f} GiB usable: {'fits' if report.fits else 'DOES NOT FIT'}"),
        ("  state", f"{report.state_gib:.2f} GiB: parameters, optimiser, EMA, teacher"),
        ("  train step", f"{report.peak_gib:.2f} GiB at its peak, state included"),
        ("  sampler", f"{report.sampler_peak_gib:.2f} GiB at its peak"),
        ("arithmetic", f"{paper / 1e12:.3f} TFLOP an image on paper ({parts})"),
        ("  compiled", f"{compiled / 1e12:.3f} TFLOP an image, {compiled / paper:.2f} times as many"),
        *(
            (f"  at {peak}", f"of peak: {s['images_per_second_per_chip']:.0f} images/s a chip, {s['days']:.1f} days")
            for peak, s in report.speed.items()
        ),
        ("compiling", f"{seconds['train_step']:.0f} s the train step, {seconds['sampler']:.0f} s the sampler"),
        ("collectives", f"{sum(c['gib_per_step'] for c in report.collectives):.3f} GiB sent by a device in a step"),
        *(
            (f"  {c['kind']}", f"{c['gib_per_step']:.3f} GiB, {c['count']} run {c['times']} times: {c['purpose']}")
            for c in report.collectives
        ),
    ]
    return "\n".join(f"{name:22}{words}" for name, words in lines)


def main() -> None:
    """Prints the report; raises UserError if the run does not fit."""
    if CONFIG.value is None or not TOPOLOGY.value:
        raise UserError("--config=FILE and --topology=GENERATION:SHAPE are needed, as in --topology=v5e:4x4")
    # Nothing runs, so a TPU or GPU of this machine stays free for others.
    jax.config.update("jax_platforms", "cpu")
    config = resolve(CONFIG.value)
    if BATCH.value is not None:
        config = dataclasses.replace(config, batch_size=BATCH.value)
    report = aot.report(config, TOPOLOGY.value, quick=QUICK.value)
    log.info("%s", report_table(report))
    name = config_flags.get_config_filename(flags.FLAGS["config"])
    print(json.dumps({"config": name, **dataclasses.asdict(report)}))
    if not report.fits:
        raise UserError(f"the run does not fit {TOPOLOGY.value}; {_what_fits(config)}")


def _what_fits(config: Config) -> str:
    """Names the first change of `aot.smaller` with which the run fits, or says that none does."""
    tried = []
    devices, _ = aot.devices_of(TOPOLOGY.value)
    for changes, smaller in aot.smaller(config):
        mesh = sharding.make_mesh(smaller.parallel, devices)
        if config.batch_size % (mesh.shape["data"] * mesh.shape["fsdp"] * smaller.parallel.microbatches):
            continue
        tried.append(" ".join(changes))
        log.info("trying %s", tried[-1])
        report = aot.report(smaller, TOPOLOGY.value, quick=QUICK.value)
        if report.fits:
            return f"with {tried[-1]} it takes {max(report.peak_gib, report.sampler_peak_gib):.2f} GiB and does"
    return f"nor does it with {tried[-1] if tried else 'anything else'}: use more chips or a smaller batch"


if __name__ == "__main__":
    cli.run(main)
