"""Sizes by pixels and aspect ratio, against the reference of 2.0."""

import pytest
import torch

from opensora.data.buckets import Buckets
from opensora.errors import OpenSoraError
from opensora.geometry import SizeRule, image_size, num_pixels, resolve_image_size
from opensora.models.autoencoders.dc_ae import VideoDCAutoencoder
from opensora.models.autoencoders.hunyuan import HunyuanVideoAutoencoder
from opensora.pixel_grid import closest_ratio, grid_sizes, training_grid_sizes


def as_lists(sizes: dict[str, tuple[int, int]]) -> dict[str, list[int]]:
    return {name: list(size) for name, size in sizes.items()}


def test_every_size_of_every_resolution(golden_json):
    compared = 0
    for name, expected in golden_json("sizes_v2_0").items():
        if not isinstance(expected, dict) or "pixels" not in expected:
            continue
        cell, pixels = int(name.split("|")[0][1:]), num_pixels(name.split("|")[1])
        assert pixels == expected["pixels"]
        assert as_lists(grid_sizes(pixels, cell)) == expected["inference"]
        assert as_lists(training_grid_sizes(pixels, cell)) == expected["training"]
        tokens = {name: h * w // cell**2 for name, (h, w) in grid_sizes(pixels, cell).items()}
        assert tokens == expected["tokens"]
        compared += 1
    assert compared


def test_sizes_asked_for_by_name(golden_json):
    for name, expected in golden_json("sizes_v2_0")["sanitize"].items():
        resolution, ratio = name.split("|")
        assert list(grid_sizes(num_pixels(resolution), 16)[ratio]) == expected


def test_the_tables_of_training_and_sampling(golden_json):
    functions = golden_json("aspect_fn_v2_0")
    for kind, cell in (("ratios_dict", 16), ("ratios_dict_D32", 32)):
        for key, expected in functions[kind].items():
            pixels, training = key.split("|")
            sizes = training_grid_sizes if training == "True" else grid_sizes
            assert as_lists(sizes(int(pixels), cell)) == expected
    for kind, sizes in (("image_size_train", training_grid_sizes), ("image_size_infer", grid_sizes)):
        for key, expected in functions[kind].items():
            resolution, ratio = key.split("|")
            size = sizes(num_pixels(resolution), 16).get(ratio)  # a size that another ratio has too is dropped
            assert size is None if isinstance(expected, str) else list(size or ()) == expected
    for resolution, (pixels, expected) in functions["resolution"].items():
        side, _, one_ratio = resolution.partition("_ar")
        known = as_lists(training_grid_sizes(num_pixels(side.removesuffix("_max")), 16))
        assert num_pixels(side.removesuffix("_max")) == pixels
        if side.endswith("_max"):  # one ratio of a table that nothing names
            assert expected == {"4:3": known["4:3"]}
        else:
            assert expected == ({one_ratio: known[one_ratio]} if one_ratio else known)


def test_latents_of_a_size(golden_json):
    """Sizes off the grid, which the reference rounds up to whole cells, are refused."""
    with torch.device("meta"):
        autoencoders = {16: HunyuanVideoAutoencoder(), 32: VideoDCAutoencoder()}
    compared = 0
    for name, sizes in golden_json("sizes_v2_0").items():
        if "|noise_hw|" not in name:
            continue
        cell, height = int(name.split("|")[0][1:]), int(name.split("|")[2])
        autoencoder, one_patch = autoencoders[cell], sizes["1"]
        assert sizes["2"] == [*one_patch[:3], *(2 * side for side in one_patch[3:])]
        assert one_patch == [1, 2, 2, -(-height // cell), -(-2 * height // cell)]
        if height % cell:
            with pytest.raises(OpenSoraError, match="multiple of"):
                autoencoder.latent_size((autoencoder.shortest_clip(2), height, 2 * height))
            continue
        patch = cell // autoencoder.spatial_factor
        size = autoencoder.shortest_clip(2), height, 2 * height
        assert list(autoencoder.latent_size(size)) == sizes[str(patch)][2:]
        compared += 1
    assert compared


@pytest.mark.parametrize(("cell", "resolution"), [(16, "256px"), (32, "256px_32d")])
def test_shapes_of_batches(cell, resolution, golden_json):
    buckets = Buckets({resolution: {"1": (1.0, 3), "33": (1.0, 2)}}).buckets
    ours = [[bucket.batch_size, 3, bucket.num_frames, bucket.height, bucket.width] for bucket in buckets]
    assert sorted(ours) == sorted(golden_json("sizes_v2_0")[f"D{cell}|shapes"])


def test_the_nearest_ratio(golden_json):
    asked = [(16, size, ratio) for size, ratio in golden_json("aspect_fn_v2_0")["closest_ratio"].items()]
    for name, ratio in golden_json("sizes_v2_0").items():
        if "|closest|" in name:
            cell, _, size = name.split("|")
            asked.append((int(cell[1:]), size, ratio))
    assert {cell for cell, *_ in asked} == {16, 32}
    for cell, size, expected in asked:
        height, width = map(int, size.split("x"))
        assert closest_ratio(training_grid_sizes(768**2, cell), height, width) == expected


def test_a_resolution_by_pixels_is_asked_for_like_any_other():
    default, rule = (192, 336), SizeRule(8)
    assert resolve_image_size(default, resolution="768px", rule=rule) == (576, 1024)
    assert resolve_image_size(default, resolution="768px", aspect_ratio="1:1", rule=rule) == (768, 768)
    assert resolve_image_size(default, resolution="256px", aspect_ratio="9:16", rule=SizeRule(32)) == (320, 192)
    assert image_size("256px", "9:16", "height:width") == (192, 336)
    with pytest.raises(OpenSoraError, match=r"resolution 256px has no aspect ratio 4:1"):
        image_size("256px", "4:1")
    with pytest.raises(OpenSoraError, match="too few for"):
        resolve_image_size(default, resolution="5px", rule=rule)
