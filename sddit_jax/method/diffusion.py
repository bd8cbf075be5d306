"""Diffusions: the noise levels of training, the noising and the preconditioning, as one object."""

import abc
import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sddit_jax.errors import ConfigError
from sddit_jax.settings import setting


class Preconditioning(NamedTuple):
    """Coefficients [B], float32: D(x; sigma) = c_skip x + c_out F(c_in x, c_noise) (Karras et al. 2022, Eq. 7)."""

    skip_B: jax.Array
    out_B: jax.Array
    in_B: jax.Array
    c_noise_B: jax.Array


class Diffusion(abc.ABC):
    """Noises x = x0 + sigma * eps, and makes the denoiser D(x; sigma) of a network F.

    A subclass is a frozen dataclass; its fields, made by `setting`, are its section of the configuration. Noise levels
    sigma are float32 [B], images float32 [B, H, W, C]. A variance-preserving diffusion fits too: its noisy image is
    x / sqrt(1 + sigma^2).

    sigma_min, sigma_max: the lowest and the highest noise level of sampling. highest: no network can be told of a
    level above it. sigmas: float32 [steps], rising, if the diffusion has a table of noise levels, else None.
    """

    sigma_min: float
    sigma_max: float
    highest: float = np.inf
    sigmas: np.ndarray | None = None

    def preconditioned_as(self) -> tuple[str, float | None]:
        """(kind, sigma_data): networks for which this is equal take the same inputs at the same noise levels."""
        return type(self).__name__, getattr(self, "sigma_data", None)

    @abc.abstractmethod
    def sample_sigma(self, key: jax.Array, batch: int) -> jax.Array:
        """Noise levels of a training batch: [B]."""

    @abc.abstractmethod
    def preconditioning(self, sigma_B: jax.Array) -> Preconditioning:
        """The coefficients at given noise levels."""

    def noised(self, x_BHWC: jax.Array, eps_BHWC: jax.Array, sigma_B: jax.Array) -> jax.Array:
        """x0 + sigma * eps: at each sigma a point of one trajectory of the probability-flow ODE. x_BHWC: x0."""
        return x_BHWC + _per_image(sigma_B) * eps_BHWC

    def weight(self, sigma_B: jax.Array) -> jax.Array:
        """The weight of the denoised image's squared error: 1 / c_out^2, so that F's squared error has weight 1."""
        return 1 / jnp.square(self.preconditioning(sigma_B).out_B)

    def network_input(self, x_BHWC: jax.Array, sigma_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The network's inputs (c_in * x, c_noise)."""
        c = self.preconditioning(sigma_B)
        return _per_image(c.in_B) * x_BHWC, c.c_noise_B

    def denoised(self, x_BHWC: jax.Array, output_BHWC: jax.Array, sigma_B: jax.Array) -> jax.Array:
        """The denoised image D = c_skip * x + c_out * F, float32 [B, H, W, C].

        output_BHWC: F, or [B, H, W, 2C] with a learnt variance behind F.
        """
        c = self.preconditioning(sigma_B)
        f_BHWC = output_BHWC[..., : x_BHWC.shape[-1]].astype(jnp.float32)
        return _per_image(c.skip_B) * x_BHWC + _per_image(c.out_B) * f_BHWC


@dataclasses.dataclass(frozen=True)
class EDM(Diffusion):
    """EDM (Karras et al. 2022, arXiv 2206.00364, Table 1, last column).

    A noise level, sigma, is the standard deviation of the noise, in units of what the network sees.
    """

    sigma_data: float = setting(
        0.5, "I", "standard deviation of the data as the network sees them, after codec.mean and codec.scale", above=0
    )
    log_sigma_mean: float = setting(-1.2, "I", "mean of ln sigma, the logarithm of the noise level, in training")
    log_sigma_std: float = setting(1.2, "I", "standard deviation of ln sigma in training", above=0)
    sigma_min: float = setting(
        0.002,
        "S",
        "lowest noise level: of sampling, before it ends at 0, and of the discrimination's teacher at every step",
        above=0,
    )
    sigma_max: float = setting(80.0, "I", "noise level at which sampling starts", above=0)

    def check(self, prefix: str) -> None:
        """Raises ConfigError unless sigma_max is above sigma_min."""
        if self.sigma_max <= self.sigma_min:
            raise ConfigError(f"{prefix}sigma_max {self.sigma_max} is not above {prefix}sigma_min {self.sigma_min}")

    def sample_sigma(self, key: jax.Array, batch: int) -> jax.Array:
        """ln sigma ~ N(log_sigma_mean, log_sigma_std^2)."""
        return jnp.exp(self.log_sigma_mean + self.log_sigma_std * jax.random.normal(key, (batch,)))

    def preconditioning(self, sigma_B: jax.Array) -> Preconditioning:
        """c_noise = ln(sigma) / 4; the network's input and F's target have unit variance."""
        total_B = sigma_B**2 + self.sigma_data**2
        in_B = jax.lax.rsqrt(total_B)
        skip_B, out_B = self.sigma_data**2 / total_B, sigma_B * self.sigma_data * in_B
        return Preconditioning(skip_B, out_B, in_B, jnp.log(sigma_B) / 4)


def _ddpm_sigmas() -> np.ndarray:
    """sigma(t) = sqrt((1 - alpha_bar) / alpha_bar) for t = 0 to 999, betas linear from 1e-4 to 0.02: float32 [1000]."""
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000, dtype=np.float64))
    return np.sqrt((1 - alpha_bar) / alpha_bar).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class DDPM(Diffusion):
    """DDPM (Ho et al. 2020, arXiv 2006.11239) with the 1,000 steps of DiT.

    F predicts eps from the variance-preserving x_t and the step t, an integer in training. Written with
    x = x0 + sigma * eps this is a preconditioning of its own (Karras et al. 2022, Table 1, first column), and sigma(t)
    is a table.
    """

    sigmas: ClassVar[np.ndarray] = _ddpm_sigmas()
    sigma_min: ClassVar[float] = float(sigmas[0])
    sigma_max: ClassVar[float] = float(sigmas[-1])
    highest: ClassVar[float] = sigma_max

    def sample_sigma(self, key: jax.Array, batch: int) -> jax.Array:
        """sigma(t) of uniform steps t."""
        return jnp.asarray(self.sigmas)[jax.random.randint(key, (batch,), 0, len(self.sigmas))]

    def preconditioning(self, sigma_B: jax.Array) -> Preconditioning:
        """c_noise = t: exact at a sigma of the table, and interpolated between two."""
        t_B = jnp.interp(sigma_B, jnp.asarray(self.sigmas), jnp.arange(len(self.sigmas), dtype=jnp.float32))
        return Preconditioning(jnp.ones_like(sigma_B), -sigma_B, jax.lax.rsqrt(1 + sigma_B**2), t_B)


def _per_image(value_B: jax.Array) -> jax.Array:
    return value_B[:, None, None, None]
