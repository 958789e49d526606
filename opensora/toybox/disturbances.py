"""What may go wrong in time, and how strongly: orders and speeds of frames, frames that shake, wobble, flicker, jump.

A network learns from clips that were disturbed so what to look for in real ones. Every disturbance is drawn for each
clip by itself, most clips have few of them, and each has a strength that is 0 where there is none and about 1 at most.

Letters: B clips, T frames, H, W pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SHARE = 0.18
"""How often each disturbance occurs."""

TIME_DISTURBANCES = ("shuffled", "repeated", "frozen", "speed_change")
PICTURE_DISTURBANCES = ("jitter", "wobble", "cut", "flicker", "fade", "noise", "ghosts")
DISTURBANCES = TIME_DISTURBANCES + PICTURE_DISTURBANCES

_JITTER_PX, _WOBBLE_PX = 3.0, 2.0


class Draws:
    """Random numbers for B clips."""

    def __init__(self, batch: int, generator: torch.Generator) -> None:
        self.batch, self.generator = batch, generator

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """(B, *shape)."""
        return torch.empty(self.batch, *shape).uniform_(low, high, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        """(B, *shape)."""
        return torch.randn(self.batch, *shape, generator=self.generator)

    def strength(self, least: float = 0.1, share: float = SHARE) -> Tensor:
        """(B,), 0 for most clips and in [least, 1] for a share of them."""
        return (self.uniform(0, 1) < share) * self.uniform(least, 1)


def draw_times(batch: int, num_frames: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """When each frame of a clip was taken.

    Args:
        batch: B.
        num_frames: T, 4 or more.
        generator: source of every draw.

    Returns:
        times: (B, T) in frames at normal speed, within [0, 2 T]; 0, 1, 2, ... where nothing is wrong.
        strengths: disturbance -> (B,); that of "speed_change" has a sign, above 0 where a clip gets faster.
    """
    draws = Draws(batch, generator)
    place = torch.arange(num_frames).expand(batch, -1)
    # Faster or slower from some moment on, by up to a factor of three.
    change = draws.strength(0.3) * torch.where(draws.uniform(0, 1) < 0.5, 1.0, -1.0)
    moment = draws.uniform(0.25, 0.75, 1) * num_frames
    exponent = torch.where(place < moment, -0.5, 0.5) * change[:, None]
    steps = torch.exp(exponent * torch.log(torch.tensor(3.0)))
    times = steps.cumsum(dim=1) - steps[:, :1]
    # Every frame shown two, three or four times.
    repeats = torch.where(draws.uniform(0, 1) < SHARE, torch.randint(2, 5, (batch,), generator=generator), 1)
    order = place // repeats[:, None] * repeats[:, None]
    # A pause, after which the clip goes on from where it is by then.
    length = draws.strength(0.3) * num_frames
    start = (draws.uniform(0, 1) * (num_frames - length)).floor()[:, None]
    order = torch.where((order > start) & (order <= start + length[:, None]), start.long(), order)
    # Frames take each other's places, the further the stronger.
    disorder = draws.strength()
    order = torch.where(disorder[:, None] > 0, order.gather(1, _disordered(place, disorder, draws)), order)
    return times.gather(1, order), {
        "shuffled": disorder,
        "repeated": 1 - 1 / repeats,
        "frozen": length / num_frames,
        "speed_change": change,
    }


def _disordered(place: Tensor, disorder: Tensor, draws: Draws) -> Tensor:
    """Orders (B, T) of frames that moved by up to about `disorder` (B,) of eight places."""
    return (place + disorder[:, None] * 8 * draws.uniform(-0.5, 0.5, place.shape[1])).argsort(dim=1)


def disturb(video: Tensor, flow: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Disturbs the frames of clips, whatever is in them.

    Args:
        video: (B, 3, T, H, W) in [-1, 1].
        flow: (B, 2, T - 1, h, w), in px of H x W; NaN where it is not known.
        generator: source of every draw.

    Returns:
        video: the same shape, in [-1, 1].
        flow: as it is now; NaN across a cut.
        strengths: disturbance -> (B,).
    """
    draws = Draws(len(video), generator)
    video, flow, strengths = _displaced(video, flow, draws)
    video, flow, strengths["cut"] = _cut(video, flow, draws)
    num_frames = video.shape[2]

    def per_clip(values: Tensor) -> Tensor:
        return values[:, None, None, None, None]

    def per_frame(values: Tensor) -> Tensor:
        return values[:, None, :, None, None]

    strengths["flicker"] = flicker = draws.strength()
    gain = 1 + 0.3 * per_clip(flicker) * per_frame(draws.normal(num_frames))
    video = video * gain + 0.25 * per_clip(flicker) * per_frame(draws.normal(num_frames))
    strengths["fade"] = fade = draws.strength() * torch.where(draws.uniform(0, 1) < 0.5, 1.0, -1.0)
    video = video + 0.8 * per_clip(fade) * per_frame(torch.linspace(-0.5, 0.5, num_frames).expand(len(video), -1))
    strengths["ghosts"] = ghosts = draws.strength(0.3)
    frames = list(video.unbind(2))
    for i in range(1, num_frames):
        frames[i] = torch.lerp(frames[i], frames[i - 1], 0.8 * ghosts[:, None, None, None])
    video = torch.stack(frames, dim=2)
    strengths["noise"] = noise = draws.strength()
    video = video + 0.25 * per_clip(noise) * torch.randn(video.shape, generator=generator)
    return video.clamp(-1, 1), flow, strengths


def _displaced(video: Tensor, flow: Tensor, draws: Draws) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Frames that shake as a whole (jitter) and whose parts shake each in its own way (wobble)."""
    batch, _, num_frames, height, width = video.shape
    jitter, wobble = draws.strength(), draws.strength()
    shift = _JITTER_PX * jitter[:, None, None, None, None] * draws.normal(num_frames, 2, 1, 1)
    bend = _WOBBLE_PX * wobble[:, None, None, None, None] * draws.normal(num_frames, 2, 5, 5)
    coarse = (shift + bend).flatten(0, 1)
    moved = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    identity = F.affine_grid(torch.eye(2, 3)[None], [1, 1, height, width], align_corners=False)
    grid = identity + moved.permute(0, 2, 3, 1) * 2 / torch.tensor([width, height])
    frames = F.grid_sample(
        video.transpose(1, 2).flatten(0, 1), grid, padding_mode="reflection", align_corners=False
    ).unflatten(0, (batch, num_frames))
    cells = F.interpolate(coarse, flow.shape[-2:], mode="bilinear", align_corners=False)
    cells = cells.unflatten(0, (batch, num_frames)).transpose(1, 2)
    # A frame shows at x what was at x + moved, so things go the other way.
    flow = flow + cells[:, :, :-1] - cells[:, :, 1:]
    return frames.transpose(1, 2), flow, {"jitter": jitter, "wobble": wobble}


def _cut(video: Tensor, flow: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    """Clips that become the next one of the batch at some frame."""
    num_frames = video.shape[2]
    cut = (draws.uniform(0, 1) < SHARE).float()
    moment = (draws.uniform(0, 1) * (num_frames - 1)).floor() + 1  # the first frame of the other clip
    moment = torch.where(cut > 0, moment, num_frames)[:, None]
    frame = torch.arange(num_frames)
    other = (frame >= moment)[:, None, :, None, None]
    video = torch.where(other, video.roll(1, dims=0), video)
    after, across = ((frame[1:] - 1 >= moment), (frame[1:] == moment))
    flow = torch.where(after[:, None, :, None, None], flow.roll(1, dims=0), flow)
    return video, flow.masked_fill(across[:, None, :, None, None], torch.nan), cut
