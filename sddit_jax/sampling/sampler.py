"""Images from weights: image i is a function of (seed, i, label) and the weights alone."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sddit_jax.config import schema
from sddit_jax.method.codec import Codec
from sddit_jax.method.diffusion import Diffusion
from sddit_jax.models.transformer import Network
from sddit_jax.sampling import solvers
from sddit_jax.sampling.guidance import make_denoise, make_guided, make_output

Sample = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]


def schedule(diffusion: Diffusion, sampling: schema.Sampling) -> np.ndarray:
    """The noise levels of the steps and then 0: float32 [steps + 1]."""
    if sampling.solver in ("ddim", "ddpm"):
        return solvers.respaced_levels(sampling.steps, diffusion)
    lowest, highest = sampling.sigma_min or diffusion.sigma_min, sampling.sigma_max or diffusion.sigma_max
    return solvers.noise_levels(sampling.steps, lowest, highest, sampling.rho)


def make_sample(
    network: Network,
    diffusion: Diffusion,
    codec: Codec,
    sampling: schema.Sampling,
    guide: Network | None = None,
    levels: int | None = None,
) -> Sample:
    """A pure sample(params, seed, index_B, label_B) -> decoded [B, H, W, C]; seed, indices and labels are integers.

    With a `guide`, which takes the place of the null label, params are a pair: the network's and the guide's. Every
    solver ends on the denoised image at the last noise level. So with `levels`, the first of the noise levels that are
    gone through, this is what the solver sees at the last of them.
    """
    m, solver = network.model, sampling.solver
    shape = (m.image_size, m.image_size, m.channels)
    sigmas = schedule(diffusion, sampling)
    # How far a level is raised depends on the number of all steps.
    churn = sampling.s_churn, sampling.s_min, sampling.s_max
    raised = solvers.churned_levels(sigmas, *churn, diffusion.highest)[:levels]
    if levels is not None:
        sigmas = np.append(sigmas[:levels], np.float32(0))
    # A variance-preserving diffusion starts from unit variance in all, the image included.
    noise_scale = (1 + 1 / sigmas[0] ** 2) ** 0.5 if solver in ("ddim", "ddpm") else 1.0

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
        output = make_guided(network, diffusion, own, label_B, sampling, worse)
        denoise = make_denoise(output, diffusion)
        if solver == "ddpm":
            z_BHWC = solvers.ancestral(output, diffusion, noise_BHWC, sigmas, step_noise)
        elif solver == "stochastic":
            z_BHWC = solvers.stochastic(denoise, noise_BHWC, sigmas, raised, sampling.s_noise, step_noise)
        else:
            solve = {"heun": solvers.heun, "dpmpp_2m": solvers.dpmpp_2m}.get(solver, solvers.euler)
            z_BHWC = solve(denoise, noise_BHWC, sigmas)
        return codec.decode(z_BHWC)

    return sample
