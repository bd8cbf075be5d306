"""The whole configuration of a run, put together from the sections that lie beside the code which reads them."""

import dataclasses

from sddit_jax.errors import ConfigError
from sddit_jax.method.codec import CodecConfig
from sddit_jax.method.diffusions import DiffusionConfig
from sddit_jax.method.objectives.compose import ObjectivesConfig
from sddit_jax.method.optimizer import OptimizerConfig
from sddit_jax.method.state import EMAConfig
from sddit_jax.models.masking import MaskingConfig
from sddit_jax.models.transformer import ModelConfig
from sddit_jax.sampling.sampler import SamplingConfig
from sddit_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images a run trains on, and how it reads them."""

    source: str = setting(
        "folder:",
        "C",
        "digits (of scikit-learn), folder:PATH (image files, one sub-folder for each class), tfds:NAME (TensorFlow "
        "Datasets) or latents:PATH (a folder that `python -m sddit_jax.prepare` wrote)",
    )
    split: str = setting(
        "train", "C", "split of the dataset, such as train or validation; with tfds also a slice, such as train[:10%]"
    )
    download: bool = setting(False, "C", "whether TensorFlow Datasets may download and prepare a missing dataset")
    in_memory: bool = setting(
        False, "C", "whether to load all latents into host memory first (those of ImageNet at 256 pixels: 42 GB)"
    )
    verify: bool = setting(
        False, "C", "whether to compare the SHA-256 of all files of latents with their record before the first step"
    )
    flip: bool = setting(True, "I", "whether to mirror each image left to right with probability 1/2")
    num_threads: int = setting(
        16, "C", "threads that read and decode images, in each process (latents in memory: always 1)", least=1
    )
    prefetch: int = setting(16, "C", "batches that each process reads ahead", least=1)


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """The mesh of devices, and how a batch is computed on it.

    The product of data, fsdp and tensor is the number of devices.
    """

    data: int = setting(
        -1,
        "C",
        "devices along the data axis, which splits the batch; -1, for one axis at most: all that are left",
        least=-1,
    )
    fsdp: int = setting(
        1,
        "C",
        "devices along the fsdp axis, which splits the batch, parameters, EMAs and optimiser state; -1: as for data",
        least=-1,
    )
    tensor: int = setting(
        1,
        "C",
        "devices along the tensor axis, which splits attention heads and MLP channels; -1: as for data",
        least=-1,
    )
    microbatches: int = setting(
        1, "C", "parts of a batch whose gradients are computed one after another, in less device memory", least=1
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a run saves checkpoints, and which it keeps. A run also saves at its last step and when it is stopped."""

    every: int = setting(5000, "C", "steps between checkpoints", least=1)
    keep_last: int = setting(2, "C", "how many of the newest checkpoints to keep", least=1)
    keep_every: int = setting(
        50_000, "I", "also keep the checkpoints of steps that are divisible by this number; 0: none", least=0
    )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What a run measures on its own samples.

    During training it measures a distance to a reference; at the last step it compares the samples with real digits.
    """

    name: str = setting(
        "none",
        "C",
        "'digits' compares samples with scikit-learn's digits at the last step (with data.source=digits); 'none' "
        "does not",
        choices=("none", "digits"),
    )
    draws: int = setting(
        5, "C", "for 'digits': independent draws of samples, over which the metrics are averaged", least=1
    )
    num_samples: int = setting(
        1000, "C", "samples in each draw, and samples that each distance is computed from", least=2
    )
    every: int = setting(
        0,
        "C",
        "steps between distances to the reference (with Inception's features: FID), a multiple of checkpoint.every; "
        "the checkpoint with the lowest distance is kept; 0: none",
        least=0,
    )
    reference: str = setting(
        "",
        "C",
        "npz file that samples are compared with; `python -m sddit_jax.evaluate --write_reference=FILE` writes one",
    )
    features: str = setting("inception", "C", "features that a distance compares: inception or pixels")
    inception: str = setting("", "C", "file of Inception's weights, which the features inception need")

    def check(self, prefix: str) -> None:
        """Raises ConfigError for distances without a file that they are computed from."""
        if self.every and not self.reference:
            raise ConfigError(
                f"{prefix}every is {self.every}, but {prefix}reference names no npz file; python -m "
                "sddit_jax.evaluate --write_reference=FILE writes one"
            )
        if self.every and self.features == "inception" and not self.inception:
            raise ConfigError(f"{prefix}every is {self.every}, but {prefix}inception names no file of weights")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What a run logs, and how often."""

    every: int = setting(100, "C", "steps between rows of metrics.jsonl", least=1)
    diagnose_every: int = setting(
        1000, "C", "steps between tests of the teacher for collapse (teacher/*/information); 0: none", least=0
    )
    tensorboard: bool = setting(
        True, "C", "whether to write TensorBoard events, if tensorboardX, or PyTorch with tensorboard, is installed"
    )
    wandb: str = setting("", "C", "name of the Weights & Biases project to log to; empty: none")


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole configuration of a run. These keys stand in no section."""

    seed: int = setting(
        0,
        "I",
        "seed of all randomness: first weights, order of the data, noise, masks, samples in grids",
        least=0,
        most=2**31 - 2**16,
    )
    steps: int = setting(400_000, "I", "training steps of the whole run; schedules that span the run end here", least=1)
    batch_size: int = setting(256, "I", "images in a training step, over all devices and processes together", least=1)
    init_from: str = setting(
        "",
        "C",
        "folder of another run, whose newest weights a run without a checkpoint starts from; empty: random weights",
    )
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    masking: MaskingConfig = MaskingConfig()
    objectives: ObjectivesConfig = ObjectivesConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EMAConfig = EMAConfig()
    data: DataConfig = DataConfig()
    codec: CodecConfig = CodecConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sampling: SamplingConfig = SamplingConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
