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
    """Where images come from."""

    source: str = setting("folder:", "C", "digits, folder:PATH, tfds:NAME or latents:PATH")
    split: str = setting("train", "C", "split of the dataset")
    download: bool = setting(False, "C", "let TensorFlow Datasets download and prepare what is missing")
    in_memory: bool = setting(False, "C", "load all latents before the first step; of ImageNet at 256 pixels 42 GB")
    verify: bool = setting(False, "C", "compare the checksums of the files of latents before the first step")
    flip: bool = setting(True, "I", "mirror half of the images")
    num_threads: int = setting(16, "C", "reading threads", least=1)
    prefetch: int = setting(16, "C", "batches read ahead", least=1)


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """The device mesh, and how a batch is computed on it."""

    data: int = setting(-1, "C", "devices along the data axis; -1, for one of the axes: what is left", least=-1)
    fsdp: int = setting(1, "C", "devices along the fsdp axis, which shards parameters too", least=-1)
    tensor: int = setting(1, "C", "devices along the tensor axis", least=-1)
    microbatches: int = setting(1, "C", "parts in which a batch's gradient is computed, one after another", least=1)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep."""

    every: int = setting(5000, "C", "steps between checkpoints", least=1)
    keep_last: int = setting(2, "C", "newest checkpoints to keep", least=1)
    keep_every: int = setting(50_000, "I", "also keep every step divisible by this; 0: none", least=0)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What is measured when the run is done, and the distance to a reference that is measured during it."""

    name: str = setting(
        "none", "C", "none, or digits: the samples judged against the real digits", choices=("none", "digits")
    )
    draws: int = setting(5, "C", "independent draws of samples", least=1)
    num_samples: int = setting(1000, "C", "samples in a draw, and of a distance", least=2)
    every: int = setting(
        0, "C", "steps between distances; 0: none. The checkpoint with the lowest is kept, beside the newest", least=0
    )
    reference: str = setting("", "C", "npz file that samples are compared with; `evaluate` writes one")
    features: str = setting("inception", "C", "feature space in which images are compared: inception, pixels")
    inception: str = setting("", "C", "file of Inception's weights")

    def check(self) -> None:
        """Raises ConfigError for a distance without the files that it is computed from."""
        if self.every and not self.reference:
            raise ConfigError(
                f"eval.every is {self.every}, but eval.reference names no npz file; python -m sddit_jax.evaluate "
                "--write_reference writes one"
            )
        if self.every and self.features == "inception" and not self.inception:
            raise ConfigError(f"eval.every is {self.every}, but eval.inception names no file of weights")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is written, and how often."""

    every: int = setting(100, "C", "steps between rows of metrics.jsonl", least=1)
    diagnose_every: int = setting(1000, "C", "steps between diagnoses of the teacher's assignments; 0: none", least=0)
    tensorboard: bool = setting(True, "C", "write TensorBoard events when a writer is installed")
    wandb: str = setting("", "C", "Weights & Biases project; empty: off")


@dataclasses.dataclass(frozen=True)
class Config:
    """One run, whole."""

    seed: int = setting(0, "I", "seed of everything", least=0, most=2**31 - 2**16)
    steps: int = setting(400_000, "I", "training steps", least=1)
    batch_size: int = setting(256, "I", "global batch size", least=1)
    init_from: str = setting("", "C", "folder of a run whose weights a new run starts from; empty: fresh ones")
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
