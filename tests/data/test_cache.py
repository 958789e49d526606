"""Caches of latents and text: what they hold, resuming, sharing the work, and what they are refused for."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_pipeline import make_autoencoder, make_text_encoder

from opensora.data import precompute
from opensora.data.batch import DataContext
from opensora.data.cache import INDEX, Cache, LatentsMadeFrom, MadeFrom, TextMadeFrom
from opensora.data.cached import CachedLatents
from opensora.data.clips import ClipSource, ManifestClips, read_clip
from opensora.data.encoding import EncodedClips
from opensora.data.shards import ShardReader, read_note, write_shard
from opensora.distributed.seeding import BatchKey
from opensora.errors import OpenSoraError
from opensora.manifest import ClipRow, write_manifest
from opensora.media.write import write_video
from opensora.models.autoencoders.latent_space import LatentSpace
from opensora.models.autoencoders.video import VideoAutoencoder
from opensora.models.text.conditioner import T5Conditioner, TextStates
from opensora.toybox.captions import MAX_TOKENS, build_tokenizer
from opensora.weights import fingerprint

BUCKETS = {"16x24": {"1": (1.0, 2), "5": (1.0, 2)}}
WORDS = ("a small red ball", "a large blue square on the sand", "a green ring", "a small white cross moves up")


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Four clips of exactly one window, an image, one clip that is damaged and one that is too short."""
    rng, rows = np.random.default_rng(0), []
    lengths = {"a.mp4": 6, "b.mp4": 6, "ü c.mp4": 6, "d.mp4": 6, "image.png": 1, "damaged.mp4": 6, "short.mp4": 3}
    for (name, length), text in zip(lengths.items(), (*WORDS, *WORDS), strict=False):
        path = tmp_path / "clips" / name
        coarse = rng.integers(0, 256, (length, 4, 6, 3), dtype=np.uint8)
        write_video(path, coarse.repeat(8, axis=1).repeat(8, axis=2), fps=8)
        rows.append(ClipRow(path, text, length, 32, 48, None if length == 1 else 8.0))
        if name == "damaged.mp4":
            path.write_bytes(path.read_bytes()[:300])
    write_manifest(tmp_path / "clips.csv", rows)
    return tmp_path / "clips.csv"


@pytest.fixture
def autoencoder() -> VideoAutoencoder:
    return make_autoencoder()


class Making:
    """Makes caches of a manifest, as the command does."""

    def __init__(self, manifest: Path, autoencoder: VideoAutoencoder, **changes) -> None:
        self.autoencoder = autoencoder
        self.source = ClipSource(ManifestClips(BUCKETS, manifest, max_broken_share=1.0, num_workers=0))
        self.text_encoder = make_text_encoder()
        latents = LatentsMadeFrom(
            fingerprint(autoencoder.state_dict()),
            "here",
            autoencoder.latent_space.to_dict(),
            changes.pop("contents", "posterior"),
            changes.pop("stored", "float32"),
            "float32",
        )
        text = TextMadeFrom(
            fingerprint(self.text_encoder.state_dict()), "here", MAX_TOKENS, False, "float32", "float32"
        )
        made_from = MadeFrom(precompute.hash_of(self.source.rows), BUCKETS, 1, "taken", 1, 0, 800, latents, text)
        self.made_from = replace(made_from, **changes)
        text_bytes = 0 if self.made_from.text is None else MAX_TOKENS * 16 * 4
        self.plan = precompute.make_plan(self.source, self.made_from, autoencoder, text_bytes)

    def encode(self, captions: list[str]) -> TextStates:
        components = {"tokenizer": build_tokenizer(), "text_encoder": self.text_encoder}
        return T5Conditioner(components, SimpleNamespace(max_text_tokens=MAX_TOKENS)).encode(captions)

    def run(self, folder: Path, rank: int = 0, num_ranks: int = 1, progress: Callable | None = None):
        share = {"rank": rank, "num_ranks": num_ranks, "progress": progress}
        precompute.begin(folder, self.source.rows, self.made_from)
        if self.made_from.text is not None:
            precompute.make_text(folder, self.plan, self.encode, self.made_from, **share)
        precompute.make_latents(folder, self.plan, self.source, self.autoencoder, self.made_from, **share)
        return precompute.finish(folder, self.plan, self.made_from)


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_cache_holds_every_clip_in_its_size_and_every_caption(manifest, autoencoder, tmp_path):
    making = Making(manifest, autoencoder)
    index = making.run(tmp_path / "cache")
    assert (index.num_latents, index.num_captions) == (5, 4)
    # 800 bytes hold two clips of 384.
    assert [len(shard.clips) for shard in making.plan.latents] == [2, 2, 1, 1]
    cache = Cache(tmp_path / "cache")
    bucket = making.source.buckets.buckets[making.source.buckets.possible(6, 32, 48)[0]]
    (clip,) = cache.windows(0, bucket)
    assert clip.fps == 8
    video = read_clip(making.source.rows[0], bucket, 1, random.Random(0))
    with torch.no_grad():
        posterior = autoencoder.posterior(video[None])
    mean, logvar = cache.posterior(clip)
    torch.testing.assert_close(mean, posterior.mean[0])
    torch.testing.assert_close(logvar, posterior.logvar[0])
    found, wanted = cache.text([WORDS[0], WORDS[1]]), making.encode([WORDS[0], WORDS[1]])
    assert wanted.mask is not None and found.mask is not None and found.pooled is None
    length = int(wanted.mask.sum(dim=1).max())
    assert torch.equal(found.mask, wanted.mask[:, :length])
    torch.testing.assert_close(found.states[found.mask], wanted.states[:, :length][found.mask])
    note = read_note(tmp_path / "cache" / index.latents[0])
    assert {"bucket", "label", "num_frames", "height", "width", "clips", "failed"} == set(note)
    assert {"row", "window", "path", "first_frame", "fps", "file"} == set(note["clips"][0])


def test_clips_that_cannot_be_read_are_named_and_left_out(manifest, autoencoder, tmp_path):
    index = Making(manifest, autoencoder).run(tmp_path / "cache")
    (failed,) = index.failed
    assert failed.row == 5 and failed.path.endswith("damaged.mp4") and failed.reason
    cache = Cache(tmp_path / "cache")
    assert [bool(cache._clips.get((row, key))) for row in range(7) for key in ("5x16x24",)].count(True) == 4


def test_what_is_stopped_goes_on_with_what_is_missing_and_ends_in_the_same_files(manifest, autoencoder, tmp_path):
    making = Making(manifest, autoencoder)
    making.run(tmp_path / "whole")
    wanted = files(tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Stop

    for _ in range(20):
        try:
            making.run(tmp_path / "cache", progress=stop)
        except Stop:
            assert not (tmp_path / "cache" / INDEX).exists()
            with pytest.raises(OpenSoraError, match="is not finished"):
                Cache(tmp_path / "cache")
        before = files(tmp_path / "cache")
        # A file that was cut short is made again, one that is whole is not touched.
    making.run(tmp_path / "cache")
    assert files(tmp_path / "cache") == wanted
    shard = tmp_path / "cache" / "latents" / "00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    kept = (tmp_path / "cache" / "latents" / "00000.safetensors").stat().st_mtime_ns
    making.run(tmp_path / "cache")
    assert files(tmp_path / "cache") == wanted and before.keys() <= wanted.keys()
    assert (tmp_path / "cache" / "latents" / "00000.safetensors").stat().st_mtime_ns == kept


def test_processes_that_share_the_work_make_the_same_cache(manifest, autoencoder, tmp_path):
    making = Making(manifest, autoencoder)
    making.run(tmp_path / "one")
    assert making.run(tmp_path / "three", rank=1, num_ranks=3) is None
    assert making.run(tmp_path / "three", rank=2, num_ranks=3) is None
    assert making.run(tmp_path / "three", rank=0, num_ranks=3) is not None
    assert files(tmp_path / "three") == files(tmp_path / "one")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed is 1 (was 0)"),
        ({"contents": "mean"}, "latents.contents is mean (was posterior)"),
        ({"stored": "float16"}, "latents.stored is float16 (was float32)"),
    ],
)
def test_a_cache_is_not_gone_on_with_otherwise(changes, message: str, manifest, autoencoder, tmp_path):
    Making(manifest, autoencoder).run(tmp_path / "cache")
    before = files(tmp_path / "cache")
    with pytest.raises(OpenSoraError) as error:
        Making(manifest, autoencoder, **changes).run(tmp_path / "cache")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert files(tmp_path / "cache") == before


@pytest.mark.parametrize("sample", [False, True])
def test_batches_from_a_cache_are_those_from_the_clips(sample: bool, manifest, autoencoder, tmp_path):
    making = Making(manifest, autoencoder)
    making.run(tmp_path / "cache")
    clips = EncodedClips(making.source, autoencoder, sample=sample)
    cached = CachedLatents(tmp_path / "cache", max_broken_share=1.0).open(DataContext(autoencoder, sample))
    assert cached.shapes() == clips.shapes()
    seen = set()
    for position in range(12):  # with the damaged clip's replacements
        key = BatchKey(3, position)
        cached.prefetch([key])
        wanted, found = clips.batch(key), cached.batch(key)
        assert found.captions == wanted.captions and found.label == wanted.label
        assert found.conditions.num_frames == wanted.conditions.num_frames
        torch.testing.assert_close(found.latents, wanted.latents)
        for name in ("fps", "height", "width"):
            assert torch.equal(getattr(found.conditions, name), getattr(wanted.conditions, name))
        seen |= {*found.captions, found.label}
    assert {"16x24 5f", "16x24 1f"} < seen and len(seen) == 6


def test_several_windows_of_a_long_clip_are_drawn_from(autoencoder, tmp_path):
    path, rng = tmp_path / "long.mp4", np.random.default_rng(1)
    write_video(path, rng.integers(0, 256, (40, 4, 6, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2), fps=8)
    write_manifest(tmp_path / "clips.csv", [ClipRow(path, WORDS[0], 40, 32, 48, 8.0)])
    index = Making(tmp_path / "clips.csv", autoencoder, windows=6).run(tmp_path / "cache")
    firsts = {c["first_frame"] for name in index.latents for c in read_note(tmp_path / "cache" / name)["clips"]}
    assert index.num_latents == 6 and len(firsts) > 3 and max(firsts) < 35
    cached = CachedLatents(tmp_path / "cache", num_workers=0).open(DataContext(autoencoder, False))
    drawn = {cached.batch(BatchKey(0, position)).latents[0].sum().item() for position in range(20)}
    assert len(drawn) > 3


def test_means_alone_are_refused_where_training_draws(manifest, autoencoder, tmp_path):
    Making(manifest, autoencoder, contents="mean").run(tmp_path / "cache")
    CachedLatents(tmp_path / "cache").open(DataContext(autoencoder, False)).batch(BatchKey(0, 0))
    with pytest.raises(OpenSoraError, match=r"means alone.*posterior as `contents`.*sample_posterior=false"):
        CachedLatents(tmp_path / "cache").open(DataContext(autoencoder, True))


def test_another_latent_space_or_autoencoder_is_refused_with_both_ways_out(manifest, autoencoder, tmp_path):
    Making(manifest, autoencoder).run(tmp_path / "cache")
    config = CachedLatents(tmp_path / "cache")
    other = make_autoencoder()
    other.override_latent_space(LatentSpace(scaling_factor=0.13025, trained_with="elsewhere"))
    with pytest.raises(OpenSoraError) as error:
        config.open(DataContext(other, False))
    message = str(error.value)
    assert "\n" not in message and "another latent space: scaling_factor is 1 (multiply) in the cache" in message
    assert "0.13025 (multiply) in this run" in message
    assert "opensora data precompute" in message and "train with the autoencoder that made it (here)" in message
    other = make_autoencoder()
    with torch.no_grad():
        next(other.parameters()).add_(0.1)
    with pytest.raises(OpenSoraError, match=r"another autoencoder: its weights are [0-9a-f]{12} in the cache but"):
        config.open(DataContext(other, False))
    config.open(DataContext(autoencoder, False))


def test_another_text_encoder_or_length_is_refused(manifest, autoencoder, tmp_path):
    making = Making(manifest, autoencoder)
    making.run(tmp_path / "cache")
    cache = Cache(tmp_path / "cache")
    own = fingerprint(making.text_encoder.state_dict())
    cache.check_text(own, MAX_TOKENS, False)
    cache.check_text(None, MAX_TOKENS, False)
    for given, message in (
        ((own, 300, False), "max_tokens is 24 in the cache but 300 in this run"),
        ((own, MAX_TOKENS, True), "clean is False in the cache but True in this run"),
        (("0" * 64, MAX_TOKENS, False), "another text encoder: its weights are"),
    ):
        with pytest.raises(OpenSoraError) as error:
            cache.check_text(*given)
        assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(OpenSoraError, match="does not hold the caption 'a purple hat'"):
        cache.text(["a purple hat"])
    Making(manifest, autoencoder, text=None).run(tmp_path / "textless")
    with pytest.raises(OpenSoraError, match="holds no text states"):
        Cache(tmp_path / "textless").check_text(own, MAX_TOKENS, False)


def test_other_chances_and_batch_sizes_need_no_new_cache_but_other_sizes_do(manifest, autoencoder, tmp_path):
    Making(manifest, autoencoder).run(tmp_path / "cache")
    config = CachedLatents(tmp_path / "cache", {"16x24": {"5": (0.5, 3)}})
    assert config.open(DataContext(autoencoder, False)).batch(BatchKey(0, 0)).latents.shape[0] == 3
    with pytest.raises(OpenSoraError, match=r"no clips of 16x16 5f at 16x16; make it again with these buckets"):
        CachedLatents(tmp_path / "cache", {"16x16": {"5": (1.0, 2)}}).open(DataContext(autoencoder, False))


def test_missing_and_damaged_caches_are_one_line(manifest, autoencoder, tmp_path):
    with pytest.raises(OpenSoraError, match="holds no cache"):
        Cache(tmp_path / "nowhere")
    with pytest.raises(OpenSoraError, match="no cache: name its folder"):
        CachedLatents().shapes()
    index = Making(manifest, autoencoder).run(tmp_path / "cache")
    shard = tmp_path / "cache" / index.latents[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-4])
    with pytest.raises(OpenSoraError, match=r"00000.safetensors is damaged .*the rest is kept"):
        Cache(tmp_path / "cache")
    shard.unlink()
    with pytest.raises(OpenSoraError, match=r"00000.safetensors is missing"):
        Cache(tmp_path / "cache")
    shard.write_bytes(whole)
    content = json.loads((tmp_path / "cache" / INDEX).read_text())
    (tmp_path / "cache" / INDEX).write_text(json.dumps({**content, "extra": 1}))
    with pytest.raises(OpenSoraError, match="unknown setting extra"):
        Cache(tmp_path / "cache")


def test_clips_without_any_bucket_are_nothing_to_encode(manifest, autoencoder):
    making = Making(manifest, autoencoder)
    making.source.rows = [row for row in making.source.rows if row.num_frames == 3]
    with pytest.raises(OpenSoraError, match="nothing to encode"):
        precompute.make_plan(making.source, making.made_from, autoencoder, 0)


def test_many_shards_are_read_with_few_files_open(tmp_path):
    for i in range(5):
        write_shard(tmp_path / f"{i}.safetensors", {"x": torch.full((2,), i)}, {"number": i})
    reader = ShardReader(tmp_path, most_open=2)
    for i in (0, 1, 2, 3, 4, 0, 2):
        assert reader.read(f"{i}.safetensors", "x").tolist() == [i, i]
        assert len(reader._open) <= 2
