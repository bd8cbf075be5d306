"""The network of sddit_jax in PyTorch: one file that needs torch and safetensors, and does not import JAX.

    from sddit_jax.interop.pytorch import load, sample
    network = load("model.safetensors")                    # an nn.Module; written by `convert to-torch`
    images = sample(network, labels=[3, 1, 4], guidance=1.5)

`network(x, sigma, label)` is the denoised image D(x; sigma). `training_losses` computes the objectives of all methods.
Images are [B, C, H, W]. Parameters have the names of interop/state_dict.py. A class or function has the name of its
counterpart in models, method or sampling.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from os import PathLike
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over the last axis without affine parameters; statistics in float32, output in x's dtype."""
    return F.layer_norm(x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[-1:], eps=1e-6).to(x.dtype)


def modulate(x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """x * (1 + scale) + shift, with one shift and one scale for all tokens of an image."""
    return x_BND * (1 + scale_BD[:, None]) + shift_BD[:, None]


def positions_2d(width: int, side: int) -> Tensor:
    """Fixed sine-cosine positions in raster order, float32 [side^2, width]: the column's in the first half of a row."""
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [coordinate.flatten()[:, None] * frequencies for coordinate in (column, row)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()


def select(tokens_BND: Tensor, positions_BV: Tensor) -> Tensor:
    """The tokens at the given positions of each image."""
    return tokens_BND.gather(1, _index(positions_BV, tokens_BND))


class PatchEmbedding(nn.Conv2d):
    """A linear map of each patch, with a convolution's weight [D, C, p, p].

    It computes a matmul: by default PyTorch computes convolutions on GPUs in TF32, and matmuls in float32.
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, N, D], in raster order."""
        patches_BNP = F.unfold(x_BCHW.to(self.weight.dtype), self.kernel_size, stride=self.stride).transpose(1, 2)
        return F.linear(patches_BNP, self.weight.flatten(1), self.bias)


class TimeEmbedding(nn.Module):
    """c_noise [B] -> [B, width]: [cos | sin] at 128 frequencies from 1 to 1/10000, and a two-layer MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(256, width), nn.Linear(width, width)
        exponents = -math.log(10000) * torch.arange(128, dtype=torch.float32) / 128
        self.register_buffer("frequencies", exponents.double().exp().float(), persistent=False)

    def forward(self, c_noise_B: Tensor) -> Tensor:
        """[B] -> [B, width], in the dtype of the weights. They stay float32 in a network that is cast to bfloat16."""
        angles = c_noise_B.to(self.frequencies.dtype)[:, None] * self.frequencies
        embedded = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.out(F.silu(self.hidden(embedded)))


class LabelEmbedding(nn.Module):
    """Class labels [B] -> [B, width]. The null label `num_classes` gives zeros, or the last row of the table."""

    def __init__(self, num_classes: int, width: int, null: str) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.table = nn.Parameter(torch.empty(num_classes + (null == "row"), width))

    def forward(self, label_B: Tensor) -> Tensor:
        """[B, width]."""
        embedded_BD = self.table[label_B.clamp(max=len(self.table) - 1)]
        return torch.where((label_B < len(self.table))[:, None], embedded_BD, 0)


class Modulation(nn.Module):
    """The parameters of adaLN: `count` tensors [B, width] from the condition [B, C]."""

    def __init__(self, condition: int, count: int, width: int) -> None:
        super().__init__()
        self.count, self.linear = count, nn.Linear(condition, count * width)

    def forward(self, condition_BC: Tensor) -> tuple[Tensor, ...]:
        """SiLU, then a linear map."""
        return self.linear(F.silu(condition_BC).to(self.linear.weight.dtype)).chunk(self.count, dim=1)


class Attention(nn.Module):
    """Multi-head self-attention. The rows of qkv are q of all heads, then k, then v."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        batch, tokens, width = x_BND.shape
        q, k, v = self.qkv(x_BND).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended_BHNC = F.scaled_dot_product_attention(q, k, v)
        return self.out(attended_BHNC.transpose(1, 2).reshape(batch, tokens, width))


class MLP(nn.Module):
    """Linear, tanh-approximated GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.out(F.gelu(self.hidden(x_BND), approximate="tanh"))


class Block(nn.Module):
    """A transformer block with adaLN-Zero (Peebles & Xie 2023)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, condition: int) -> None:
        super().__init__()
        self.modulation = Modulation(condition, 6, width)
        self.attention = Attention(width, heads)
        self.mlp = MLP(width, int(width * mlp_ratio))

    def forward(self, x_BND: Tensor, condition_BC: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition_BC)
        x_BND = x_BND + gate_a[:, None] * self.attention(modulate(layer_norm(x_BND), shift_a, scale_a))
        return x_BND + gate_m[:, None] * self.mlp(modulate(layer_norm(x_BND), shift_m, scale_m))


class Stack(nn.Module):
    """Blocks one after another."""

    def __init__(self, depth: int, width: int, heads: int, mlp_ratio: float, condition: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, condition) for _ in range(depth))

    def forward(self, x_BND: Tensor, condition_BC: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        for block in self.blocks:
            x_BND = block(x_BND, condition_BC)
        return x_BND


class FinalLayer(nn.Module):
    """Norm, modulation and a linear map: tokens [B, N, D] -> [B, N, out]."""

    def __init__(self, width: int, out: int, condition: int) -> None:
        super().__init__()
        self.modulation, self.linear = Modulation(condition, 2, width), nn.Linear(width, out)

    def forward(self, tokens_BND: Tensor, condition_BC: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, out]. The decoder's bridge from the encoder's width is such a layer too."""
        return self.linear(modulate(layer_norm(tokens_BND), *self.modulation(condition_BC)))


@dataclasses.dataclass
class Encoded:
    """Output of the encoder: [CLS] or None, the encoded visible tokens, all embedded tokens, and the condition."""

    cls_BD: Tensor | None
    tokens_BVD: Tensor
    embedded_BND: Tensor
    condition_BD: Tensor


class Encoder(nn.Module):
    """Patch, position, time and label embeddings, an optional [CLS] token, and blocks."""

    def __init__(self, m: SimpleNamespace) -> None:
        super().__init__()
        self.patch = PatchEmbedding(m.channels, m.width, m.patch, stride=m.patch)
        self.time = TimeEmbedding(m.width)
        self.label = LabelEmbedding(m.num_classes, m.width, m.null_label) if m.num_classes else None
        self.cls = nn.Parameter(torch.empty(m.width)) if m.cls_token else None
        self.stack = Stack(m.depth, m.width, m.heads, m.mlp_ratio, m.width)
        self.register_buffer("positions", positions_2d(m.width, m.image_size // m.patch), persistent=False)

    def forward(self, x_BCHW: Tensor, c_noise_B: Tensor, label_B: Tensor, visible_BV: Tensor | None = None) -> Encoded:
        """Encodes the tokens of c_in * x at the positions `visible_BV`; None: all tokens."""
        condition_BD = self.time(c_noise_B)
        if self.label is not None:
            condition_BD = condition_BD + self.label(label_B)
        dtype = self.patch.weight.dtype
        embedded_BND = self.patch(x_BCHW) + self.positions.to(dtype)
        tokens = embedded_BND if visible_BV is None else select(embedded_BND, visible_BV)
        if self.cls is None:
            return Encoded(None, self.stack(tokens, condition_BD), embedded_BND, condition_BD)
        cls_B1D = self.cls.to(dtype).expand(len(tokens), 1, -1)
        tokens = self.stack(torch.cat([cls_B1D, tokens], dim=1), condition_BD)
        return Encoded(tokens[:, 0], tokens[:, 1:], embedded_BND, condition_BD)


class Decoder(nn.Module):
    """From encoded tokens to the network's output, an image.

    fill: the tokens at invisible positions. "noisy": the embedded noisy tokens, before the bridge; "mask_token": a
    learnt token, and "zeros": zeros, both after the bridge. A decoder of depth 0 is the final layer alone, as in DiT.
    """

    def __init__(self, m: SimpleNamespace, fill: str) -> None:
        super().__init__()
        self.fill, self.patch, self.channels = fill, m.patch, m.channels * (1 + m.learn_sigma)
        self.bridge = self.stack = self.mask_token = None
        width = m.decoder_width if m.decoder_depth else m.width
        if m.decoder_depth:
            self.bridge = FinalLayer(m.width, width, m.width)
            self.stack = Stack(m.decoder_depth, width, m.decoder_heads, m.mlp_ratio, m.width)
            self.mask_token = nn.Parameter(torch.empty(width)) if fill == "mask_token" else None
            self.register_buffer("positions", positions_2d(width, m.image_size // m.patch), persistent=False)
        self.final = FinalLayer(width, m.patch**2 * self.channels, m.width)

    def forward(self, encoded: Encoded, visible_BV: Tensor | None = None) -> Tensor:
        """F [B, C, H, W]; with a learnt variance [B, 2C, H, W], of which the first C channels are F."""
        tokens, condition = encoded.tokens_BVD, encoded.condition_BD
        if self.stack is not None:
            if self.fill == "noisy" and visible_BV is not None:
                tokens = encoded.embedded_BND.scatter(1, _index(visible_BV, tokens), tokens)
            tokens = self.bridge(tokens, condition)
            if self.fill != "noisy" and visible_BV is not None:
                shape = (len(tokens), encoded.embedded_BND.shape[1], tokens.shape[2])
                fill = tokens.new_zeros(shape) if self.mask_token is None else self.mask_token.expand(shape)
                tokens = fill.scatter(1, _index(visible_BV, tokens), tokens)
            tokens = self.stack(tokens + self.positions.to(tokens.dtype), condition)
        patches_BNP = self.final(tokens, condition)
        side = round(patches_BNP.shape[1] ** 0.5)
        grid = patches_BNP.view(-1, side, side, self.patch, self.patch, self.channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.channels, side * self.patch, side * self.patch)


class Head(nn.Module):
    """The projection head: LayerNorm, a three-layer GELU MLP, and K prototypes of unit norm."""

    def __init__(self, m: SimpleNamespace, d: SimpleNamespace) -> None:
        super().__init__()
        self.mlp_0, self.mlp_1 = nn.Linear(m.width, d.head_width), nn.Linear(d.head_width, d.head_width)
        self.mlp_2 = nn.Linear(d.head_width, d.bottleneck)
        self.prototypes = nn.Parameter(torch.empty(d.prototypes, d.bottleneck))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [..., D] -> logits [..., K]: the products of their unit vectors and the prototypes."""
        hidden = F.gelu(self.mlp_1(F.gelu(self.mlp_0(layer_norm(tokens)))))
        vectors = self.mlp_2(hidden).to(self.prototypes.dtype)
        return F.normalize(vectors, dim=-1) @ F.normalize(self.prototypes, dim=-1).T


def ddpm_sigmas() -> Tensor:
    """sigma(t) of DDPM's 1,000 steps, betas linear from 1e-4 to 0.02 (Ho et al. 2020): float32."""
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    return ((1 - alpha_bar) / alpha_bar).sqrt().float()


def sigma_range(diffusion: SimpleNamespace) -> tuple[float, float]:
    """The lowest and the highest noise level of a diffusion."""
    if diffusion.name == "ddpm":
        return tuple(ddpm_sigmas()[[0, -1]].tolist())
    edm = _edm(diffusion)
    return edm.sigma_min, edm.sigma_max


def preconditioning(diffusion: SimpleNamespace, sigma_B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(c_skip, c_out, c_in, c_noise), each [B]: EDM's (Karras et al. 2022, Table 1), or DDPM's.

    DDPM's c_noise is the step at which the noise level is sigma, interpolated linearly between two steps.
    """
    if diffusion.name == "ddpm":
        table = ddpm_sigmas().to(sigma_B)
        above = torch.searchsorted(table, sigma_B.contiguous()).clamp(1, 999)
        low, high = table[above - 1], table[above]
        step_B = (above - 1 + (sigma_B - low) / (high - low)).clamp(0, 999)
        return torch.ones_like(sigma_B), -sigma_B, (1 + sigma_B**2).rsqrt(), step_B
    data = _edm(diffusion).sigma_data
    total_B = sigma_B**2 + data**2
    return data**2 / total_B, sigma_B * data / total_B.sqrt(), total_B.rsqrt(), sigma_B.log() / 4


class SDDiT(nn.Module):
    """Encoder, decoder, and with `head` the projection head of the discrimination, which only training needs.

    config: the resolved configuration of sddit_jax, as nested namespaces.
    """

    def __init__(self, config: SimpleNamespace, head: bool = False) -> None:
        super().__init__()
        self.config, m = config, config.model
        self.encoder = Encoder(m)
        self.decoder = Decoder(m, config.masking.fill)
        self.head = Head(m, config.objectives.discrimination) if head else None

    def output(self, x_BCHW: Tensor, c_noise_B: Tensor, label_B: Tensor, visible_BV: Tensor | None = None) -> Tensor:
        """F(c_in * x, c_noise), in the dtype of the weights. visible_BV: None: all tokens are visible."""
        return self.decoder(self.encoder(x_BCHW, c_noise_B, label_B, visible_BV), visible_BV)

    def forward(self, x_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor, visible_BV: Tensor | None = None) -> Tensor:
        """D(x; sigma), the denoised image in x's dtype, for x = x0 + sigma * eps. x and sigma should be float32."""
        return self.guided(x_BCHW, sigma_B, label_B, 1.0, visible_BV=visible_BV)

    def guided(
        self,
        x_BCHW: Tensor,
        sigma_B: Tensor,
        label_B: Tensor,
        guidance: float,
        channels: int = 0,
        visible_BV: Tensor | None = None,
    ) -> Tensor:
        """D with F = F_null + guidance (F_label - F_null) in the first `channels` channels; 0: in all channels."""
        skip, out, in_, c_noise = preconditioning(self.config.diffusion, sigma_B)
        x_in = in_[:, None, None, None] * x_BCHW
        f = self.output(x_in, c_noise, label_B, visible_BV)[:, : x_BCHW.shape[1]].to(x_BCHW.dtype)
        if guidance != 1 and self.encoder.label is not None:
            null_B = torch.full_like(label_B, self.encoder.label.num_classes)
            null = self.output(x_in, c_noise, null_B, visible_BV)[:, : x_BCHW.shape[1]].to(x_BCHW.dtype)
            guided = channels or x_BCHW.shape[1]
            f = torch.cat([(null + guidance * (f - null))[:, :guided], f[:, guided:]], dim=1)
        return skip[:, None, None, None] * x_BCHW + out[:, None, None, None] * f


def load(path: str | PathLike[str], dtype: torch.dtype = torch.float32, device: str = "cpu") -> SDDiT:
    """The network of a file that `convert to-torch` wrote, in eval mode.

    dtype: of the matmuls, float32 or bfloat16. The embeddings of noise level and label stay float32.
    Raises ValueError for a file without a configuration, and RuntimeError for tensors of another network.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        # Files of earlier versions have the projection head too.
        tensors = {name: file.get_tensor(name) for name in file.keys() if not name.startswith("head.")}  # noqa: SIM118
    if "config" not in metadata:
        raise ValueError(f"{path} has no configuration in its metadata; write it with `python -m sddit_jax.convert`")
    network = SDDiT(json.loads(metadata["config"], object_hook=lambda section: SimpleNamespace(**section)))
    network.load_state_dict(tensors)
    return cast(network, dtype).to(device).eval()


def cast(network: SDDiT, dtype: torch.dtype) -> SDDiT:
    """The network with its matmuls in `dtype`. The embeddings of noise level and label, and the prototypes, stay."""
    for module in (network.encoder.patch, network.encoder.stack, network.decoder):
        module.to(dtype)
    if network.head is not None:
        for module in (network.head.mlp_0, network.head.mlp_1, network.head.mlp_2):
            module.to(dtype)
    return network


def noise_levels(steps: int, sigma_min: float, sigma_max: float, rho: float) -> list[float]:
    """EDM's noise levels (Karras et al. 2022, Eq. 5), from sigma_max to sigma_min, then 0."""
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(first + i / max(steps - 1, 1) * (last - first)) ** rho for i in range(steps)] + [0.0]


def heun(denoise: Callable[[Tensor, float], Tensor], noise_BCHW: Tensor, sigmas: Sequence[float]) -> Tensor:
    """EDM's deterministic second-order sampler (Karras et al. 2022, Algorithm 1) from standard normal noise."""
    x = noise_BCHW * sigmas[0]
    for sigma, following in itertools.pairwise(sigmas):
        slope = (x - denoise(x, sigma)) / sigma
        euler = x + (following - sigma) * slope
        if following > 0:
            slope = (slope + (euler - denoise(euler, following)) / following) / 2
        x = x + (following - sigma) * slope
    return x


@torch.no_grad()
def sample(
    network: SDDiT,
    labels: Sequence[int],
    *,
    steps: int | None = None,
    guidance: float | None = None,
    guidance_channels: int | None = None,
    seed: int = 0,
    noise_BCHW: Tensor | None = None,
) -> Tensor:
    """Draws an image for each label by EDM's Heun sampler. Settings that are None, and all others, are the run's.

    labels: 0 to num_classes, which is the null label. noise_BCHW: standard normal; None: drawn with `seed`.

    Returns uint8 [B, H, W, C] of a network of pixels, and of a network of latents float32 [B, C, H, W], as the
    autoencoder's decoder takes them. Raises ValueError for labels or steps out of range, and for steps=None if the run
    samples with another solver.
    """
    c, m = network.config, network.config.model
    # A file may be older than these keys.
    defaults = {"guidance_interval": (0.0, 0.0), "sigma_min": 0.0, "sigma_max": 0.0}
    given = {"steps": steps, "guidance": guidance, "guidance_channels": guidance_channels}
    given = {key: value for key, value in given.items() if value is not None}
    settings = SimpleNamespace(**(defaults | vars(c.sampling) | given))
    if steps is None and settings.solver != "heun":
        raise ValueError(f"the run samples with {settings.solver}, and this function with heun: give steps, such as 40")
    device = network.encoder.time.out.weight.device
    label_B = torch.as_tensor(labels).long()
    if label_B.ndim != 1 or not ((label_B >= 0) & (label_B <= m.num_classes)).all() or settings.steps < 1:
        raise ValueError(
            f"labels {labels}, steps {settings.steps}: labels are 0 to {m.num_classes}, and steps at least 1"
        )
    if noise_BCHW is None:
        shape = (len(label_B), m.channels, m.image_size, m.image_size)
        noise_BCHW = torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    label_B = label_B.to(device)

    def denoise(x_BCHW: Tensor, sigma: float) -> Tensor:
        sigma_B = torch.full((len(x_BCHW),), sigma, device=device, dtype=x_BCHW.dtype)
        # In float32, as the JAX sampler compares them.
        low, high, level = torch.tensor([*settings.guidance_interval, sigma]).tolist()
        here = settings.guidance if low < level <= (high or math.inf) else 1.0
        return network.guided(x_BCHW, sigma_B, label_B, here, settings.guidance_channels)

    lowest, highest = sigma_range(c.diffusion)
    lowest, highest = settings.sigma_min or lowest, settings.sigma_max or highest
    z = heun(denoise, noise_BCHW.to(device), noise_levels(settings.steps, lowest, highest, settings.rho))
    mean, scale = (z.new_tensor(v)[None, :, None, None] for v in (c.codec.mean, c.codec.scale))
    x = z / scale + mean
    if c.codec.name != "pixels":
        return x
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


@dataclasses.dataclass
class Teacher:
    """The teacher of the discrimination: its encoder, its head, and for "patch" and "cls" centers and temperature.

    center: [M, K]; M is 1, or the number of positions ("patch") and of labels with the null label ("cls").
    temperature: of the softmax; with `standardise` the scheduled temperature times sqrt(variance + 1e-8).
    """

    encoder: Encoder
    head: Head
    center: dict[str, Tensor]
    temperature: dict[str, float]


def reconstruction_loss(denoised_BCHW: Tensor, noised_BCHW: Tensor, patch: int, visible_BV: Tensor) -> Tensor:
    """MaskDiT's auxiliary loss: D at invisible patches against the noisy input, normalised per patch."""
    prediction, target = (F.unfold(x, patch, stride=patch).transpose(1, 2) for x in (denoised_BCHW, noised_BCHW))
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True, unbiased=True) + 1e-6).sqrt()
    hidden_BN = torch.ones(target.shape[:2], dtype=torch.bool, device=target.device).scatter(1, visible_BV, False)
    return ((prediction - target) ** 2).mean(-1)[hidden_BN].mean()


def prototype_cross_entropy(
    student_BVK: Tensor, teacher_BVK: Tensor, center: Tensor, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """Mean of -sum_k P_T log P_S with P_T = softmax((teacher - center) / t), P_S = softmax(student / t) (iBOT)."""
    p_BVK = ((teacher_BVK - center) / teacher_temperature).softmax(-1).detach()
    return -(p_BVK * (student_BVK / student_temperature).log_softmax(-1)).sum(-1).mean()


def discrimination_losses(
    network: SDDiT, teacher: Teacher, encoded: Encoded, x0: Tensor, eps: Tensor, label_B: Tensor, visible: Tensor | None
) -> dict[str, Tensor]:
    """SD-DiT's objective: the student's visible tokens and [CLS] predict the teacher's assignments.

    Returns {"discrimination/patch": loss, "discrimination/cls": loss}, the latter if the network has [CLS].
    """
    c = network.config
    lowest, _ = sigma_range(c.diffusion)
    sigma_B = x0.new_full((len(x0),), lowest)
    _, _, in_, c_noise = preconditioning(c.diffusion, sigma_B)
    with torch.no_grad():
        whole = teacher.encoder(in_[:, None, None, None] * (x0 + lowest * eps), c_noise, label_B)
    tokens = whole.tokens_BVD if visible is None else select(whole.tokens_BVD, visible)
    pairs = {"patch": (encoded.tokens_BVD, tokens)}
    if encoded.cls_BD is not None:
        pairs["cls"] = (encoded.cls_BD[:, None], whole.cls_BD[:, None])
    losses = {}
    for kind, (student_BVD, teacher_BVD) in pairs.items():
        center_MK = teacher.center[kind]
        if len(center_MK) > 1 and kind == "cls":
            center = center_MK[label_B][:, None]
        elif len(center_MK) > 1 and visible is not None:
            center = center_MK[visible]
        else:
            center = center_MK
        with torch.no_grad():
            teacher_BVK = teacher.head(teacher_BVD)
        losses[f"discrimination/{kind}"] = prototype_cross_entropy(
            network.head(student_BVD), teacher_BVK, center, c.objectives.discrimination.student_temperature,
            teacher.temperature[kind],
        )  # fmt: skip
    return losses


def training_losses(
    network: SDDiT,
    x0_BCHW: Tensor,
    eps_BCHW: Tensor,
    sigma_B: Tensor,
    label_B: Tensor,
    visible_BV: Tensor | None = None,
    teacher: Teacher | None = None,
) -> dict[str, Tensor]:
    """The unweighted losses of the configured method by name, and their weighted sum "total".

    label_B: after label dropout. visible_BV: int64 positions in any order; None without a mask.
    Raises ValueError if the discrimination has no teacher, or the reconstruction no mask.
    """
    c, o = network.config, network.config.objectives
    if (o.discrimination.weight and teacher is None) or (o.reconstruction.weight and visible_BV is None):
        raise ValueError("discrimination needs a teacher, and reconstruction a mask (visible_BV)")
    noised = x0_BCHW + sigma_B[:, None, None, None] * eps_BCHW
    skip, out, in_, c_noise = preconditioning(c.diffusion, sigma_B)
    encoded = network.encoder(in_[:, None, None, None] * noised, c_noise, label_B, visible_BV)
    f = network.decoder(encoded, visible_BV)[:, : x0_BCHW.shape[1]].to(noised.dtype)
    denoised = skip[:, None, None, None] * noised + out[:, None, None, None] * f
    losses, total = {}, 0
    if o.denoising.weight:
        # EDM's weighted squared error (Karras et al. 2022, Eq. 2), and MaskDiT's mean over the visible patches.
        error = (1 / out**2)[:, None, None, None] * (denoised - x0_BCHW) ** 2
        if o.denoising.scope == "visible" and visible_BV is not None:
            error = F.avg_pool2d(error.mean(1), c.model.patch).flatten(1).gather(1, visible_BV)
        losses["denoising"] = error.mean()
        total = total + o.denoising.weight * losses["denoising"]
    if o.discrimination.weight:
        kinds = discrimination_losses(network, teacher, encoded, x0_BCHW, eps_BCHW, label_B, visible_BV)
        losses |= kinds
        total = total + o.discrimination.weight * sum(kinds.values())
    if o.reconstruction.weight:
        losses["reconstruction"] = reconstruction_loss(denoised, noised, c.model.patch, visible_BV)
        total = total + o.reconstruction.weight * losses["reconstruction"]
    return losses | {"total": total}


def _edm(diffusion: SimpleNamespace) -> SimpleNamespace:
    """The keys of EDM. Files of earlier versions have them in `diffusion` itself."""
    return getattr(diffusion, "edm", diffusion)


def _index(positions_BV: Tensor, like_BND: Tensor) -> Tensor:
    return positions_BV[:, :, None].expand(-1, -1, like_BND.shape[2])
