"""Noise levels, noising and preconditioning: one object that the rest is written against."""

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sddit_jax.errors import ConfigError
from sddit_jax.settings import setting


class Preconditioning(NamedTuple):
    """D(x; sigma) = c_skip x + c_out F(c_in x, c_noise): float32 arrays [B] (Karras et al. 2022, Eq. 7)."""

    skip_B: jax.Array
    out_B: jax.Array
    in_B: jax.Array
    c_noise_B: jax.Array


class Diffusion(abc.ABC):
    """x = x0 + sigma * eps, and how a network F becomes the denoiser D(x; sigma) of such an x.

    A kind is a frozen dataclass whose fields, made by `setting`, are its section of the configuration. All noise levels
    are float32 arrays [B]; images are [B, H, W, C]. A variance-preserving diffusion is meant too: its noisy image is
    x / sqrt(1 + sigma^2). sigma_min and sigma_max are those of sampling; a network cannot be told of a level above
    `highest`. sigmas: float32 [steps], the levels of a diffusion that has a table of its own, rising; otherwise None.
    """

    sigma_min: float
    sigma_max: float
    highest: float = np.inf
    sigmas: np.ndarray | None = None

    def preconditioned_as(self) -> tuple[str, float | None]:
        """What two networks must share so that each can be told what the other is told: kind, and scale of the data."""
        return type(self).__name__, getattr(self, "sigma_data", None)

    @abc.abstractmethod
    def sample_sigma(self, key: jax.Array, batch: int) -> jax.Array:
        """Noise levels for training [B]."""

    @abc.abstractmethod
    def preconditioning(self, sigma_B: jax.Array) -> Preconditioning:
        """The coefficients at the noise levels."""

    def noised(self, x_BHWC: jax.Array, eps_BHWC: jax.Array, sigma_B: jax.Array) -> jax.Array:
        """The point at sigma of the PF-ODE trajectory that eps and the clean image fix."""
        return x_BHWC + _per_image(sigma_B) * eps_BHWC

    def weight(self, sigma_B: jax.Array) -> jax.Array:
        """Weight of the squared error of the denoised image, 1 / c_out^2: that of the error of F is then 1."""
        return 1 / jnp.square(self.preconditioning(sigma_B).out_B)

    def network_input(self, x_BHWC: jax.Array, sigma_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(c_in * x, c_noise): what the network is given."""
        c = self.preconditioning(sigma_B)
        return _per_image(c.in_B) * x_BHWC, c.c_noise_B

    def denoised(self, x_BHWC: jax.Array, output_BHWC: jax.Array, sigma_B: jax.Array) -> jax.Array:
        """D = c_skip * x + c_out * F: the denoised image, in float32.

        Of an output with more channels than x (a learnt variance behind them) the first are F.
        """
        c = self.preconditioning(sigma_B)
        f_BHWC = output_BHWC[..., : x_BHWC.shape[-1]].astype(jnp.float32)
        return _per_image(c.skip_B) * x_BHWC + _per_image(c.out_B) * f_BHWC

    def denoise(
        self, network: Callable[[jax.Array, jax.Array], jax.Array], x_BHWC: jax.Array, sigma_B: jax.Array
    ) -> jax.Array:
        """D(x; sigma) with network(c_in * x, c_noise) -> F."""
        return self.denoised(x_BHWC, network(*self.network_input(x_BHWC, sigma_B)), sigma_B)


@dataclasses.dataclass(frozen=True)
class EDM(Diffusion):
    """EDM (Karras et al. 2022, arXiv 2206.00364), with the last column of its Table 1."""

    sigma_data: float = setting(0.5, "I", "standard deviation of the data that the network sees", above=0)
    log_sigma_mean: float = setting(-1.2, "I", "mean of ln sigma in training")
    log_sigma_std: float = setting(1.2, "I", "standard deviation of ln sigma in training", above=0)
    sigma_min: float = setting(0.002, "S", "lowest noise level; the teacher's, always", above=0)
    sigma_max: float = setting(80.0, "I", "noise level at which sampling starts", above=0)

    def check(self) -> None:
        """Raises ConfigError unless sigma_max is above sigma_min."""
        if self.sigma_max <= self.sigma_min:
            raise ConfigError(
                f"diffusion.edm.sigma_max {self.sigma_max} is not above diffusion.edm.sigma_min {self.sigma_min}"
            )

    def sample_sigma(self, key: jax.Array, batch: int) -> jax.Array:
        """ln sigma ~ N(log_sigma_mean, log_sigma_std^2)."""
        return jnp.exp(self.log_sigma_mean + self.log_sigma_std * jax.random.normal(key, (batch,)))

    def preconditioning(self, sigma_B: jax.Array) -> Preconditioning:
        """c_noise = ln(sigma) / 4; x has unit variance at the network's input, and so has F's target."""
        total_B = sigma_B**2 + self.sigma_data**2
        in_B = jax.lax.rsqrt(total_B)
        skip_B, out_B = self.sigma_data**2 / total_B, sigma_B * self.sigma_data * in_B
        return Preconditioning(skip_B, out_B, in_B, jnp.log(sigma_B) / 4)


@dataclasses.dataclass(frozen=True)
class DDPM(Diffusion):
    """DDPM (Ho et al. 2020, arXiv 2006.11239) as DiT uses it: 1,000 steps, betas linear from 1e-4 to 0.02.

    F predicts eps from the variance-preserving x_t and its step t, an integer in training. In terms of x = x0 + sigma
    eps that is another preconditioning (Karras et al. 2022, Table 1, first column), with sigma(t) from a table.
    """

    steps: ClassVar[int] = 1000
    first_beta: ClassVar[float] = 1e-4
    last_beta: ClassVar[float] = 0.02

    @property
    def sigmas(self) -> np.ndarray:
        """sigma(t) = sqrt((1 - alpha_bar) / alpha_bar) for t = 0, 1, ...: float32 [steps]."""
        alpha_bar = np.cumprod(1 - np.linspace(self.first_beta, self.last_beta, self.steps, dtype=np.float64))
        return np.sqrt((1 - alpha_bar) / alpha_bar).astype(np.float32)

    @property
    def sigma_min(self) -> float:
        """sigma(0)."""
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        """sigma of the last step."""
        return float(self.sigmas[-1])

    @property
    def highest(self) -> float:
        """The same: behind the last step there is none."""
        return self.sigma_max

    def sample_sigma(self, key: jax.Array, batch: int) -> jax.Array:
        """t is uniform."""
        return jnp.asarray(self.sigmas)[jax.random.randint(key, (batch,), 0, self.steps)]

    def preconditioning(self, sigma_B: jax.Array) -> Preconditioning:
        """c_noise = t, which is exact for a sigma of the table and interpolated between two."""
        t_B = jnp.interp(sigma_B, jnp.asarray(self.sigmas), jnp.arange(self.steps, dtype=jnp.float32))
        return Preconditioning(jnp.ones_like(sigma_B), -sigma_B, jax.lax.rsqrt(1 + sigma_B**2), t_B)


def _per_image(value_B: jax.Array) -> jax.Array:
    return value_B[:, None, None, None]
