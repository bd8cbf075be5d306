"""The configuration of a run: frozen dataclasses, in which each default lives once.

Each default says where its value is from:
  P  the SD-DiT paper's abstract or introduction
  S  a secondary source about SD-DiT
  I  inferred from MaskDiT, iBOT or EDM, on which SD-DiT builds
  C  our choice
"""

import dataclasses
from typing import Any


def _default(value: Any, source: str, meaning: str, **allowed: Any) -> Any:
    """A field: default, provenance (P, S, I or C), one line of documentation, and what its values may be.

    allowed: least, most, above (numbers; for a tuple, of each element) and choices (strings).
    """
    return dataclasses.field(default=value, metadata={"source": source, "meaning": meaning, **allowed})


@dataclasses.dataclass(frozen=True)
class Model:
    """The network. `models.sizes.decode` names the published sizes; any other numbers are as good."""

    image_size: int = _default(32, "I", "height and width of what the network sees (latents of 256 px: 32)", least=1)
    channels: int = _default(4, "I", "channels of what the network sees", least=1)
    num_classes: int = _default(1000, "I", "class labels; 0 trains without labels", least=0)
    patch: int = _default(2, "I", "height and width of a patch", least=1)
    depth: int = _default(28, "I", "encoder blocks", least=1)
    width: int = _default(1152, "I", "encoder width", least=1)
    heads: int = _default(16, "I", "encoder attention heads", least=1)
    mlp_ratio: float = _default(4.0, "I", "hidden width of a block's MLP over its width", above=0)
    decoder_depth: int = _default(8, "I", "decoder blocks; 0 puts the final layer on the encoder (DiT)", least=0)
    decoder_width: int = _default(512, "I", "decoder width", least=1)
    decoder_heads: int = _default(16, "I", "decoder attention heads", least=1)
    cls_token: bool = _default(True, "S", "whether the encoder carries a [CLS] token")
    null_label: str = _default(
        "zero", "I", "the dropped label: 'zero' vector (MaskDiT) or a learnt 'row' (DiT)", choices=("zero", "row")
    )
    learn_sigma: bool = _default(False, "I", "twice the output channels, as DiT's checkpoints have")
    scan: bool = _default(True, "C", "one compiled block in a loop (fast to compile), or unrolled")
    remat: str = _default(
        "none", "C", "what the backward pass recomputes: none, dots or full", choices=("none", "dots", "full")
    )
    dtype: str = _default(
        "float32", "C", "dtype of the matrix products: float32 or bfloat16", choices=("float32", "bfloat16")
    )


DDPM_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """EDM's noise levels and preconditioning (Karras et al. 2022, Table 1), or DDPM's, which have no knobs."""

    name: str = _default("edm", "I", "edm, or ddpm: what DiT's checkpoints need", choices=("edm", "ddpm"))
    sigma_data: float = _default(0.5, "I", "standard deviation of the data that the network sees", above=0)
    log_sigma_mean: float = _default(-1.2, "I", "mean of ln sigma in training")
    log_sigma_std: float = _default(1.2, "I", "standard deviation of ln sigma in training", above=0)
    sigma_min: float = _default(0.002, "S", "lowest noise level; the teacher's, always", above=0)
    sigma_max: float = _default(80.0, "I", "noise level at which sampling starts", above=0)


@dataclasses.dataclass(frozen=True)
class Masking:
    """Which tokens the student's encoder does not see, and what the decoder gets in their place."""

    ratio: float = _default(0.2, "S", "share of the student's tokens made invisible, in [0, 1)")
    fill: str = _default(
        "noisy",
        "P",
        "decoder input there: 'noisy' tokens, a learnt 'mask_token', or 'zeros' (MaskDiT with and without its loss on "
        "masked patches)",
        choices=("noisy", "mask_token", "zeros"),
    )


@dataclasses.dataclass(frozen=True)
class Denoising:
    """EDM's weighted denoising loss."""

    weight: float = _default(1.0, "I", "weight in the total loss", least=0)
    scope: str = _default(
        "all", "I", "average over 'all' patches, or the 'visible' ones (MaskDiT)", choices=("all", "visible")
    )


@dataclasses.dataclass(frozen=True)
class Discrimination:
    """Self-distillation between the student's and the teacher's tokens."""

    weight: float = _default(0.1, "C", "weight in the total loss; 0 trains without teacher and head", least=0)
    prototypes: int = _default(8192, "I", "number of prototypes K", least=2)
    head_width: int = _default(2048, "I", "hidden width of the projection head", least=1)
    bottleneck: int = _default(256, "I", "width of the head's normalised output", least=1)
    student_temperature: float = _default(0.1, "I", "temperature of the student's softmax", above=0)
    teacher_temperature: tuple[float, float] = _default(
        (0.04, 0.07), "I", "temperature of the teacher's softmax: first and last", above=0
    )
    teacher_temperature_warmup: float = _default(0.3, "I", "share of the run in which it rises", least=0, most=1)
    centering: str = _default(
        "mean",
        "S",
        "running mean of the logits: one 'mean' (DINO), or one per 'condition' (position, label)",
        choices=("mean", "condition"),
    )
    standardise: bool = _default(
        False, "C", "teacher temperatures in units of the running standard deviation of the centered logits"
    )
    center_momentum: float = _default(0.9, "I", "momentum of the running centers", least=0, most=1)
    teacher: str = _default("own", "C", "'own' EMA law, or 'ema': read the sampling EMA", choices=("own", "ema"))
    teacher_momentum: tuple[float, float] = _default(
        (0.996, 1.0), "C", "own law: momentum, first and last, by cosine over the run", least=0, most=1
    )
    chunk: int = _default(16, "C", "token positions whose prototype logits exist at one time", least=1)


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """MaskDiT's auxiliary loss: the noisy input of the invisible patches, normalised per patch."""

    weight: float = _default(0.0, "I", "weight in the total loss (MaskDiT: 0.1)", least=0)


@dataclasses.dataclass(frozen=True)
class Objectives:
    """The terms of the loss. A weight of 0 leaves a term, and all that only it needs, out."""

    denoising: Denoising = Denoising()
    discrimination: Discrimination = Discrimination()
    reconstruction: Reconstruction = Reconstruction()
    label_dropout: float = _default(0.1, "I", "share of labels replaced by the null label", least=0, most=1)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimiser of optax by name, with its learning rate a function of the step."""

    name: str = _default("adamw", "I", "adamw, adam, lion, sgd, radam, nadamw, lamb or muon")
    learning_rate: float = _default(1e-4, "I", "peak learning rate", above=0)
    schedule: str = _default(
        "constant", "I", "after warm-up: constant or cosine (to 0)", choices=("constant", "cosine")
    )
    warmup_steps: int = _default(0, "I", "steps of linear warm-up", least=0)
    b1: float = _default(0.9, "I", "decay of the first moment (momentum for sgd)", least=0, most=1)
    b2: float = _default(0.999, "I", "decay of the second moment", least=0, most=1)
    eps: float = _default(1e-8, "I", "added to the root of the second moment", above=0)
    weight_decay: float = _default(0.0, "I", "decoupled weight decay", least=0)
    clip_norm: float = _default(0.0, "I", "largest global gradient norm; 0 does not clip", least=0)
    max_skipped: int = _default(10, "C", "non-finite steps in a row, each skipped, before the run ends", least=1)


@dataclasses.dataclass(frozen=True)
class EMA:
    """The weights that sampling uses."""

    decay: float = _default(0.9999, "I", "decay of the sampling EMA", least=0, most=1)
    warmup: bool = _default(
        True,
        "C",
        "decay(t) = min(decay, (1 + t) / (10 + t)): forgets a random start; off for weights that are trained",
    )


@dataclasses.dataclass(frozen=True)
class Data:
    """Where images come from."""

    source: str = _default("folder:", "C", "digits, folder:PATH, tfds:NAME or latents:PATH")
    split: str = _default("train", "C", "split of the dataset")
    download: bool = _default(False, "C", "let TensorFlow Datasets download and prepare what is missing")
    in_memory: bool = _default(False, "C", "load all latents before the first step; of ImageNet at 256 pixels 42 GB")
    verify: bool = _default(False, "C", "compare the checksums of the files of latents before the first step")
    flip: bool = _default(True, "I", "mirror half of the images")
    num_threads: int = _default(16, "C", "reading threads", least=1)
    prefetch: int = _default(16, "C", "batches read ahead", least=1)


@dataclasses.dataclass(frozen=True)
class Codec:
    """How stored images become what the network sees: z = (x - mean) * scale, per channel."""

    name: str = _default(
        "pixels", "C", "x is 'pixels' in [-1, 1], or 'latents' of an autoencoder", choices=("pixels", "latents")
    )
    autoencoder: str = _default(
        "",
        "C",
        "of latents, what decodes samples: a folder of diffusers, a file of CompVis, or a hub id; empty: nothing",
    )
    mean: tuple[float, ...] = _default((0.0,), "C", "mean per channel; one value serves all")
    scale: tuple[float, ...] = _default((0.5,), "C", "scale per channel; one value serves all")


@dataclasses.dataclass(frozen=True)
class Parallel:
    """The device mesh, and how a batch is computed on it."""

    data: int = _default(-1, "C", "devices along the data axis; -1, for one of the axes: what is left", least=-1)
    fsdp: int = _default(1, "C", "devices along the fsdp axis, which shards parameters too", least=-1)
    tensor: int = _default(1, "C", "devices along the tensor axis", least=-1)
    microbatches: int = _default(1, "C", "parts in which a batch's gradient is computed, one after another", least=1)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When to save, and what to keep."""

    every: int = _default(5000, "C", "steps between checkpoints", least=1)
    keep_last: int = _default(2, "C", "newest checkpoints to keep", least=1)
    keep_every: int = _default(50_000, "I", "also keep every step divisible by this; 0: none", least=0)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How samples are drawn, and the grid of samples drawn during training."""

    solver: str = _default(
        "heun",
        "I",
        "heun, euler, stochastic (EDM) or dpmpp_2m (DPM-Solver++); for a ddpm model also ddim, or ddpm (random, with "
        "the learnt variance)",
        choices=("heun", "euler", "stochastic", "dpmpp_2m", "ddim", "ddpm"),
    )
    steps: int = _default(
        40, "I", "noise levels (network passes of heun and stochastic: 2 * steps - 1, of others: steps)", least=1
    )
    sigma_min: float = _default(0.0, "C", "lowest noise level but 0; 0: the diffusion's", least=0)
    sigma_max: float = _default(0.0, "C", "noise level at the start; 0: the diffusion's", least=0)
    rho: float = _default(7.0, "I", "exponent of the noise schedule", above=0)
    s_churn: float = _default(40.0, "I", "of stochastic: noise added, over all steps (EDM's for ImageNet)", least=0)
    s_min: float = _default(0.05, "I", "of stochastic: lowest noise level to add noise at", least=0)
    s_max: float = _default(50.0, "I", "of stochastic: highest noise level to add noise at", least=0)
    s_noise: float = _default(1.003, "I", "of stochastic: standard deviation of that noise over the exact one", least=0)
    guidance: float = _default(1.0, "C", "guidance, classifier-free or by a weaker network; 1: none", least=0)
    guidance_interval: tuple[float, float] = _default(
        (0.0, 0.0),
        "C",
        "guide only where low < noise level <= high, at half the cost elsewhere; high 0: no end",
        least=0,
    )
    guidance_channels: int = _default(0, "C", "guide only the first channels (DiT's own code: 3); 0: all", least=0)
    every: int = _default(5000, "C", "steps between sample grids; 0: none", least=0)
    grid: int = _default(64, "C", "images in a grid", least=1)


@dataclasses.dataclass(frozen=True)
class Eval:
    """What is measured when the run is done, and the distance to a reference that is measured during it."""

    name: str = _default(
        "none", "C", "none, or digits: the samples judged against the real digits", choices=("none", "digits")
    )
    draws: int = _default(5, "C", "independent draws of samples", least=1)
    num_samples: int = _default(1000, "C", "samples in a draw, and of a distance", least=2)
    every: int = _default(
        0, "C", "steps between distances; 0: none. The checkpoint with the lowest is kept, beside the newest", least=0
    )
    reference: str = _default("", "C", "npz file that samples are compared with; `evaluate` writes one")
    features: str = _default("inception", "C", "of what images are compared in", choices=("inception", "pixels"))
    inception: str = _default("", "C", "file of Inception's weights")


@dataclasses.dataclass(frozen=True)
class Log:
    """What is written, and how often."""

    every: int = _default(100, "C", "steps between rows of metrics.jsonl", least=1)
    diagnose_every: int = _default(1000, "C", "steps between diagnoses of the teacher's assignments; 0: none", least=0)
    tensorboard: bool = _default(True, "C", "write TensorBoard events when a writer is installed")
    wandb: str = _default("", "C", "Weights & Biases project; empty: off")


@dataclasses.dataclass(frozen=True)
class Config:
    """One run, whole."""

    seed: int = _default(0, "I", "seed of everything", least=0, most=2**31 - 2**16)
    steps: int = _default(400_000, "I", "training steps", least=1)
    batch_size: int = _default(256, "I", "global batch size", least=1)
    init_from: str = _default("", "C", "folder of a run whose weights a new run starts from; empty: fresh ones")
    model: Model = Model()
    diffusion: Diffusion = Diffusion()
    masking: Masking = Masking()
    objectives: Objectives = Objectives()
    optimizer: Optimizer = Optimizer()
    ema: EMA = EMA()
    data: Data = Data()
    codec: Codec = Codec()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    sampling: Sampling = Sampling()
    eval: Eval = Eval()
    log: Log = Log()
