"""SD-DiT in JAX: diffusion transformers whose encoder also learns by self-supervised discrimination."""
