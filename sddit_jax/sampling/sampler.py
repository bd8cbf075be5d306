"""Images from weights: image i is a function of (seed, i, label) and the weights alone."""

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
    """How samples are drawn, and the grid of samples drawn during training."""

    solver: str = setting(
        "heun",
        "I",
        "heun, euler, stochastic (EDM) or dpmpp_2m (DPM-Solver++); for a ddpm model also ddim, or ddpm (random, with "
        "the learnt variance)",
        choices=tuple(SOLVERS),
    )
    steps: int = setting(
        40, "I", "noise levels (network passes of heun and stochastic: 2 * steps - 1, of others: steps)", least=1
    )
    sigma_min: float = setting(0.0, "C", "lowest noise level but 0; 0: the diffusion's", least=0)
    sigma_max: float = setting(0.0, "C", "noise level at the start; 0: the diffusion's", least=0)
    rho: float = setting(7.0, "I", "exponent of the noise schedule", above=0)
    s_churn: float = setting(40.0, "I", "of stochastic: noise added, over all steps (EDM's for ImageNet)", least=0)
    s_min: float = setting(0.05, "I", "of stochastic: lowest noise level to add noise at", least=0)
    s_max: float = setting(50.0, "I", "of stochastic: highest noise level to add noise at", least=0)
    s_noise: float = setting(1.003, "I", "of stochastic: standard deviation of that noise over the exact one", least=0)
    guidance: float = setting(1.0, "C", "guidance, classifier-free or by a weaker network; 1: none", least=0)
    guidance_interval: tuple[float, float] = setting(
        (0.0, 0.0),
        "C",
        "guide only where low < noise level <= high, at half the cost elsewhere; high 0: no end",
        least=0,
    )
    guidance_channels: int = setting(0, "C", "guide only the first channels (DiT's own code: 3); 0: all", least=0)
    every: int = setting(5000, "C", "steps between sample grids; 0: none", least=0)
    grid: int = setting(64, "C", "images in a grid", least=1)

    def check(self) -> None:
        """Raises ConfigError for intervals that are empty."""
        guided_from, guided_to = self.guidance_interval
        if 0 < guided_to <= guided_from:
            raise ConfigError(
                f"sampling.guidance_interval is {self.guidance_interval}, but its high end must be above its low one, "
                "or 0 for none"
            )
        if self.solver == "stochastic" and self.s_max < self.s_min:
            raise ConfigError(f"sampling.s_max {self.s_max} is below sampling.s_min {self.s_min}")


def schedule(diffusion: Diffusion, sampling: SamplingConfig) -> np.ndarray:
    """The noise levels of the steps and then 0: float32 [steps + 1]."""
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
    """A pure sample(params, seed, index_B, label_B) -> images [B, H, W, C] as the codec stores them.

    seed, indices and labels are integers.

    With a `guide`, which takes the place of the null label, params are a pair: the network's and the guide's. Every
    solver ends on the denoised image at the last noise level. So with `levels`, the first of the noise levels that are
    gone through, this is what the solver sees at the last of them.
    """
    m, solver = network.model, SOLVERS[sampling.solver]
    shape = (m.image_size, m.image_size, m.channels)
    sigmas = schedule(diffusion, sampling)
    # How far a level is raised depends on the number of all steps.
    churn = sampling.s_churn, sampling.s_min, sampling.s_max
    raised = solvers.churned_levels(sigmas, *churn, diffusion.highest)[:levels]
    if levels is not None:
        sigmas = np.append(sigmas[:levels], np.float32(0))
    # A variance-preserving diffusion starts from unit variance in all, the image included.
    noise_scale = (1 + 1 / sigmas[0] ** 2) ** 0.5 if solver.own_levels else 1.0

    def sample(params: Any, seed: jax.Array, index_B: jax.Array, label_B: jax.Array) -> jax.Array:
        def normal(key: jax.Array) -> jax.Array:
            return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(index_B)

        def step_noise(i: jax.Array) -> jax.Array:
            # No image has this index, so no image's first noise is a step's.
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
