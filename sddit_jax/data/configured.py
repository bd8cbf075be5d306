"""Opens the data of a configuration, and checks that the two fit together."""

from sddit_jax.config.schema import Config
from sddit_jax.data.image_sources import Source
from sddit_jax.data.sources import open_source
from sddit_jax.errors import ConfigError


def open_configured(config: Config) -> Source:
    """The source of a run's records.

    Raises DataError if the data cannot be read, and ConfigError if it has another number of classes than the model, or
    its autoencoder another mean or scale than the codec.
    """
    m = config.model
    source = open_source(
        config.data.source,
        split=config.data.split,
        image_size=m.image_size,
        channels=m.channels,
        download=config.data.download,
        in_memory=config.data.in_memory,
        verify=config.data.verify,
    )
    if source.codec is not None:
        for key, found in (("mean", source.codec["shift_factor"]), ("scale", source.codec["scaling_factor"])):
            values = getattr(config.codec, key)
            if len(values) == 1 and values != (found,):
                raise ConfigError(
                    f"codec.{key} is {values}, but the autoencoder of {source.name} has ({found},); to use another "
                    "value on purpose, give one for each channel"
                )
    if m.num_classes and source.num_classes != m.num_classes:
        raise ConfigError(
            f"model.num_classes is {m.num_classes}, but {source.name} has {source.num_classes} classes; "
            f"set model.num_classes={source.num_classes}, or 0 to train without labels"
        )
    return source
