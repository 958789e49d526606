"""Frames that Open-Sora 2.0 is shown: each piece encoded alone, by name of the condition, from files and in memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_ranks
from tiny_pipeline import seeded
from tiny_v2_0 import make_autoencoder, make_pipeline
from torch import Tensor

from opensora.conditioning.frames import FrameConditioning, condition, encode_alone
from opensora.errors import OpenSoraError
from opensora.generation.engine import Engine
from opensora.generation.loops import generate_loops
from opensora.generation.request import ClipRequest
from opensora.geometry import VideoSize
from opensora.media.transforms import to_video
from opensora.media.write import write_video
from opensora.pipeline import OpenSoraPipeline

PROMPT = "a small red ball rolls left"
HEIGHT, WIDTH = 16, 24
KINDS = ["hunyuan", "dc-ae"]


def frames_of(num_frames: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_frames, HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Two pictures, and clips of 19, 35 and 70 frames, exact to the bit."""
    folder = tmp_path_factory.mktemp("files")
    found = {name: folder / f"{name}.png" for name in ("first", "last", "few", "short", "long")}
    for seed, name in enumerate(("first", "last")):
        Image.fromarray(frames_of(1, seed)[0]).save(found[name])
    write_video(found["few"], frames_of(19, 4), 8)
    write_video(found["short"], frames_of(35, 2), 8)
    write_video(found["long"], frames_of(70, 3), 8)
    return found


@pytest.fixture(scope="module", params=KINDS)
def pipe(request) -> OpenSoraPipeline:
    return make_pipeline(make_autoencoder(request.param))


def shown(pipe: OpenSoraPipeline, files: dict[str, Path], kind: str, *names: str, **wishes: Any) -> FrameConditioning:
    """Of the only loop, of a clip of 20 latent frames."""
    num_frames = pipe.autoencoder.shortest_clip(20)
    request = ClipRequest(
        PROMPT, num_frames=num_frames, cond_type=kind, reference_path=tuple(map(files.get, names)), **wishes
    )
    (found,) = Engine(pipe).prepare([request])[0].conditioning
    assert found is not None
    return found


def check(pipe: OpenSoraPipeline, found: FrameConditioning, *pieces: tuple[np.ndarray, int]) -> None:
    """Each piece, encoded alone, lies where it should, and nothing else is known."""
    expected = torch.ones(1, 20)
    for frames, start in pieces:
        latents = encode_alone(pipe.autoencoder, to_video(frames))
        places = slice(start % 20, start % 20 + latents.shape[2])
        expected[:, places] = 0
        torch.testing.assert_close(found.latents[:, :, places], latents)
    assert torch.equal(found.strength, expected)


def test_pictures(pipe, files):
    first, last = frames_of(1, 0), frames_of(1, 1)
    check(pipe, shown(pipe, files, "i2v_head", "first"), (first, 0))
    check(pipe, shown(pipe, files, "i2v_tail", "last"), (last, -1))
    check(pipe, shown(pipe, files, "i2v_loop", "first", "last"), (first, 0), (last, -1))


def test_of_clips_their_first_and_last_frame(pipe, files):
    short, long = frames_of(35, 2), frames_of(70, 3)
    check(pipe, shown(pipe, files, "i2v_head", "short"), (short[:1], 0))
    check(pipe, shown(pipe, files, "i2v_tail", "short"), (short[-1:], -1))
    check(pipe, shown(pipe, files, "i2v_loop", "short", "long"), (short[:1], 0), (long[-1:], -1))
    check(pipe, shown(pipe, files, "i2v_loop", "short"), (short[:1], 0), (short[-1:], -1))


def test_clips(pipe, files):
    short, long, lead = frames_of(35, 2), frames_of(70, 3), pipe.autoencoder.frame_offset
    check(pipe, shown(pipe, files, "v2v_head", "short"), (short[: 32 + lead], 0))
    check(pipe, shown(pipe, files, "v2v_tail", "short"), (short[-32 - lead :], -8 - lead))
    check(pipe, shown(pipe, files, "v2v_head_easy", "long"), (long[: 64 + lead], 0))
    check(pipe, shown(pipe, files, "v2v_tail_half", "long"), (long[-64 - lead :], -16 - lead))
    check(pipe, shown(pipe, files, "v2v_head_easy", "short"), (short[: 32 + lead], 0))
    few = frames_of(19, 4)[-16 - lead :]  # as many as there are, and fill latent frames
    check(pipe, shown(pipe, files, "v2v_tail", "few"), (few, -4 - lead))
    three = pipe.autoencoder.shortest_clip(3)
    check(pipe, shown(pipe, files, "v2v_tail", "long", condition_frame_length=3), (long[-three:], -3))


def test_words_mean_the_same(pipe, files):
    request = ClipRequest(PROMPT, num_frames=pipe.autoencoder.shortest_clip(20))
    named: list[dict[str, Any]] = [
        {"image": files["first"], "last_image": files["last"]},
        {"extend": files["short"], "condition_frame_length": 3},
        {"extend": files["short"], "condition_frame_length": 3, "backwards": True},
    ]
    three = pipe.autoencoder.shortest_clip(3)
    pieces: list[Any] = [
        [(frames_of(1, 0), 0), (frames_of(1, 1), -1)],
        [(frames_of(35, 2)[-three:], 0)],
        [(frames_of(35, 2)[:three], -3)],
    ]
    for words, expected in zip(named, pieces, strict=True):
        (found,) = Engine(pipe).prepare([ClipRequest(**{**vars(request), **words})])[0].conditioning
        assert found is not None
        check(pipe, found, *expected)


def test_more_than_there_is_room_for_is_refused(pipe, files):
    request = ClipRequest(
        PROMPT, num_frames=pipe.autoencoder.shortest_clip(8), cond_type="v2v_head", reference_path=(files["short"],)
    )
    with pytest.raises(OpenSoraError, match="nothing is left to make"):
        Engine(pipe).prepare([request])


def test_frames_that_repeat_a_picture_are_left_out():
    """A latent frame of the deep compression autoencoder stands for four, also where it is a picture."""
    pipe, size = make_pipeline(make_autoencoder("dc-ae"), num_inference_steps=1), VideoSize(12, HEIGHT, WIDTH)
    first, last = (to_video(frames_of(1, seed)) for seed in (0, 1))

    def made(**words: Any) -> Tensor:
        given = condition(pipe.autoencoder, size, alone=True, **words)
        looped = generate_loops(
            pipe, PROMPT, num_loops=1, size=size, conditioning=lambda _loop: given, generator=seeded(0)
        ).frames
        whole = pipe(PROMPT, num_frames=12, conditioning=given, generator=seeded(0), output_type="pt").frames
        head, tail = 3 * ("image" in words), 3 * ("last_image" in words)
        assert whole.shape[1] == 12 and torch.equal(looped, whole[:, head : 12 - tail])
        return looped

    assert made(image=first).shape[1] == made(last_image=last).shape[1] == 9
    assert made(image=first, last_image=last).shape[1] == 6
    assert made(extend=torch.cat([first] * 8, dim=1), condition_frames=2).shape[1] == 12


def test_a_long_video_goes_on_from_frames_that_are_encoded_alone(pipe):
    """Each loop is as long as the model makes it, but for the frames that come twice."""
    size, carried = VideoSize(pipe.autoencoder.shortest_clip(4), HEIGHT, WIDTH), 2
    options: dict[str, Any] = {"num_loops": 2, "size": size, "condition_frames": carried, "num_inference_steps": 1}
    frames = generate_loops(pipe, PROMPT, generator=seeded(0), **options).frames
    again, taken = seeded(0), pipe.autoencoder.shortest_clip(carried)
    call: dict[str, Any] = {"num_frames": size.num_frames, "num_inference_steps": 1, "output_type": "pt"}
    first = pipe(PROMPT, generator=again, **call).frames
    end = encode_alone(pipe.autoencoder, first[:, -taken:].transpose(1, 2) * 2 - 1)
    given = FrameConditioning.none(pipe.autoencoder, size).put(end, 0)
    second = pipe(PROMPT, generator=again, conditioning=given, **call).frames
    repeated = pipe.autoencoder.frames_before(carried, size.num_frames)
    torch.testing.assert_close(frames, torch.cat([first, second[:, repeated:]], dim=1))


# --- batches and ranks ------------------------------------------------------------------------------------------------


def rows(pipe: OpenSoraPipeline, num_latents: int = 6) -> list[FrameConditioning]:
    """Nothing, a picture at the head, one at the tail, and a clip at the head."""
    none = FrameConditioning.none(pipe.autoencoder, VideoSize(pipe.autoencoder.shortest_clip(num_latents), 16, 24))
    latents = torch.randn(none.latents.shape, generator=torch.Generator().manual_seed(5))
    return [none, none.put(latents[:, :, :1], 0), none.put(latents[:, :, -1:], 5), none.put(latents[:, :, :3], 0)]


def sampled(pipe: OpenSoraPipeline, given: FrameConditioning, *seeds: int) -> Tensor:
    """Latents after some guided steps and some that are not."""
    num_frames = pipe.autoencoder.shortest_clip(given.latents.shape[2])
    return pipe(
        [PROMPT] * len(seeds), num_frames=num_frames, conditioning=given, generator=seeded(*seeds),
        num_inference_steps=13, output_type="latent",
    ).frames  # fmt: skip


def joined(given: list[FrameConditioning]) -> FrameConditioning:
    return FrameConditioning(torch.cat([row.latents for row in given]), torch.cat([row.strength for row in given]))


def test_every_clip_of_a_batch_has_conditions_of_its_own(pipe):
    given = rows(pipe)
    together = sampled(pipe, joined(given), 0, 1, 2, 3)
    for seed, row in enumerate(given):
        alone = sampled(pipe, row, seed)
        torch.testing.assert_close(together[seed : seed + 1], alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))
        kept = row.strength[0] == 0
        if 0 < kept.sum() < 3:  # pictures, and not clips
            assert torch.equal(alone[:, :, kept], row.latents[:, :, kept])


def share(how: dict[str, Any]) -> tuple[Tensor, list[int]]:
    pipe, batches = make_pipeline(), []
    pipe.parallelize(**how)
    pipe.transformer.register_forward_pre_hook(lambda _module, args: batches.append(len(args[0])))
    return sampled(pipe, joined(rows(pipe)), 0, 1, 2, 3), batches


@pytest.mark.multi
@pytest.mark.parametrize(("num_ranks", "how"), [(3, {}), (2, {}), (6, {"sequence": 2})], ids=["3", "2", "3 x 2"])
def test_ranks_share_three_branches(num_ranks, how):
    """With three groups each computes one branch of every step; with two, one is computed twice."""
    pipe = make_pipeline()
    alone = sampled(pipe, joined(rows(pipe)), 0, 1, 2, 3)
    for latents, batches in run_ranks(num_ranks, share, {"guidance": True, **how}):
        torch.testing.assert_close(latents, alone, rtol=1e-3, atol=1e-4 * float(alone.abs().max()))
        guided = 4 * (2 if num_ranks == 2 else 1)
        assert batches == [guided if i < 10 or i % 2 == 0 else 4 for i in range(13)]
