"""What keys of different sections must have in common. What concerns one section alone stands with it, as `check`."""

from sddit_jax.config.schema import Config
from sddit_jax.errors import ConfigError, UserError
from sddit_jax.method.diffusions import make_diffusion
from sddit_jax.method.objectives.compose import OBJECTIVES
from sddit_jax.sampling.sampler import SOLVERS


def check_together(config: Config, guide: bool) -> None:
    """Raises ConfigError for values that cannot be run together.

    guide: another network guides the samples, so that they need no null label.
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
    """Raises UserError if a network of `guide` cannot guide one of `config`: another image, label or preconditioning.

    The sizes of the networks and their methods may differ.
    """
    keys = ("model.image_size", "model.channels", "model.num_classes", "codec.name", "codec.mean", "codec.scale")
    pairs = [
        (key, *(getattr(getattr(c, key.split(".")[0]), key.split(".")[1]) for c in (config, guide))) for key in keys
    ]
    pairs.append(("diffusion", *(make_diffusion(c.diffusion).preconditioned_as() for c in (config, guide))))
    for key, own, other in pairs:
        if own != other:
            raise UserError(f"the guide has {key} {other}, but the network that it is to guide {own}: they must agree")


def _check_objectives(config: Config) -> None:
    model, masking, objectives = config.model, config.masking, config.objectives
    if model.tokens * (1 - masking.ratio) + 1e-9 < 1:
        raise ConfigError(f"masking.ratio {masking.ratio} leaves none of the {model.tokens} tokens visible")
    if masking.ratio > 0 and model.decoder_depth == 0:
        raise ConfigError(
            f"masking.ratio is {masking.ratio}, but model.decoder_depth is 0, so nothing predicts the invisible "
            "tokens: set masking.ratio to 0"
        )
    reconstruction = objectives.reconstruction
    if reconstruction.active and masking.ratio == 0:
        key = "weight" if reconstruction.weight else "final_weight"
        raise ConfigError(
            f"objectives.reconstruction.{key} is {getattr(reconstruction, key)}, but there are no invisible tokens to "
            "reconstruct: masking.ratio is 0"
        )
    if reconstruction.active and model.patch**2 * model.channels == 1:
        raise ConfigError(
            "objectives.reconstruction needs patches of more than one value: their variance normalises them"
        )
    for kind in OBJECTIVES:
        section = getattr(objectives, kind.name)
        if section.weight_schedule != "constant" and section.weight_steps[1] <= section.weight_steps[0]:
            raise ConfigError(
                f"objectives.{kind.name}.weight_steps is {section.weight_steps}, but its last must be above its first: "
                f"weight_schedule is {section.weight_schedule!r}"
            )
        if section.weight_schedule == "constant" and (section.final_weight or section.weight_steps != (0, 0)):
            raise ConfigError(
                f"objectives.{kind.name}.final_weight is {section.final_weight} and weight_steps "
                f"{section.weight_steps}, but weight_schedule is 'constant': set it to linear or cosine, or both to 0"
            )
    if not any(getattr(objectives, kind.name).active for kind in OBJECTIVES):
        raise ConfigError("all weights in objectives are 0, so there is nothing to train")


def _check_channels(config: Config) -> None:
    channels = config.model.channels
    for name, values in (("mean", config.codec.mean), ("scale", config.codec.scale)):
        if len(values) not in (1, channels):
            raise ConfigError(
                f"codec.{name} has {len(values)} values, but must have 1 or one for each of {channels} channels"
            )
    if config.sampling.guidance_channels > channels:
        raise ConfigError(
            f"sampling.guidance_channels is {config.sampling.guidance_channels}, but model.channels {channels}"
        )


def _check_sampling(config: Config, guide: bool) -> None:
    model, sampling, diffusion = config.model, config.sampling, make_diffusion(config.diffusion)
    dropout, name, table = config.objectives.label_dropout, config.diffusion.name, diffusion.sigmas
    if sampling.guidance != 1 and not guide and (model.num_classes == 0 or dropout == 0):
        raise ConfigError(
            f"sampling.guidance is {sampling.guidance}, but it needs a trained null label: model.num_classes "
            f"is {model.num_classes}, objectives.label_dropout {dropout}"
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
            f"sampling.sigma_min is {sampling.sigma_min} and sampling.sigma_max {sampling.sigma_max}, but "
            f"diffusion.name is {name!r}, whose noise levels are fixed: leave both at 0"
        )
    lowest, highest = sampling.sigma_min or diffusion.sigma_min, sampling.sigma_max or diffusion.sigma_max
    if highest <= lowest:
        raise ConfigError(
            f"sampling goes from noise level {highest} (sampling.sigma_max, or the diffusion's sigma_max if that is 0) "
            f"to {lowest} (sampling.sigma_min, or the diffusion's sigma_min if that is 0), which must be below it"
        )


def _check_data(config: Config) -> None:
    source, codec = config.data.source, config.codec.name
    if (codec == "latents") != source.startswith("latents:") and source != "folder:":
        raise ConfigError(f"codec.name is {codec!r}, but data.source is {source!r}")


def _check_evaluation(config: Config) -> None:
    evaluation = config.eval
    if evaluation.name == "digits" and config.data.source != "digits":
        raise ConfigError(f"eval.name is 'digits', but data.source is {config.data.source!r}")
    if evaluation.every % config.checkpoint.every:
        raise ConfigError(
            f"eval.every {evaluation.every} is not divisible by checkpoint.every {config.checkpoint.every}, but "
            "the checkpoint with the lowest distance is kept"
        )
    if evaluation.every and config.codec.name == "latents" and not config.codec.autoencoder:
        raise ConfigError(
            f"eval.every is {evaluation.every}, but codec.autoencoder, which makes images of latents, is empty"
        )
