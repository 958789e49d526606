"""A procedural world of short clips: one bold shape moves over a calm background.

Small models trained on it show, offline and in minutes, what a large model does: the clips are drawn from words
(shape, colour, size, motion, speed, background), so a caption can be written for every clip and a judge can check every
word of it. Drawing is signed distance fields on the pixel grid: anti-aliased, batched, any device, size and length.

Lengths are in units of 1/64 of the shorter side of the picture ("px" at 64 x 64). Positions count from the centre of
the picture, x to the right and y downwards. `time` runs from 0 at the first to 1 at the last frame, so motions are
given per clip, whatever its number of frames.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora.toybox.backgrounds import paint_background
from opensora.toybox.specs import COLOURS, SHAPES, SIZES, ClipSpec, Thing

TRAVEL = {"slow": 12.0, "fast": 22.0}  # left, right, up, down
BOUNCE_HEIGHT, BOUNCES = 17.0, {"slow": 1, "fast": 2}
ORBIT_RADIUS, ORBIT_TURNS = 9.0, {"slow": 0.75, "fast": 1.25}
SPIN_TURNS = {"slow": 0.3, "fast": 0.5}
GROWTH = {"slow": 1.5, "fast": 1.8}  # last radius / first radius; the mean radius is the size's
PAN, ZOOM = 8.0, 1.2
OUTLINE, OUTLINE_LEVEL = 1.5, -0.85
MARGIN = 1.0  # between the object and the picture's edge, always
REACH = {"ball": 1.0, "square": 1.1, "triangle": 1.14, "ring": 1.0, "cross": 1.05, "star": 1.14}
"""Farthest point of a shape from its centre, in radii."""
CAMERA_SCALE, SECOND_SCALE = 0.75, 0.45  # objects shrink where a camera or a second object needs room


@dataclass(frozen=True)
class Path:
    """Where an object is and what it looks like, all (B, T) in px at 64 x 64 and radians."""

    x: Tensor
    y: Tensor
    radius: Tensor
    angle: Tensor


def trace(things: Sequence[Thing], specs: Sequence[ClipSpec], num_frames: int, height: int, width: int) -> Path:
    """The paths of `things`, one per clip of `specs`, in picture coordinates (the camera is applied later)."""
    time = torch.linspace(0, 1, num_frames) if num_frames > 1 else torch.full((1,), 0.5)
    unit = min(height, width) / 64
    rows = []
    for thing, spec in zip(things, specs, strict=True):
        scale = SECOND_SCALE if spec.second else (1.0 if spec.camera == "fixed" else CAMERA_SCALE)
        radius, motion, speed = SIZES[thing.size] * scale, thing.motion, thing.speed
        growth = GROWTH[speed] if motion in ("grow", "shrink") else 1.0
        travel = TRAVEL[speed] * scale
        dx = travel * ((motion == "right") - (motion == "left"))
        dy = travel * ((motion == "down") - (motion == "up"))
        bounce = BOUNCE_HEIGHT * scale if motion == "bounce" else 0.0
        orbit = ORBIT_RADIUS * scale if motion == "orbit" else 0.0
        # Room for the path's centre: the picture (or this object's half of it), less what the path and object take.
        reach = REACH[thing.shape] * radius * math.sqrt(growth) + MARGIN + orbit
        half_width, half_height, centre = width / unit / 2, height / unit / 2, 0.0
        if spec.second:
            half_width /= 2
            centre = half_width if thing is spec.second else -half_width
        if spec.camera.startswith("pan"):
            half_width -= PAN / 2
        if spec.camera.startswith("zoom"):
            half_width, half_height = half_width / ZOOM, half_height / ZOOM
        room_x = max(0.0, half_width - reach - abs(dx) / 2)
        room_y = max(0.0, half_height - reach - abs(dy) / 2 - bounce / 2)
        rows.append(
            (
                centre + thing.x * room_x,
                thing.y * room_y,
                radius,
                dx,
                dy,
                bounce,
                BOUNCES[speed],
                orbit,
                ORBIT_TURNS[speed] * 2 * math.pi,
                thing.phase * 2 * math.pi,
                SPIN_TURNS[speed] * 2 * math.pi if motion == "spin" else 0.0,
                {"grow": 1.0, "shrink": -1.0}.get(motion, 0.0) * math.log(growth),
            )
        )
    columns = torch.tensor(rows, dtype=torch.float32).unsqueeze(-1).unbind(1)
    x0, y0, radius, dx, dy, bounce, bounces, orbit, turn, phase, spin, growth = columns
    centred = time - 0.5
    fall = (time * bounces) % 1.0
    hop = 4 * fall * (1 - fall) - 0.5  # a parabola per bounce, from the ground and back to it
    circle = phase + turn * time
    return Path(
        x=x0 + dx * centred + orbit * torch.cos(circle),
        y=y0 + dy * centred - bounce * hop + orbit * torch.sin(circle),
        radius=radius * torch.exp(growth * centred),
        angle=spin * centred,
    )


def distance(shape: str, u: Tensor, v: Tensor, radius: Tensor) -> Tensor:
    """Distance to the outline of a shape: negative inside, exact along straight edges.

    Args:
        shape: one of `SHAPES`.
        u, v: coordinates in the shape's own upright frame, (..., H, W), v downwards.
        radius: (..., 1, 1).
    """
    if shape == "ball":
        return torch.hypot(u, v).sub_(radius)
    if shape == "square":
        return torch.maximum(u.abs(), v.abs()).sub_(0.77 * radius)
    if shape == "triangle":
        slope = u.abs().mul_(math.sqrt(0.75)).sub_(v, alpha=0.5)
        return torch.maximum(slope, v).sub_(REACH[shape] / 2 * radius)
    if shape == "ring":
        band = torch.hypot(u, v).sub_(0.69 * radius).abs_().sub_(0.31 * radius)
        gap = torch.minimum(0.34 * radius - v.abs(), u)
        return torch.maximum(band, gap)
    if shape == "cross":
        a, b = u.abs(), v.abs()
        return torch.maximum(torch.maximum(a, b).sub_(0.98 * radius), torch.minimum(a, b).sub_(0.36 * radius))
    # A five-pointed star is what lies inside at least four of five half planes: the second largest distance.
    largest = second = torch.full_like(u, -math.inf)
    for i in range(5):
        angle = 2 * math.pi * i / 5 - math.pi / 2  # the first edge faces up, so one point stands up
        plane = math.cos(angle) * u + math.sin(angle) * v
        largest, second = torch.maximum(largest, plane), torch.maximum(second, torch.minimum(largest, plane))
    return second.sub_(REACH[shape] * math.cos(2 * math.pi / 5) * radius)


def draw(
    video: Tensor, mask: Tensor, shape: str, colour: Tensor, path: Path, x: Tensor, y: Tensor, unit: float
) -> None:
    """Paints one object of the same shape into each clip, in place.

    Args:
        video: (B, 3, T, H, W) in [-1, 1].
        mask: (B, 1, T, H, W), coverage by any object so far.
        shape: one of `SHAPES`.
        colour: (B, 3) in [-1, 1].
        path: in pixels of this picture.
        x, y: pixel centres, (B, T, 1, W) and (B, T, H, 1).
        unit: pixels per px at 64 x 64.
    """
    cos, sin = path.angle.cos()[..., None, None], path.angle.sin()[..., None, None]
    radius = path.radius[..., None, None]
    x, y = x - path.x[..., None, None], y - path.y[..., None, None]
    u, v = cos * x + sin * y, cos * y - sin * x
    outside = distance(shape, u, v, radius)
    cover = (0.5 - outside).clamp_(0, 1)
    fill = outside.neg_().sub_(OUTLINE * unit - 0.5).clamp_(0, 1)
    if shape == "ball":  # a dark spot, so that a spin shows
        spot = torch.hypot(u, v.add_(0.48 * radius)).sub_(0.27 * radius - 0.5)
        fill.mul_(spot.clamp_(0, 1))
    video.mul_((1 - cover).unsqueeze(1))
    video.add_(cover.unsqueeze(1), alpha=OUTLINE_LEVEL)
    video.addcmul_((colour - OUTLINE_LEVEL)[:, :, None, None, None], fill.unsqueeze(1))
    torch.maximum(mask[:, 0], cover, out=mask[:, 0])


def render(
    specs: Sequence[ClipSpec],
    num_frames: int = 17,
    height: int = 64,
    width: int = 64,
    device: str | torch.device = "cpu",
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws clips.

    Args:
        specs: B clips.
        num_frames: T; 1 gives the middle of each clip.
        height, width: H and W in pixels.
        device: where to draw.
        out: (video, mask) of the shapes below to draw into; spares the cost of fresh memory in a loop.

    Returns:
        video: (B, 3, T, H, W) float32 in [-1, 1].
        mask: (B, 1, T, H, W) float32 in [0, 1], how far each pixel is covered by an object.
    """
    device = torch.device(device)
    batch, unit = len(specs), min(height, width) / 64
    if out is None:
        video = torch.empty(batch, 3, num_frames, height, width, device=device)
        mask = torch.empty(batch, 1, num_frames, height, width, device=device)
    else:
        video, mask = out
    mask.zero_()
    time = torch.linspace(0, 1, num_frames) if num_frames > 1 else torch.full((1,), 0.5)
    # The camera moves the world's coordinates under the picture's pixels: world = pixel / zoom + offset.
    pan = torch.tensor([{"pan left": -PAN, "pan right": PAN}.get(s.camera, 0.0) for s in specs])
    zoom = torch.tensor([{"zoom in": 1.0, "zoom out": -1.0}.get(s.camera, 0.0) for s in specs])
    exponent = torch.where(zoom[:, None] >= 0, zoom[:, None] * time, 1 + zoom[:, None] * time)
    magnify = torch.where(zoom[:, None] == 0, 1.0, ZOOM**exponent)
    offset = pan[:, None] * (time - 0.5) * unit
    columns = torch.arange(width) - (width - 1) / 2
    rows = torch.arange(height) - (height - 1) / 2
    x = (columns / magnify[..., None] + offset[..., None]).unsqueeze(-2).to(device)
    y = (rows / magnify[..., None]).unsqueeze(-1).to(device)

    for name in {s.background for s in specs}:
        chosen = [i for i, s in enumerate(specs) if s.background == name and s.camera == "fixed"]
        if chosen:
            still = paint_background(name, columns[None].to(device) / unit, rows[:, None].to(device) / unit)
            for i in chosen:
                video[i] = still[:, None]
    for i, spec in enumerate(specs):
        if spec.camera != "fixed":
            video[i] = paint_background(spec.background, x[i] / unit, y[i] / unit)

    layers = [[(i, s.second) for i, s in enumerate(specs) if s.second], list(enumerate(specs))]
    for layer in layers:
        for shape in SHAPES:
            chosen = [(i, thing) for i, thing in layer if thing.shape == shape]
            if not chosen:
                continue
            path = trace([t for _, t in chosen], [specs[i] for i, _ in chosen], num_frames, height, width)
            path = Path(*(part.to(device) for part in (path.x * unit, path.y * unit, path.radius * unit, path.angle)))
            colours = torch.tensor([COLOURS[t.colour] for _, t in chosen], device=device) / 127.5 - 1
            # One clip at a time stays in a CPU's cache; a GPU takes them all at once.
            if device.type == "cpu":
                for row, (i, _) in enumerate(chosen):
                    part = slice(row, row + 1)
                    clip = Path(path.x[part], path.y[part], path.radius[part], path.angle[part])
                    at = slice(i, i + 1)
                    draw(video[at], mask[at], shape, colours[part], clip, x[at], y[at], unit)
            else:
                at = torch.tensor([i for i, _ in chosen], device=device)
                group_video, group_mask = video[at], mask[at]
                draw(group_video, group_mask, shape, colours, path, x[at], y[at], unit)
                video[at], mask[at] = group_video, group_mask
    return video, mask
