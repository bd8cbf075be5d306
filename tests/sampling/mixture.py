"""A Gaussian mixture in three dimensions, whose denoiser is known and whose PF-ODE is solved to 1e-12."""

import numpy as np
from scipy.integrate import solve_ivp
from scipy.special import ndtr

WEIGHTS = (0.5, 0.3, 0.2)
STDS = (0.3, 0.5, 0.2)
MEANS = np.array([[0.6, -0.4, 0.2], [-0.5, 0.3, 0.4], [0.1, 0.7, -0.6]])


def denoised(xp, x_BHWC, sigma):
    """E[x0 | x] of x = x0 + sigma eps, each [B, 1, 1, 3]; xp: numpy or jax.numpy."""
    logits, means = [], []
    for weight, std, mean in zip(WEIGHTS, STDS, MEANS.reshape(3, 1, 1, 1, 3), strict=True):
        variance = std**2 + sigma**2
        away = x_BHWC - mean
        logits.append(np.log(weight) - 1.5 * xp.log(variance) - (away**2).sum(-1, keepdims=True) / (2 * variance))
        means.append(mean + std**2 / variance * away)
    logits = xp.stack(logits)
    shares = xp.exp(logits - logits.max(0, keepdims=True))
    return (shares * xp.stack(means)).sum(0) / shares.sum(0)


def flow(noise_BHWC, highest, lowest):
    """The solution at `lowest` of the PF-ODE that starts at highest * noise, in float64."""

    def slope(log_sigma, x):
        x = x.reshape(noise_BHWC.shape)
        return (x - denoised(np, x, np.exp(log_sigma))).ravel()

    ends = np.log(highest), np.log(lowest)
    solution = solve_ivp(slope, ends, (highest * noise_BHWC).ravel(), method="DOP853", rtol=1e-12, atol=1e-13)
    return solution.y[:, -1].reshape(noise_BHWC.shape)


def cdf(direction, projected):
    """The distribution function of a sample's projection on a unit vector."""
    return sum(w * ndtr((projected - m @ direction) / s) for w, s, m in zip(WEIGHTS, STDS, MEANS, strict=True))


def covariance():
    """Mean [3] and covariance [3, 3] of the mixture."""
    mean = np.asarray(WEIGHTS) @ MEANS
    second = sum(w * (s**2 * np.eye(3) + np.outer(m, m)) for w, s, m in zip(WEIGHTS, STDS, MEANS, strict=True))
    return mean, second - np.outer(mean, mean)
