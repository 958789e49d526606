"""Open-Sora 1.3 as plain formulas in float64: its transformer, its schedule and its guidance, one clip at a time.

As in `plain_transformers`, whose layers it shares, every line can be held against papers and the prose of the fixtures.
Windows are padded with zeros before queries, keys and values are made, and padded keys hidden, as in the reference.
Nothing of the package is used here.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from parity.plain_transformers import (
    Weights,
    add_mlp,
    embed_number,
    last_layer,
    linear,
    mlp,
    modulate,
    number_of,
    patches,
    rms_norm,
    scaled_positions,
    silu,
    text_attention,
    unpatched,
)
from torch import Tensor

GUIDANCE, IMAGE_GUIDANCE, STEADY_STEPS = 7.5, 5.0, 10
Position = tuple[float, float, float]


def rotate(x: Tensor, positions: Sequence[Position]) -> Tensor:
    """A third of the features of x (N, d) turns by frame, row and column each, in neighbouring pairs."""
    third = x.shape[1] // 3
    turned = x.clone()
    for axis in range(3):
        for i in range(third // 2):
            angle = torch.tensor([p[axis] / 10_000 ** (2 * i / third) for p in positions], dtype=x.dtype)
            even, odd = x[:, axis * third + 2 * i], x[:, axis * third + 2 * i + 1]
            turned[:, axis * third + 2 * i] = even * angle.cos() - odd * angle.sin()
            turned[:, axis * third + 2 * i + 1] = odd * angle.cos() + even * angle.sin()
    return turned


def attention(
    x: Tensor, w: Weights, name: str, heads: int, positions: Sequence[Position], hidden: Sequence[bool]
) -> Tensor:
    """Among tokens x (N, D); no query sees the keys that are hidden."""
    features = x.shape[1]
    dim, qkv, attended = features // heads, linear(x, w, f"{name}.qkv"), []
    for start in range(0, features, dim):
        q, k, v = (qkv[:, part * features + start : part * features + start + dim] for part in range(3))
        q = rotate(rms_norm(q, w[f"{name}.q_norm.weight"]), positions)
        k = rotate(rms_norm(k, w[f"{name}.k_norm.weight"]), positions)
        scores = q @ k.T / math.sqrt(dim)
        scores[:, torch.tensor(hidden)] = -math.inf
        attended.append(torch.softmax(scores, dim=1) @ v)
    return linear(torch.cat(attended, dim=1), w, f"{name}.proj")


def in_frames(x: Tensor, grid: tuple[int, int], w: Weights, name: str, heads: int, scale: float) -> Tensor:
    """Among the patches of every frame of x (T, S, D)."""
    positions = [(0.0, row / scale, column / scale) for row in range(grid[0]) for column in range(grid[1])]
    return torch.stack([attention(frame, w, name, heads, positions, [False] * len(frame)) for frame in x])


def in_windows(
    x: Tensor, grid: tuple[int, int], w: Weights, name: str, heads: int, scale: float, kernel: Sequence[int]
) -> Tensor:
    """Among the tokens of windows of rows and columns, over all frames of x (T, S, D)."""
    (rows, columns), (k_h, k_w) = grid, kernel[:2]
    padded = F.pad(x.unflatten(1, grid), (0, 0, 0, -columns % k_w, 0, -rows % k_h))
    result = torch.empty_like(padded)
    for top in range(0, padded.shape[1], k_h):
        for left in range(0, padded.shape[2], k_w):
            window = padded[:, top : top + k_h, left : left + k_w]
            places = [(t, row, column) for t in range(len(x)) for row in range(k_h) for column in range(k_w)]
            positions = [(float(t), row / scale, column / scale) for t, row, column in places]
            hidden = [top + row >= rows or left + column >= columns for _, row, column in places]
            attended = attention(window.flatten(0, 2), w, name, heads, positions, hidden)
            result[:, top : top + k_h, left : left + k_w] = attended.reshape(window.shape)
    return result[:, :rows, :columns].flatten(1, 2)


def embedded(latents: Tensor, w: Weights, name: str) -> Tensor:
    """Latents (C, T, H, W) to tokens (T, S, D)."""
    return patches(latents, {f"x_embedder.proj.{part}": w[f"{name}.proj.{part}"] for part in ("weight", "bias")})[0]


def stdit4(
    w: Weights,
    latents: Tensor,
    timestep: float,
    text: Tensor,
    null_text: Tensor,
    known: Tensor | None = None,
    known_frames: Sequence[int] = (),
    *,
    num_heads: int,
    kernel: Sequence[int],
    input_sq_size: int,
    height: float,
    width: float,
    fps: float,
) -> Tensor:
    """The velocity, data - noise, and as many numbers that mean nothing.

    Args:
        latents: (C, T, H, W).
        text, null_text: (L, D_c) both.
        known: latents beside the noise, (C, T, H, W), zero where no frame is known; None leaves their embedders out.
        known_frames: which are.
    """
    tokens, grid = patches(latents, w)
    if known is not None:
        mask = torch.zeros_like(known)
        mask[:, list(known_frames)] = 1
        tokens = tokens + embedded(known, w, "x_embedder_cond") + embedded(mask, w, "x_embedder_cond_mask")
    tokens = tokens + scaled_positions(grid, tokens.shape[-1], height, width, input_sq_size)
    scale = math.sqrt(height * width) / input_sq_size
    now = embed_number(timestep, w, "t_embedder") + embed_number(fps, w, "fps_embedder")
    six = linear(silu(now), w, "t_block.1").reshape(6, -1)
    texts = [mlp(null_text if t in known_frames else text, w, "y_embedder.y_proj") for t in range(len(tokens))]
    for number in range(number_of("spatial_blocks", w)):
        for block in (f"spatial_blocks.{number}", f"temporal_blocks.{number}"):
            table = w[f"{block}.scale_shift_table"] + six
            inner, attn = modulate(tokens, table[0], table[1]), f"{block}.attn"
            if block.startswith("spatial"):
                attended = in_frames(inner, grid, w, attn, num_heads, scale)
            else:
                attended = in_windows(inner, grid, w, attn, num_heads, scale, kernel)
            tokens = tokens + table[2] * attended
            read = [
                text_attention(tokens[t : t + 1], texts[t], w, f"{block}.cross_attn", num_heads)
                for t in range(len(texts))
            ]
            tokens = add_mlp(tokens + torch.cat(read), [table] * len(tokens), w, f"{block}.mlp")
    outputs = last_layer(tokens, w, now, now, [True] * len(tokens))
    return unpatched(outputs, grid, w["x_embedder.proj.weight"].shape[3:], latents.shape[2:])


def shifted(u: float, height: float, width: float, num_frames: int) -> float:
    ratio = math.sqrt(height * width) / 512 * math.sqrt((num_frames - 1) // 4 if num_frames > 1 else 1)
    return ratio * u / (1 + (ratio - 1) * u)


def oscillating(scale: float, step: int) -> float:
    return scale if step < STEADY_STEPS or step % 2 == 0 else 1.0


def sample(
    network: Callable[[Tensor, float, str], Tensor],
    x: Tensor,
    times: Sequence[float],
    known: Tensor | None = None,
    known_frames: Sequence[int] = (),
    draw: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Euler steps from noise x (C, T, H, W), all branches computed in each.

    Args:
        network: of a sample, a time in [0, 1], and which branch: "text", "null" or "unconditional".
        times: 1 first.
        known: clean latents, of which `known_frames` are noised anew before every step.
        draw: noise like x.
    """
    for step, t in enumerate(times):
        if known is not None and draw is not None:
            noised = (1 - t) * known + t * draw()
            x = x.clone()
            x[:, list(known_frames)] = noised[:, list(known_frames)]
        c, u = network(x, t, "text"), network(x, t, "null")
        scale = oscillating(GUIDANCE, step)
        if known is None:
            v = u + scale * (c - u)
            v = v * (0.7 * c.std() / v.std() + 0.3)
        else:
            n, image_scale = network(x, t, "unconditional"), oscillating(IMAGE_GUIDANCE, step)
            ramp = torch.ones(x.shape[1], dtype=x.dtype)
            if image_scale > 1:
                upper = IMAGE_GUIDANCE + (1 - IMAGE_GUIDANCE) * step / (len(times) - 1)
                ramp = torch.linspace(1, upper, x.shape[1], dtype=x.dtype)
            v = n + ramp[:, None, None] * (u - n) + scale * (c - u)
        x = x + v * (t - (times[step + 1] if step + 1 < len(times) else 0.0))
    return x
