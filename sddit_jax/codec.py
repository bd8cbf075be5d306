"""How stored images become what the network sees, and back."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class PixelCodec:
    """z = (x - mean) * scale with x = pixel / 127.5 - 1 in [-1, 1]; mean and scale have a value per channel or one.

    The scale brings the data to the standard deviation that the diffusion assumes (sigma_data).
    """

    mean: tuple[float, ...]
    scale: tuple[float, ...]

    def encode(self, image_BHWC: jax.Array) -> jax.Array:
        """uint8 [B, H, W, C] -> float32."""
        x = image_BHWC.astype(jnp.float32) / 127.5 - 1
        return (x - self._row(self.mean)) * self._row(self.scale)

    def decode(self, z_BHWC: jax.Array) -> jax.Array:
        """float32 -> uint8 by clip(127.5 x + 128), the rounding of DiT and EDM; the exact inverse of `encode`."""
        x = z_BHWC / self._row(self.scale) + self._row(self.mean)
        return jnp.clip(127.5 * x + 128, 0, 255).astype(jnp.uint8)

    def record(self) -> dict[str, object]:
        """What a dataset, a checkpoint and a file of samples say about it."""
        return {"name": "pixels", "mean": list(self.mean), "scale": list(self.scale)}

    @staticmethod
    def _row(values: tuple[float, ...]) -> jax.Array:
        return jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1)
