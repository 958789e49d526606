"""The transformers of Open-Sora 1.0, 1.1 and 1.2 as plain formulas in float64, from published weights.

One sample, one frame, one attention head at a time, so that every line can be held against the papers and the prose of
the fixtures (STDiT: adaLN-single of PixArt-alpha, sine-cosine positions of DiT, rotary positions of RoFormer). Nothing
of the package is used here.

`w` are weights by their published names. A clip's tokens are (T, S, D): frames, patches of a frame, features; `frames`
says of every frame whether it is generated (True) or given (False).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def double(weights: dict[str, Tensor]) -> Weights:
    return {name: tensor.double() for name, tensor in weights.items()}


# --- layers -----------------------------------------------------------------------------------------------------------


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def mlp(x: Tensor, w: Weights, name: str) -> Tensor:
    hidden = linear(x, w, f"{name}.fc1")
    gelu = hidden / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    return linear(gelu, w, f"{name}.fc2")


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then shift and scale."""
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)
    return normed * (1 + scale) + shift


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * weight


def rotate(x: Tensor) -> Tensor:
    """Rotary positions 0, 1, ... of x (N, d): neighbouring features 2i, 2i + 1 turn by position / 10000^(2i / d)."""
    length, dim = x.shape
    angles = torch.tensor(
        [[n / 10_000 ** (2 * i / dim) for i in range(dim // 2)] for n in range(length)], dtype=x.dtype
    )
    turned = torch.empty_like(x)
    turned[:, 0::2] = x[:, 0::2] * angles.cos() - x[:, 1::2] * angles.sin()
    turned[:, 1::2] = x[:, 1::2] * angles.cos() + x[:, 0::2] * angles.sin()
    return turned


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.T / math.sqrt(q.shape[1]), dim=1) @ v


def self_attention(
    x: Tensor, w: Weights, name: str, heads: int, *, rope: bool = False, rope_before_norm: bool = False
) -> Tensor:
    """Among the tokens x (N, D) of one sequence; queries and keys are normed where the weights have norms."""
    normed = f"{name}.q_norm.weight" in w
    features = x.shape[1]
    dim = features // heads
    qkv = linear(x, w, f"{name}.qkv")
    attended = []
    for head in range(heads):
        start = head * dim
        q, k, v = (qkv[:, part * features + start : part * features + start + dim] for part in range(3))
        if rope and rope_before_norm:
            q, k = rotate(q), rotate(k)
        if normed:
            q, k = rms_norm(q, w[f"{name}.q_norm.weight"]), rms_norm(k, w[f"{name}.k_norm.weight"])
        if rope and not rope_before_norm:
            q, k = rotate(q), rotate(k)
        attended.append(softmax_attention(q, k, v))
    return linear(torch.cat(attended, dim=1), w, f"{name}.proj")


def text_attention(tokens: Tensor, text: Tensor, w: Weights, name: str, heads: int) -> Tensor:
    """From all tokens (T, S, D) to the projected text (L, D)."""
    features = tokens.shape[-1]
    dim = features // heads
    queries = linear(tokens.flatten(0, 1), w, f"{name}.q_linear")
    keys_values = linear(text, w, f"{name}.kv_linear")
    attended = []
    for start in range(0, features, dim):
        k, v = keys_values[:, start : start + dim], keys_values[:, features + start : features + start + dim]
        attended.append(softmax_attention(queries[:, start : start + dim], k, v))
    return linear(torch.cat(attended, dim=1), w, f"{name}.proj").reshape(tokens.shape)


def space_attention(tokens: Tensor, tables: list[Tensor], w: Weights, name: str, heads: int) -> Tensor:
    """Within every frame; a frame's table begins with shift, scale and gate."""
    result = []
    for x, (shift, scale, gate, *_) in zip(tokens, tables, strict=True):
        result.append(x + gate * self_attention(modulate(x, shift, scale), w, name, heads))
    return torch.stack(result)


def time_attention(
    tokens: Tensor, tables: list[Tensor], w: Weights, name: str, heads: int, *, rope_before_norm: bool
) -> Tensor:
    """Along time at every patch; every frame is shifted, scaled and gated by its own table."""
    shift, scale, gate, *_ = torch.stack(tables, dim=1)  # (T, D) each
    result = []
    for x in tokens.unbind(dim=1):
        x_m = modulate(x, shift, scale)
        attended = self_attention(x_m, w, name, heads, rope=True, rope_before_norm=rope_before_norm)
        result.append(x + gate * attended)
    return torch.stack(result, dim=1)


def add_mlp(tokens: Tensor, tables: list[Tensor], w: Weights, name: str) -> Tensor:
    """A frame's table ends with shift, scale and gate."""
    result = []
    for x, (*_, shift, scale, gate) in zip(tokens, tables, strict=True):
        result.append(x + gate * mlp(modulate(x, shift, scale), w, name))
    return torch.stack(result)


# --- embeddings -------------------------------------------------------------------------------------------------------


def embed_number(value: float, w: Weights, name: str) -> Tensor:
    """256 cosines and sines of the number, then two layers."""
    angles = torch.tensor([value * 10_000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    hidden = silu(linear(torch.cat([angles.cos(), angles.sin()]), w, f"{name}.mlp.0"))
    return linear(hidden, w, f"{name}.mlp.2")


def position_code(position: float, dim: int) -> Tensor:
    angles = torch.tensor([position / 10_000 ** (2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)
    return torch.cat([angles.sin(), angles.cos()])


def patch_positions(rows: int, columns: int, dim: int, row_step: float, column_step: float) -> Tensor:
    """(S, D); the first half of the features tells the column, the second the row."""
    codes = []
    for row in range(rows):
        for column in range(columns):
            codes.append(
                torch.cat([position_code(column * column_step, dim // 2), position_code(row * row_step, dim // 2)])
            )
    return torch.stack(codes)


def scaled_positions(grid: tuple[int, int], dim: int, height: float, width: float, input_sq_size: int) -> Tensor:
    """Positions of 1.1 and 1.2: the picture, of any size, spans the square of as many patches over its scale."""
    rows, columns = grid
    scale = math.sqrt(height * width) / input_sq_size
    base = round(math.sqrt(rows * columns))
    return patch_positions(rows, columns, dim, base / rows / scale, base / columns / scale)


def patches(latents: Tensor, w: Weights) -> tuple[Tensor, tuple[int, int]]:
    """Latents (C, T, H, W) to tokens (T, S, D) and (rows, columns) of patches; odd sizes are filled with zeros."""
    weight, bias = w["x_embedder.proj.weight"], w["x_embedder.proj.bias"]
    filled = F.pad(latents, (0, -latents.shape[3] % weight.shape[4], 0, -latents.shape[2] % weight.shape[3]))
    embedded = F.conv3d(filled[None], weight, bias, stride=weight.shape[2:])[0]  # (D, T, rows, columns)
    return embedded.flatten(2).permute(1, 2, 0), (embedded.shape[2], embedded.shape[3])


def unpatched(tokens: Tensor, grid: tuple[int, int], patch: Sequence[int], size: Sequence[int]) -> Tensor:
    """Output of the last layer (T, S, p_h * p_w * C) to (C, T, H, W), without what was filled in."""
    (rows, columns), (p_h, p_w) = grid, patch
    channels = tokens.shape[-1] // (p_h * p_w)
    cells = tokens.reshape(tokens.shape[0], rows, columns, p_h, p_w, channels)
    latents = torch.empty(channels, tokens.shape[0], rows * p_h, columns * p_w, dtype=tokens.dtype)
    for a in range(p_h):
        for b in range(p_w):
            latents[:, :, a::p_h, b::p_w] = cells[:, :, :, a, b].permute(3, 0, 1, 2)
    return latents[:, :, : size[0], : size[1]]


def last_layer(tokens: Tensor, w: Weights, generated: Tensor, given: Tensor, frames: Sequence[bool]) -> Tensor:
    """Modulated by the embedding of the timestep; conditioning frames, a second time by theirs."""
    shift, scale = w["final_layer.scale_shift_table"]
    outputs = []
    for frame, is_generated in enumerate(frames):
        x = modulate(tokens[frame], shift + generated, scale + generated)
        if not is_generated:
            x = modulate(x, shift + given, scale + given)
        outputs.append(linear(x, w, "final_layer.linear"))
    return torch.stack(outputs)


def number_of(prefix: str, w: Weights) -> int:
    return 1 + max(int(name.split(".")[1]) for name in w if name.startswith(f"{prefix}."))


# --- the networks -----------------------------------------------------------------------------------------------------


def stdit(
    w: Weights,
    latents: Tensor,
    timestep: float,
    text: Tensor,
    frames: Sequence[bool] | None = None,
    *,
    num_heads: int,
    space_scale: float,
    time_scale: float,
) -> Tensor:
    """Open-Sora 1.0, and its frame-masked form of 1.1 and later.

    Args:
        latents: (C, T, H, W).
        text: (L, D_c), the tokens that are read and no others.

    Returns:
        (2 C, T, H, W).
    """
    frames = [True] * latents.shape[1] if frames is None else frames
    tokens, grid = patches(latents, w)
    dim = tokens.shape[-1]
    tokens = tokens + patch_positions(*grid, dim, 1 / space_scale, 1 / space_scale)
    frame_codes = torch.stack([position_code(frame / time_scale, dim) for frame in range(len(frames))])
    now, clean = embed_number(timestep, w, "t_embedder"), embed_number(0, w, "t_embedder")
    six_now, six_clean = (linear(silu(e), w, "t_block.1").reshape(6, dim) for e in (now, clean))
    text = mlp(text, w, "y_embedder.y_proj")
    for number in range(number_of("blocks", w)):
        block = f"blocks.{number}"
        table = w[f"{block}.scale_shift_table"]
        tables = [table + (six_now if is_generated else six_clean) for is_generated in frames]
        tokens = space_attention(tokens, tables, w, f"{block}.attn", num_heads)
        # Neither normed nor modulated, with the gate of space, of the real timestep in every frame.
        gate = (table + six_now)[2]
        columns = []
        for x in tokens.unbind(dim=1):
            placed = x + frame_codes if number == 0 else x
            columns.append(x + gate * self_attention(placed, w, f"{block}.attn_temp", num_heads))
        tokens = torch.stack(columns, dim=1)
        tokens = tokens + text_attention(tokens, text, w, f"{block}.cross_attn", num_heads)
        tokens = add_mlp(tokens, tables, w, f"{block}.mlp")
    outputs = last_layer(tokens, w, now, clean, frames)
    return unpatched(outputs, grid, w["x_embedder.proj.weight"].shape[3:], latents.shape[2:])


def stdit2(
    w: Weights,
    latents: Tensor,
    timestep: float,
    text: Tensor,
    frames: Sequence[bool] | None = None,
    *,
    num_heads: int,
    input_sq_size: int,
    height: float,
    width: float,
    num_frames: float,
    ratio: float,
    fps: float,
) -> Tensor:
    """Open-Sora 1.1: space is told size and ratio, time the number of frames and the frame rate; rotary before norm."""
    frames = [True] * latents.shape[1] if frames is None else frames
    tokens, grid = patches(latents, w)
    dim = tokens.shape[-1]
    tokens = tokens + scaled_positions(grid, dim, height, width, input_sq_size)
    told_space = torch.cat(
        [
            embed_number(height, w, "csize_embedder"),
            embed_number(width, w, "csize_embedder"),
            embed_number(ratio, w, "ar_embedder"),
        ]
    )
    told_time = embed_number(num_frames, w, "fl_embedder") + embed_number(fps, w, "fps_embedder")
    now, clean = embed_number(timestep, w, "t_embedder"), embed_number(0, w, "t_embedder")
    six_now, six_clean = (linear(silu(e + told_space), w, "t_block.1").reshape(6, dim) for e in (now, clean))
    three_now, three_clean = (linear(silu(e + told_time), w, "t_block_temp.1").reshape(3, dim) for e in (now, clean))
    text = mlp(text, w, "y_embedder.y_proj")
    for number in range(number_of("blocks", w)):
        block = f"blocks.{number}"
        table, time_table = w[f"{block}.scale_shift_table"], w[f"{block}.scale_shift_table_temporal"]
        tables = [table + (six_now if is_generated else six_clean) for is_generated in frames]
        time_tables = [time_table + (three_now if is_generated else three_clean) for is_generated in frames]
        tokens = space_attention(tokens, tables, w, f"{block}.attn", num_heads)
        tokens = time_attention(tokens, time_tables, w, f"{block}.attn_temp", num_heads, rope_before_norm=True)
        tokens = tokens + text_attention(tokens, text, w, f"{block}.cross_attn", num_heads)
        tokens = add_mlp(tokens, tables, w, f"{block}.mlp")
    # The last layer is told the size for conditioning frames only.
    outputs = last_layer(tokens, w, now, clean + told_space, frames)
    return unpatched(outputs, grid, w["x_embedder.proj.weight"].shape[3:], latents.shape[2:])


def stdit3(
    w: Weights,
    latents: Tensor,
    timestep: float,
    text: Tensor,
    frames: Sequence[bool] | None = None,
    *,
    num_heads: int,
    input_sq_size: int,
    height: float,
    width: float,
    fps: float,
) -> Tensor:
    """Open-Sora 1.2: blocks in space and in time take turns, each with text and MLP; rotary after norm."""
    frames = [True] * latents.shape[1] if frames is None else frames
    tokens, grid = patches(latents, w)
    dim = tokens.shape[-1]
    tokens = tokens + scaled_positions(grid, dim, height, width, input_sq_size)
    rate = embed_number(fps, w, "fps_embedder")
    now, clean = embed_number(timestep, w, "t_embedder") + rate, embed_number(0, w, "t_embedder") + rate
    six_now, six_clean = (linear(silu(e), w, "t_block.1").reshape(6, dim) for e in (now, clean))
    text = mlp(text, w, "y_embedder.y_proj")
    for number in range(number_of("spatial_blocks", w)):
        for block in (f"spatial_blocks.{number}", f"temporal_blocks.{number}"):
            table = w[f"{block}.scale_shift_table"]
            tables = [table + (six_now if is_generated else six_clean) for is_generated in frames]
            if block.startswith("spatial"):
                tokens = space_attention(tokens, tables, w, f"{block}.attn", num_heads)
            else:
                tokens = time_attention(tokens, tables, w, f"{block}.attn", num_heads, rope_before_norm=False)
            tokens = tokens + text_attention(tokens, text, w, f"{block}.cross_attn", num_heads)
            tokens = add_mlp(tokens, tables, w, f"{block}.mlp")
    outputs = last_layer(tokens, w, now, clean, frames)
    return unpatched(outputs, grid, w["x_embedder.proj.weight"].shape[3:], latents.shape[2:])
