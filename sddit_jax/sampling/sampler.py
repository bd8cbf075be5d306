"""Sampling: image i depends only on the weights, the seed, i and its label."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sddit_jax.errors import ConfigError
from sddit_jax.method.codec import Codec
from sddit_jax.method.diffusion import Diffusion
from sddit_jax.models.transformer import Network
from sddit_jax.sampling import solvers
from sddit_jax.sampling.guidance import make_denoise, make_guided, make_output
from sddit_jax.settings import setting

Sample = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]


# Adding a solver is one function and one row.
SOLVERS: dict[str, solvers.Solver] = {
    "heun": solvers.Solver(lambda p: solvers.heun(p.denoise, p.noise_BHWC, p.sigmas)),
    "euler": solvers.Solver(lambda p: solvers.euler(p.denoise, p.noise_BHWC, p.sigmas)),
    "stochastic": solvers.Solver(
        lambda p: solvers.stochastic(p.denoise, p.noise_BHWC, p.sigmas, p.raised, p.s_noise, p.step_noise)
    ),
    "dpmpp_2m": solvers.Solver(lambda p: solvers.dpmpp_2m(p.denoise, p.noise_BHWC, p.sigmas)),
    "ddim": solvers.Solver(lambda p: solvers.euler(p.denoise, p.noise_BHWC, p.sigmas), own_levels=True),
    "ddpm": solvers.Solver(
        lambda p: solvers.ancestral(p.output, p.diffusion, p.noise_BHWC, p.sigmas, p.step_noise), own_levels=True
    ),
}


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How samples are drawn, and the grid of samples that a run draws during training and at its last step."""

    solver: str = setting(
        "heun",
        "I",
        "heun, euler, stochastic (of EDM) or dpmpp_2m (DPM-Solver++); for a network trained with diffusion ddpm also "
        "ddim, or ddpm, which is random and uses a learnt variance",
        choices=tuple(SOLVERS),
    )
    steps: int = setting(
        40,
        "I",
        "noise levels of the solver; heun and stochastic call the network 2 * steps - 1 times, others steps times",
        least=1,
    )
    sigma_min: float = setting(0.0, "C", "lowest noise level above 0; 0: that of the diffusion", least=0)
    sigma_max: float = setting(0.0, "C", "noise level at which sampling starts; 0: that of the diffusion", least=0)
    rho: float = setting(
        7.0,
        "I",
        "exponent that spaces the noise levels (EDM, Equation 5); larger: more low ones; not for ddim and ddpm",
        above=0,
    )
    s_churn: float = setting(
        40.0, "I", "for stochastic: amount of noise added over all steps; 0: none; 40 is EDM's for ImageNet", least=0
    )
    s_min: float = setting(0.05, "I", "for stochastic: lowest noise level at which noise is added", least=0)
    s_max: float = setting(50.0, "I", "for stochastic: highest noise level at which noise is added", least=0)
    s_noise: float = setting(
        1.003, "I", "for stochastic: standard deviation of the added noise, as a multiple of the exact one", least=0
    )
    guidance: float = setting(
        1.0,
        "C",
        "strength w of guidance, worse + w * (network - worse); worse is the answer for the null label "
        "(classifier-free guidance), or that of a weaker network (sample --guide); 1: none",
        least=0,
    )
    guidance_interval: tuple[float, float] = setting(
        (0.0, 0.0),
        "C",
        "guide only above the first noise level and up to the second, at half the cost elsewhere; second 0: no end",
        least=0,
    )
    guidance_channels: int = setting(
        0, "C", "how many channels are guided, from the first on (DiT's own code: 3); 0: all", least=0
    )
    every: int = setting(5000, "C", "steps of training between grids of samples; 0: only at the last step", least=0)
    grid: int = setting(64, "C", "images in a grid", least=1)

    def check(self, prefix: str) -> None:
        """Raises ConfigError for an interval that is empty."""
        low, high = self.guidance_interval
        if 0 < high <= low:
            raise ConfigError(
                f"{prefix}guidance_interval is {self.guidance_interval}, but its high end must be above its low end, "
                "or 0 for none"
            )
        if self.solver == "stochastic" and self.s_max < self.s_min:
            raise ConfigError(f"{prefix}s_max {self.s_max} is below {prefix}s_min {self.s_min}")


def schedule(diffusion: Diffusion, sampling: SamplingConfig) -> np.ndarray:
    """The noise levels that the solver goes through, falling to 0: float32 [steps + 1]."""
    if SOLVERS[sampling.solver].own_levels:
        return solvers.respaced_levels(sampling.steps, diffusion)
    lowest, highest = sampling.sigma_min or diffusion.sigma_min, sampling.sigma_max or diffusion.sigma_max
    return solvers.noise_levels(sampling.steps, lowest, highest, sampling.rho)


def make_sample(
    network: Network,
    diffusion: Diffusion,
    codec: Codec,
    sampling: SamplingConfig,
    guide: Network | None = None,
    levels: int | None = None,
) -> Sample:
    """A pure function sample(params, seed, index_B, label_B) -> images [B, H, W, C] as the codec stores them.

    seed, index_B and label_B are integers. guide: a weaker network that guides in place of the null label; params are
    then a pair, the network's and the guide's. levels: stop after so many noise levels; the images are then the
    denoised images at the last of them, since every solver ends on the denoised image.

        sample = jax.jit(make_sample(parts.network, parts.diffusion, parts.codec, config.sampling))
        images_BHWC = sample(params, 0, jnp.arange(4), jnp.array([0, 1, 2, 3]))
    """
    m, solver = network.model, SOLVERS[sampling.solver]
    shape = (m.image_size, m.image_size, m.channels)
    sigmas = schedule(diffusion, sampling)
    # Before the levels are cut: how far a level is raised depends on the number of all steps.
    churn = sampling.s_churn, sampling.s_min, sampling.s_max
    raised = solvers.churned_levels(sigmas, *churn, diffusion.highest)[:levels]
    if levels is not None:
        sigmas = np.append(sigmas[:levels], np.float32(0))
    # A variance-preserving diffusion starts from an x_t of unit variance, which includes the image's.
    noise_scale = (1 + 1 / sigmas[0] ** 2) ** 0.5 if solver.own_levels else 1.0

    def sample(params: Any, seed: jax.Array, index_B: jax.Array, label_B: jax.Array) -> jax.Array:
        def normal(key: jax.Array) -> jax.Array:
            return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(index_B)

        def step_noise(i: jax.Array) -> jax.Array:
            # No image has this index, so no step's noise is the first noise of an image.
            return normal(jax.random.fold_in(jax.random.fold_in(key, 2**32 - 1), i))

        key = jax.random.key(seed)
        noise_BHWC = noise_scale * normal(key)
        own, weaker = params if guide else (params, None)
        worse = make_output(guide, diffusion, weaker, label_B, 1.0) if guide else None
        output = make_guided(
            network, diffusion, own, label_B,
            sampling.guidance, sampling.guidance_interval, sampling.guidance_channels, worse,
        )  # fmt: skip
        problem = solvers.Problem(
            make_denoise(output, diffusion), output, diffusion, noise_BHWC, sigmas, raised, sampling.s_noise, step_noise
        )
        return codec.as_stored(solver.solve(problem))

    return sample
