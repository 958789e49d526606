"""The toy world: what is drawn, what moves how, what is held out."""

import dataclasses
import itertools

import pytest
import torch

from opensora.errors import OpenSoraError
from opensora.toybox.backgrounds import PAINTERS
from opensora.toybox.specs import (
    BACKGROUNDS,
    CAMERAS,
    COLOURS,
    EASY_WORLD,
    FULL_WORLD,
    MOTIONS,
    SHAPES,
    SIZES,
    SPEEDS,
    ClipSpec,
    Thing,
    World,
    is_held_out,
    sample_specs,
)
from opensora.toybox.world import GROWTH, TRAVEL, render


def clip(**changes) -> ClipSpec:
    words = {"shape": "ball", "colour": "red", "size": "small", "motion": "still", "speed": "fast"}
    return ClipSpec(**{**words, "background": "white", **changes})


def centres(mask: torch.Tensor) -> torch.Tensor:
    """Centre of mass of each frame of a mask (1, 1, T, H, W) as (T, 2): x, y in pixels."""
    weights = mask[0, 0] / mask[0, 0].sum(dim=(1, 2), keepdim=True)
    x = (weights.sum(dim=1) * torch.arange(mask.shape[-1])).sum(dim=1)
    y = (weights.sum(dim=2) * torch.arange(mask.shape[-2])).sum(dim=1)
    return torch.stack([x, y], dim=1)


FAINT = 0.35  # a sharp tip's anti-aliasing reaches a little beyond the tip itself


def edge_cover(mask: torch.Tensor) -> float:
    """The largest cover of any pixel on the picture's edge."""
    return float(torch.maximum(mask[..., [0, -1], :].amax(), mask[..., [0, -1]].amax()))


def test_video_and_mask_have_the_promised_shapes_and_ranges():
    video, mask = render(sample_specs(7, 0, FULL_WORLD), num_frames=5, height=48, width=80)
    assert video.shape == (7, 3, 5, 48, 80)
    assert mask.shape == (7, 1, 5, 48, 80)
    assert video.abs().max() <= 1
    assert mask.min() == 0
    assert mask.amax(dim=(1, 2, 3, 4)).eq(1).all()


def test_a_clip_is_the_same_alone_and_in_a_batch_and_in_given_memory():
    specs = sample_specs(6, 1, FULL_WORLD)
    video, mask = render(specs, num_frames=4)
    alone, _ = render(specs[3:4], num_frames=4)
    assert torch.equal(video[3:4], alone)
    out = (torch.full_like(video, 9.0), torch.full_like(mask, 9.0))
    render(specs, num_frames=4, out=out)
    assert torch.equal(out[0], video)
    assert torch.equal(out[1], mask)


@pytest.mark.parametrize("world", [World(), FULL_WORLD, World(second=1.0), World(camera=1.0)])
@pytest.mark.parametrize("size", [(64, 64), (96, 48)])
def test_objects_stay_off_the_edge_in_every_frame(world: World, size: tuple[int, int]):
    _, mask = render(sample_specs(60, 2, world, "all"), num_frames=9, height=size[0], width=size[1])
    assert edge_cover(mask) < FAINT


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("motion", MOTIONS)
def test_extreme_places_stay_off_the_edge(shape: str, motion: str):
    corners = list(itertools.product((-1.0, 1.0), repeat=2))
    specs = [
        clip(shape=shape, motion=motion, size="large", x=x, y=y, camera=camera)
        for (x, y), camera in itertools.product(corners, CAMERAS)
    ]
    _, mask = render(specs, num_frames=9)
    assert edge_cover(mask) < FAINT


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize(("motion", "way"), [("left", (-1, 0)), ("right", (1, 0)), ("up", (0, -1)), ("down", (0, 1))])
def test_travel_covers_the_stated_distance(motion: str, way: tuple[int, int], speed: str):
    for scale in (1, 2):
        _, mask = render([clip(motion=motion, speed=speed)], height=64 * scale, width=64 * scale)
        path = centres(mask)
        expected = scale * TRAVEL[speed] * torch.tensor(way, dtype=torch.float32)
        torch.testing.assert_close(path[-1] - path[0], expected, atol=0.02 * scale, rtol=0)


@pytest.mark.parametrize("speed", SPEEDS)
def test_motions_end_where_they_should(speed: str):
    def area(motion: str) -> torch.Tensor:
        return render([clip(motion=motion, speed=speed)])[1].sum(dim=(0, 1, 3, 4))

    grown = area("grow")
    assert (grown[-1] / grown[0]).sqrt() == pytest.approx(GROWTH[speed], rel=1e-2)
    shrunk = area("shrink")
    assert (shrunk[0] / shrunk[-1]).sqrt() == pytest.approx(GROWTH[speed], rel=1e-2)
    bounce = centres(render([clip(motion="bounce", speed=speed)])[1])
    torch.testing.assert_close(bounce[0], bounce[-1], atol=1e-2, rtol=0)
    assert bounce[0, 1] - bounce[:, 1].min() == pytest.approx(17, abs=0.1)
    orbit = centres(render([clip(motion="orbit", speed=speed)])[1]) - 31.5
    torch.testing.assert_close(orbit.norm(dim=1), torch.full((17,), 9.0), atol=2e-2, rtol=0)
    still, _ = render([clip(motion="still", speed=speed)])
    assert torch.equal(still[:, :, :1].expand_as(still), still)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_spin_shows(shape: str):
    video, _ = render([clip(shape=shape, motion="spin")])
    change = (video[:, :, 1:] - video[:, :, :-1]).abs().amax(dim=(0, 1, 3, 4))
    assert change.min() > 0.2


@pytest.mark.parametrize(
    ("shape", "area"), [("ball", 3.1416), ("square", 1.54**2), ("cross", 4 * 0.98 * 0.72 - 0.72**2)]
)
def test_areas_are_those_of_geometry(shape: str, area: float):
    for size, radius in SIZES.items():
        _, mask = render([clip(shape=shape, size=size)], num_frames=1, height=256, width=256)
        assert mask.sum() / (4 * radius) ** 2 == pytest.approx(area, rel=5e-3)


def test_every_shape_colour_and_background_looks_different():
    specs = [clip(shape=s, colour=c) for s, c in itertools.product(SHAPES, COLOURS)]
    assert tuple(PAINTERS) == BACKGROUNDS
    specs += [clip(background=b) for b in BACKGROUNDS]
    video, _ = render(specs, num_frames=1)
    flat = video.flatten(1)
    apart = torch.cdist(flat, flat) + torch.eye(len(flat)) * 100
    apart[SHAPES.index("ball"), len(SHAPES) * len(COLOURS)] = 100  # the red ball on white stands in both lists
    apart[len(SHAPES) * len(COLOURS), SHAPES.index("ball")] = 100
    assert apart.min() > 5


def test_a_second_object_is_drawn_beside_the_first():
    second = Thing(shape="square", colour="blue", size="large", motion="up", speed="slow")
    _, mask = render([clip(second=second, shape="square", size="large", motion="down", speed="slow")], num_frames=3)
    left, right = mask[..., :32].sum(), mask[..., 32:].sum()
    torch.testing.assert_close(left, right)


def test_the_camera_moves_background_and_object_alike():
    video, mask = render([clip(camera="pan left", background="grass")], num_frames=5)
    still, _ = render([clip(background="grass")], num_frames=5)
    assert centres(mask)[-1, 0] - centres(mask)[0, 0] == pytest.approx(8, abs=0.05)
    assert not torch.equal(video[:, :, 0, :8, :8], video[:, :, -1, :8, :8])
    assert torch.equal(still[:, :, 0], still[:, :, -1])
    zoomed, mask = render([clip(camera="zoom in", background="grass")], num_frames=5)
    area = mask.sum(dim=(0, 1, 3, 4))
    assert (area[-1] / area[0]).sqrt() == pytest.approx(1.2, rel=1e-2)
    assert zoomed.shape == video.shape


FIRST_HELD_OUT = {"shape": "triangle", "colour": "red", "motion": "still", "background": "white"}


def test_samples_are_reproducible_and_a_longer_list_begins_like_a_shorter_one():
    assert sample_specs(20, 5)[:10] == sample_specs(10, 5)
    assert sample_specs(10, 5) != sample_specs(10, 6)
    first = dataclasses.asdict(sample_specs(1, 0, EASY_WORLD, "held_out")[0])
    assert {name: first[name] for name in ("shape", "colour", "motion", "background")} == FIRST_HELD_OUT


def test_fifteen_percent_of_triples_are_held_out_and_every_pair_stays_known():
    triples = list(itertools.product(SHAPES, COLOURS, MOTIONS))
    for shapes in (SHAPES, EASY_WORLD.shapes):
        chosen = [t for t in triples if t[0] in shapes]
        held_out = [is_held_out(*t) for t in chosen]
        assert sum(held_out) / len(held_out) == pytest.approx(0.15, abs=0.005)
        for kept in ((0, 1), (0, 2), (1, 2)):
            groups: dict[tuple[str, ...], list[bool]] = {}
            for triple, out in zip(chosen, held_out, strict=True):
                groups.setdefault(tuple(triple[i] for i in kept), []).append(out)
            assert max(sum(group) / len(group) for group in groups.values()) <= 0.4


def test_splits_never_share_a_triple():
    def triples(split):
        things = sample_specs(400, 3, EASY_WORLD, split)
        return {(s.shape, s.colour, s.motion) for s in things}

    assert all(is_held_out(*t) for t in triples("held_out"))
    assert not any(is_held_out(*t) for t in triples("train"))
    assert all(s.shape != "star" for s in sample_specs(200, 0, EASY_WORLD))
    specs = sample_specs(400, 3, World(second=1.0))
    assert not any(is_held_out(s.second.shape, s.second.colour, s.second.motion) for s in specs if s.second)


def test_an_unknown_split_and_an_empty_one_are_refused():
    with pytest.raises(OpenSoraError, match="test"):
        sample_specs(1, 0, EASY_WORLD, "test")  # type: ignore[arg-type]
    known = World(shapes=("ball",), colours=("red",), motions=("bounce",))
    split = "train" if is_held_out("ball", "red", "bounce") else "held_out"
    with pytest.raises(OpenSoraError, match=split):
        sample_specs(1, 0, known, split)
