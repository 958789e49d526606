"""Open-Sora 2.0 as plain formulas in float64: the MMDiT, its schedule and its guidance, one clip at a time.

Of weights by their published names, unfused, half-split rotary positions. Nothing of the package is used here.

Letters: C latent channels, T, H, W latent frames and cells, p patch, L text tokens, D hidden size.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Weights = dict[str, Tensor]
GUIDANCE, IMAGE_GUIDANCE, STEADY_STEPS = 7.5, 3.0, 10


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def two_layers(x: Tensor, w: Weights, name: str) -> Tensor:
    return linear(silu(linear(x, w, f"{name}.in_layer")), w, f"{name}.out_layer")


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return (1 + scale) * centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() + shift


def tables(vector: Tensor, w: Weights, name: str, count: int) -> list[Tensor]:
    return list(linear(silu(vector), w, name).view(count, -1))


def rounded_time(t: float) -> float:
    """1000 t, where t and the product have 8 significant bits."""
    return float((torch.tensor(t, dtype=torch.float32).bfloat16() * 1000).double())


def sinusoid(value: float) -> Tensor:
    frequencies = 10_000.0 ** -(torch.arange(128, dtype=torch.float64) / 128)
    return torch.cat([torch.cos(value * frequencies), torch.sin(value * frequencies)])


def packed(latents: Tensor, p: int) -> Tensor:
    """(C, T, H, W) -> (T * H/p * W/p, C * p * p)."""
    rows = []
    for t in range(latents.shape[1]):
        for i in range(0, latents.shape[2], p):
            for j in range(0, latents.shape[3], p):
                rows.append(latents[:, t, i : i + p, j : j + p].reshape(-1))
    return torch.stack(rows)


def unpacked(tokens: Tensor, p: int, like: Tensor) -> Tensor:
    latents, position = torch.empty_like(like), 0
    for t in range(like.shape[1]):
        for i in range(0, like.shape[2], p):
            for j in range(0, like.shape[3], p):
                latents[:, t, i : i + p, j : j + p] = tokens[position].view(-1, p, p)
                position += 1
    return latents


def angles(num_text: int, grid: tuple[int, int, int], axes: list[int]) -> Tensor:
    """(L + N, d / 2): text tokens at 0, then every patch at its frame, row and column."""
    rows = [torch.zeros(sum(axes) // 2, dtype=torch.float64)] * num_text
    for position in ((t, i, j) for t in range(grid[0]) for i in range(grid[1]) for j in range(grid[2])):
        of_axes = [
            value * 10_000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            for value, dim in zip(position, axes, strict=True)
        ]
        rows.append(torch.cat(of_axes))
    return torch.stack(rows)


def turned(x: Tensor, angle: Tensor) -> Tensor:
    """Feature j of a head with feature j + d / 2; (heads, tokens, d)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def heads_of(x: Tensor, heads: int, scale: Tensor | None = None) -> Tensor:
    """(tokens, D) -> (heads, tokens, d), of mean square 1 times `scale`."""
    x = x.view(len(x), heads, -1).transpose(0, 1)
    return x if scale is None else x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * scale


def attention(q: Tensor, k: Tensor, v: Tensor, angle: Tensor) -> Tensor:
    scores = turned(q, angle) @ turned(k, angle).transpose(1, 2) / math.sqrt(q.shape[-1])
    return (scores.softmax(dim=-1) @ v).transpose(0, 1).flatten(1)


def mmdit(
    w: Weights, x: Tensor, t: float, states: Tensor, pooled: Tensor, condition: Tensor, *, axes: list[int], p: int
) -> Tensor:
    """The velocity, noise - data.

    Args:
        w: weights.
        x: (C, T, H, W).
        t: 0 (clean) to 1.
        states, pooled: text, (L, D_c) and (P,).
        condition: (1 + C, T, H, W), mask first.
        axes: features of a head for frame, row and column.
        p: patch.
    """
    head_dim, grid = sum(axes), (x.shape[1], x.shape[2] // p, x.shape[3] // p)
    video = linear(packed(x, p), w, "img_in") + linear(packed(condition, p), w, "cond_in")
    text, length = linear(states, w, "txt_in"), len(states)
    heads, angle = video.shape[1] // head_dim, angles(length, grid, axes)
    vector = two_layers(sinusoid(rounded_time(t)), w, "time_in") + two_layers(pooled, w, "vector_in")
    block = 0
    while f"double_blocks.{block}.img_mod.lin.weight" in w:
        streams = {}
        for name, tokens in (("txt", text), ("img", video)):
            prefix = f"double_blocks.{block}.{name}"
            shift, scale, *rest = tables(vector, w, f"{prefix}_mod.lin", 6)
            inner = modulated(tokens, shift, scale)
            q, k, v = (linear(inner, w, f"{prefix}_attn.{part}_proj") for part in "qkv")
            norms = [w[f"{prefix}_attn.norm.{part}_norm.scale"] for part in ("query", "key")]
            streams[name] = (heads_of(q, heads, norms[0]), heads_of(k, heads, norms[1]), heads_of(v, heads), rest)
        joint = [torch.cat([streams["txt"][i], streams["img"][i]], dim=1) for i in range(3)]
        attended = attention(*joint, angle)
        outputs = []
        for name, tokens, part in (("txt", text, attended[:length]), ("img", video, attended[length:])):
            prefix, (gate, shift, scale, mlp_gate) = f"double_blocks.{block}.{name}", streams[name][3]
            tokens = tokens + gate * linear(part, w, f"{prefix}_attn.proj")
            inner = gelu(linear(modulated(tokens, shift, scale), w, f"{prefix}_mlp.0"))
            outputs.append(tokens + mlp_gate * linear(inner, w, f"{prefix}_mlp.2"))
        text, video = outputs
        block += 1
    tokens, block, width = torch.cat([text, video]), 0, video.shape[1]
    while f"single_blocks.{block}.modulation.lin.weight" in w:
        prefix = f"single_blocks.{block}"
        shift, scale, gate = tables(vector, w, f"{prefix}.modulation.lin", 3)
        inner = modulated(tokens, shift, scale)
        q, k, both = (linear(inner, w, f"{prefix}.{part}") for part in ("q_proj", "k_proj", "v_mlp"))
        q = heads_of(q, heads, w[f"{prefix}.norm.query_norm.scale"])
        k = heads_of(k, heads, w[f"{prefix}.norm.key_norm.scale"])
        attended = attention(q, k, heads_of(both[:, :width], heads), angle)
        tokens = tokens + gate * linear(torch.cat([attended, gelu(both[:, width:])], dim=1), w, f"{prefix}.linear2")
        block += 1
    shift, scale = tables(vector, w, "final_layer.adaLN_modulation.1", 2)
    return unpacked(linear(modulated(tokens[length:], shift, scale), w, "final_layer.linear"), p, x)


# --- sampling ---------------------------------------------------------------------------------------------------------


def schedule(num_steps: int, tokens_per_frame: int, num_latents: int) -> list[float]:
    """1 to 0, shifted by a line through (256, 1) and (4096, 3), and by the root of the latent frames."""
    a = (1 + (tokens_per_frame - 256) * 2 / (4096 - 256)) * math.sqrt(num_latents)
    even = [1 - i / num_steps for i in range(num_steps + 1)]
    return [a * t / (1 + (a - 1) * t) for t in even]


Network = Callable[[Tensor, float, str], Tensor]


def sample(network: Network, noise: Tensor, num_steps: int, tokens_per_frame: int, *, from_image: bool) -> Tensor:
    """Euler steps with three branches; both scales are 1 on every other step from the eleventh on.

    Args:
        network: (x, t, branch) -> velocity; "text", "null" (no text) and "nothing" (neither text nor frames).
        noise: (C, T, H, W).
        num_steps: of them.
        tokens_per_frame: of a latent frame.
        from_image: the image's scale falls from step to step and grows along the frames.
    """
    x, num_latents = noise, noise.shape[1]
    times = schedule(num_steps, tokens_per_frame, num_latents)
    for i in range(num_steps):
        swings = i >= STEADY_STEPS and i % 2 == 1
        text_scale = 1.0 if swings else GUIDANCE
        image_scale = torch.tensor(1.0 if swings else IMAGE_GUIDANCE, dtype=torch.float64)
        if from_image and image_scale > 1:
            upper = IMAGE_GUIDANCE + (1 - IMAGE_GUIDANCE) * i / num_steps
            image_scale = torch.linspace(1, upper, num_latents, dtype=torch.float64)[:, None, None]
        text, null, nothing = (network(x, times[i], branch) for branch in ("text", "null", "nothing"))
        velocity = nothing + image_scale * (null - nothing) + text_scale * (text - null)
        x = x + (times[i + 1] - times[i]) * velocity
    return x
