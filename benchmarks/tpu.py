"""Prints memory, FLOPs and communication of a train step that is compiled for TPUs: the tables of docs/tpu.md.

    python benchmarks/tpu.py --table=scaling --quick  # SD-DiT-XL/2 with 16 images a chip, on 8 to 256 chips
    python benchmarks/tpu.py --table=memory  # SD-DiT-XL/2 with each setting of model.remat
    python benchmarks/tpu.py --table=methods --quick  # each method, S to XL, on v4, v5e, v5p and v6e
    python benchmarks/tpu.py --table=prototypes --quick  # SD-DiT-B/2 with 8,192 and 65,536 prototypes

Needs Linux and pip install -e '.[tpu]', but no TPU. A row takes one to a few minutes.
"""

import concurrent.futures
import dataclasses
import logging
import math
import multiprocessing
import sys

import jax
from absl import flags

from sddit_jax import cli
from sddit_jax.config.border import resolve
from sddit_jax.config.presets import imagenet
from sddit_jax.cost import aot

TABLE = flags.DEFINE_enum("table", "scaling", ["scaling", "memory", "methods", "prototypes"], "Which table.")
JOBS = flags.DEFINE_integer("jobs", 1, "Rows that are compiled at the same time, each in a process.", lower_bound=1)
QUICK = flags.DEFINE_bool("quick", False, "Let the compiler optimise less, in a fifth of the time.")

log = logging.getLogger("sddit_jax")


@dataclasses.dataclass(frozen=True)
class Case:
    """The model, the method and the chips of a row."""

    topology: str
    batch_size: int
    size: str = "XL/2"
    method: str = "sd_dit"
    resolution: int = 256
    remat: str = "dots"
    data: int = 1
    prototypes: int = 8192

    def report(self, quick: bool) -> aot.Report:
        """Compiles the train step and reports on the program."""
        jax.config.update("jax_platforms", "cpu")
        config = imagenet(self.resolution, f"size={self.size},method={self.method}")
        with config.unlocked():
            config.batch_size, config.model.remat = self.batch_size, self.remat
            config.parallel.data = self.data
            config.objectives.discrimination.prototypes = self.prototypes
        return aot.report(resolve(config), self.topology, sampler=False, quick=quick)


SCALING = [
    *(Case(f"v5e:{shape}", 16 * chips) for shape, chips in (("2x4", 8), ("4x4", 16))),
    # On more than 16 chips, copies of 16 shards: a chip then sends as much as with 16 chips.
    *(
        Case(f"v5e:{shape}", 16 * chips, data=chips // 16)
        for shape, chips in (("4x8", 32), ("8x8", 64), ("8x16", 128), ("16x16", 256))
    ),
    # All chips as shards, for comparison.
    *(Case(f"v5e:{shape}", 16 * chips) for shape, chips in (("4x8", 32), ("8x8", 64), ("8x16", 128))),
]
MEMORY = [
    Case("v5e:4x4", 256, remat="none"),
    Case("v5e:4x4", 256),
    Case("v5e:4x4", 256, remat="full"),
    Case("v5e:2x2", 256, remat="full"),
    Case("v5e:8x8", 256, resolution=512),
    Case("v5e:8x8", 256, resolution=512, remat="full"),
]
METHODS = [
    Case(topology, 256, size=f"{size}/2", method=method)
    for method in ("sd_dit", "maskdit", "dit")
    for size in ("S", "B", "L", "XL")
    for topology in ("v4:2x2x4", "v5e:4x4", "v5p:2x2x4", "v6e:4x4")
]
PROTOTYPES = [
    Case("v5e:4x4", 256, size="B/2", resolution=resolution, prototypes=prototypes)
    for resolution in (256, 512)
    for prototypes in (8192, 65_536)
]


def row(case: Case, report: aot.Report) -> dict[str, str]:
    """The cells of a row."""
    devices = math.prod(report.mesh.values())
    peak = 1e12 * aot.CHIPS[case.topology.partition(":")[0]].peak_tflops
    paper, compiled = sum(report.flops_per_image.values()), report.compiled_flops_per_image
    sent = {kind: sum(c["gib_per_step"] for c in report.collectives if c["kind"] == kind) for kind in aot.hlo.KINDS}
    return {
        "model": f"{case.method} {case.size}",
        "pixels": f"{case.resolution}",
        "topology": case.topology,
        "mesh": "x".join(str(size) for size in report.mesh.values()),
        "batch": f"{case.batch_size}",
        "remat": case.remat,
        "prototypes": f"{case.prototypes:,}" if case.method == "sd_dit" else "",
        "state, GiB": f"{report.state_gib:.3f}",
        "peak, GiB": f"{report.peak_gib:.2f}" + ("" if report.fits else " (does not fit)"),
        "TFLOP an image": f"{compiled / 1e12:.3f}",
        "compiled / paper": f"{compiled / paper:.3f}",
        "ms at peak": f"{1e3 * case.batch_size * compiled / (devices * peak):.0f}",
        "all-gather, GiB": f"{sent['all-gather']:.2f}",
        "reductions, GiB": f"{sent['all-reduce'] + sent['reduce-scatter']:.2f}",
        "others, GiB": f"{sent['all-to-all'] + sent['collective-permute']:.2f}",
        "compilation, s": f"{report.compile_seconds['train_step']:.0f}",
    }


def main() -> None:
    """Prints the table in Markdown."""
    cases = {"scaling": SCALING, "memory": MEMORY, "methods": METHODS, "prototypes": PROTOTYPES}[TABLE.value]
    rows = []
    with concurrent.futures.ProcessPoolExecutor(
        JOBS.value, multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        for case, report in zip(cases, pool.map(Case.report, cases, [QUICK.value] * len(cases)), strict=True):
            rows.append(row(case, report))
            log.info("%s", ", ".join(f"{name} {cell}" for name, cell in rows[-1].items()))
    print(f"| {' | '.join(rows[0])} |", f"|{'---|' * len(rows[0])}", sep="\n")
    for cells in rows:
        print(f"| {' | '.join(cells.values())} |")
    sys.stdout.flush()


if __name__ == "__main__":
    cli.run(main)
