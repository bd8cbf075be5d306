"""Noise levels, noising and preconditioning: one object that the rest is written against."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class EDM:
    """EDM (Karras et al. 2022, arXiv 2206.00364): x = x0 + sigma * eps, with the preconditioning of its Table 1.

    All noise levels are float32 arrays [B]; images are [B, H, W, C].
    """

    sigma_data: float = 0.5
    log_sigma_mean: float = -1.2
    log_sigma_std: float = 1.2
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def sample_sigma(self, key: jax.Array, batch: int) -> jax.Array:
        """Training noise levels [B]: ln sigma ~ N(log_sigma_mean, log_sigma_std^2)."""
        return jnp.exp(self.log_sigma_mean + self.log_sigma_std * jax.random.normal(key, (batch,)))

    def noised(self, x_BHWC: jax.Array, eps_BHWC: jax.Array, sigma_B: jax.Array) -> jax.Array:
        """The point at sigma of the PF-ODE trajectory that eps and the clean image fix."""
        return x_BHWC + _per_image(sigma_B) * eps_BHWC

    def weight(self, sigma_B: jax.Array) -> jax.Array:
        """Weight of the squared error of the denoised image: 1 / c_out(sigma)^2."""
        return (sigma_B**2 + self.sigma_data**2) / (sigma_B * self.sigma_data) ** 2

    def network_input(self, x_BHWC: jax.Array, sigma_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(c_in * x, c_noise): what the network is given."""
        c_in_B = jax.lax.rsqrt(sigma_B**2 + self.sigma_data**2)
        return _per_image(c_in_B) * x_BHWC, jnp.log(sigma_B) / 4

    def denoised(self, x_BHWC: jax.Array, output_BHWC: jax.Array, sigma_B: jax.Array) -> jax.Array:
        """D = c_skip * x + c_out * F: the denoised image from the network's output F, in float32."""
        total_B = sigma_B**2 + self.sigma_data**2
        c_skip_B = self.sigma_data**2 / total_B
        c_out_B = sigma_B * self.sigma_data * jax.lax.rsqrt(total_B)
        return _per_image(c_skip_B) * x_BHWC + _per_image(c_out_B) * output_BHWC.astype(jnp.float32)

    def denoise(
        self, network: Callable[[jax.Array, jax.Array], jax.Array], x_BHWC: jax.Array, sigma_B: jax.Array
    ) -> jax.Array:
        """D(x; sigma) with network(c_in * x, c_noise) -> F."""
        return self.denoised(x_BHWC, network(*self.network_input(x_BHWC, sigma_B)), sigma_B)


def _per_image(value_B: jax.Array) -> jax.Array:
    return value_B[:, None, None, None]
