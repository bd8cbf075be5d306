"""The checks of keys of different sections. What concerns one section alone is checked by its own `check`."""

import operator

from sddit_jax.config.schema import Config
from sddit_jax.errors import ConfigError, UserError
from sddit_jax.method.diffusions import make_diffusion
from sddit_jax.method.objectives.compose import OBJECTIVES
from sddit_jax.sampling.sampler import SOLVERS


def check_together(config: Config, guide: bool) -> None:
    """Raises ConfigError for values of different sections that exclude each other.

    guide: whether another network guides the samples; guidance then needs no null label.
    """
    _check_objectives(config)
    _check_channels(config)
    _check_sampling(config, guide)
    _check_data(config)
    _check_evaluation(config)
    if config.batch_size % config.parallel.microbatches:
        raise ConfigError(
            f"batch_size {config.batch_size} is not divisible by parallel.microbatches {config.parallel.microbatches}"
        )


def check_guide(config: Config, guide: Config) -> None:
    """Raises UserError if the network of `guide` cannot guide the network of `config`.

    Images, labels and preconditioning of the two must be the same; sizes and methods may differ.
    """
    keys = ("model.image_size", "model.channels", "model.num_classes", "codec.name", "codec.mean", "codec.scale")
    shared = {key: [operator.attrgetter(key)(c) for c in (config, guide)] for key in keys}
    shared["diffusion"] = [make_diffusion(c.diffusion).preconditioned_as() for c in (config, guide)]
    for key, (own, other) in shared.items():
        if own != other:
            raise UserError(f"the guide has {key} {other}, but the network to guide has {own}: they must be the same")


def _check_objectives(config: Config) -> None:
    model, masking, objectives = config.model, config.masking, config.objectives
    if model.tokens * (1 - masking.ratio) + 1e-9 < 1:
        raise ConfigError(f"masking.ratio {masking.ratio} makes all {model.tokens} tokens invisible: lower it")
    if masking.ratio > 0 and model.decoder_depth == 0:
        raise ConfigError(
            f"masking.ratio is {masking.ratio}, but model.decoder_depth is 0 and only a decoder predicts invisible "
            "tokens: set masking.ratio to 0"
        )
    reconstruction = objectives.reconstruction
    if reconstruction.active and masking.ratio == 0:
        key = "weight" if reconstruction.weight else "final_weight"
        raise ConfigError(
            f"objectives.reconstruction.{key} is {getattr(reconstruction, key)}, but masking.ratio is 0, which leaves "
            "no invisible tokens to reconstruct"
        )
    if reconstruction.active and model.patch**2 * model.channels == 1:
        raise ConfigError(
            "objectives.reconstruction divides each patch by its standard deviation, but with model.patch 1 and "
            "model.channels 1 a patch is one value"
        )
    if not any(getattr(objectives, kind.name).active for kind in OBJECTIVES):
        raise ConfigError("all weights in objectives are 0: set one above 0, such as objectives.denoising.weight")


def _check_channels(config: Config) -> None:
    channels = config.model.channels
    for name, values in (("mean", config.codec.mean), ("scale", config.codec.scale)):
        if len(values) not in (1, channels):
            raise ConfigError(
                f"codec.{name} has {len(values)} values, but must have 1, or one for each of {channels} channels"
            )
    if config.sampling.guidance_channels > channels:
        raise ConfigError(
            f"sampling.guidance_channels is {config.sampling.guidance_channels}, but must be at most "
            f"model.channels, {channels}"
        )


def _check_sampling(config: Config, guide: bool) -> None:
    model, sampling, diffusion = config.model, config.sampling, make_diffusion(config.diffusion)
    dropout, name, table = config.objectives.label_dropout, config.diffusion.name, diffusion.sigmas
    if sampling.guidance != 1 and not guide and (model.num_classes == 0 or dropout == 0):
        raise ConfigError(
            f"sampling.guidance is {sampling.guidance}, but no null label is trained: model.num_classes is "
            f"{model.num_classes}, objectives.label_dropout {dropout}; guidance needs both above 0"
        )
    if SOLVERS[sampling.solver].own_levels:
        if table is None:
            others = [solver for solver, row in SOLVERS.items() if not row.own_levels]
            raise ConfigError(
                f"sampling.solver is {sampling.solver!r}, but diffusion.name {name!r} has no table of noise levels: "
                f"set one of {', '.join(others)}"
            )
        if sampling.steps > len(table):
            raise ConfigError(f"sampling.steps is {sampling.steps}, but {name} has {len(table)} noise levels")
    if table is not None and (sampling.sigma_min or sampling.sigma_max):
        raise ConfigError(
            f"sampling.sigma_min is {sampling.sigma_min} and sampling.sigma_max {sampling.sigma_max}, but the noise "
            f"levels of diffusion.name {name!r} are fixed: leave both at 0"
        )
    lowest, highest = sampling.sigma_min or diffusion.sigma_min, sampling.sigma_max or diffusion.sigma_max
    if highest <= lowest:
        raise ConfigError(
            f"sampling starts at noise level {highest} (sampling.sigma_max, or the diffusion's sigma_max if that is 0) "
            f"and ends at {lowest} (sampling.sigma_min, or the diffusion's sigma_min if that is 0), but must end below "
            "its start"
        )


def _check_data(config: Config) -> None:
    source, codec = config.data.source, config.codec.name
    if (codec == "latents") != source.startswith("latents:") and source != "folder:":
        raise ConfigError(
            f"codec.name is {codec!r}, but data.source is {source!r}: sources latents:PATH need the codec 'latents', "
            "all others 'pixels'"
        )


def _check_evaluation(config: Config) -> None:
    evaluation = config.eval
    if evaluation.name == "digits" and config.data.source != "digits":
        raise ConfigError(f"eval.name is 'digits', but data.source is {config.data.source!r}: set eval.name to none")
    if evaluation.every % config.checkpoint.every:
        raise ConfigError(
            f"eval.every {evaluation.every} is not divisible by checkpoint.every {config.checkpoint.every}, but the "
            "checkpoint with the lowest distance is kept, so each distance needs a checkpoint"
        )
    if evaluation.every and config.codec.name == "latents" and not config.codec.autoencoder:
        raise ConfigError(
            f"eval.every is {evaluation.every}, but codec.autoencoder is empty: name the autoencoder that decodes "
            "latents to images"
        )
