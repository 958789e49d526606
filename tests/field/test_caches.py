"""Caches of latents: replaced files are encoded anew and no others, copies are known, what does not fit is named."""

import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_pipeline import make_autoencoder

from opensora.clip_rows import ClipRow
from opensora.data import precompute
from opensora.data.batch import DataContext
from opensora.data.cache import Cache, Index, LatentsMadeFrom, MadeFrom
from opensora.data.cached import CachedLatents
from opensora.data.clips import ClipSource, ManifestClips
from opensora.data.file_states import FileState
from opensora.errors import OpenSoraError
from opensora.manifest import read_manifest, write_manifest
from opensora.media.write import write_video
from opensora.weights import fingerprint

BUCKETS = {"16x24": {"5": (1.0, 2)}}
NAMES = ("a.mp4", "b.mp4", "c.mp4")


def write_clip(path: Path, seed: int) -> None:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 4, 6, 3), dtype=np.uint8)
    write_video(path, coarse.repeat(8, axis=1).repeat(8, axis=2), fps=8)


class Project:
    """Clips and their cache in one folder, and which clips were read to make it."""

    def __init__(self, folder: Path, autoencoder, monkeypatch) -> None:
        self.folder, self.cache, self.autoencoder = folder, folder / "cache", autoencoder
        self.read: Counter[str] = Counter()
        real = precompute.read_clip

        def read_clip(row, *args):
            self.read[row.path.name] += 1
            return real(row, *args)

        monkeypatch.setattr(precompute, "read_clip", read_clip)

    def make(self, folder: Path | None = None, **changes) -> Index:
        """As the command does; what had to be read is in `read`."""
        self.read.clear()
        folder = folder or self.folder
        source = ClipSource(ManifestClips(BUCKETS, folder / "clips.csv", max_broken_share=1.0, num_workers=0))
        latents = LatentsMadeFrom(
            fingerprint(self.autoencoder.state_dict()),
            *("here", self.autoencoder.latent_space.to_dict(), "posterior", "float32", "float32"),
        )
        made_from = MadeFrom(precompute.hash_of(source.rows), BUCKETS, 1, "taken", 1, 0, 10**6, latents, None)
        made_from = replace(made_from, **changes)
        plan = precompute.make_plan(source, made_from, self.autoencoder, 0)
        precompute.begin(folder / "cache", source.rows, made_from)
        precompute.make_latents(folder / "cache", plan, source, self.autoencoder, made_from)
        index = precompute.finish(folder / "cache", plan, made_from)
        assert index is not None
        return index

    def latents(self, folder: Path | None = None) -> list[torch.Tensor]:
        cache = Cache(folder or self.cache)
        (key,) = cache.bucket_keys()
        frames, height, width = map(int, key.split("x"))
        bucket = SimpleNamespace(num_frames=frames, height=height, width=width)
        return [cache.posterior(cache.windows(row, bucket)[0])[0] for row in range(len(NAMES))]

    def open(self, folder: Path | None = None) -> None:
        CachedLatents(folder or self.cache).open(DataContext(autoencoder=self.autoencoder))


@pytest.fixture
def project(tmp_path, monkeypatch) -> Project:
    folder = tmp_path / "project"
    rows = []
    for seed, name in enumerate(NAMES):
        write_clip(folder / "clips" / name, seed)
        rows.append(ClipRow(folder / "clips" / name, f"clip {name}", 6, 32, 48, 8.0))
    write_manifest(folder / "clips.csv", rows)
    made = Project(folder, make_autoencoder(), monkeypatch)
    made.make()
    return made


def test_a_replaced_file_is_encoded_anew_and_no_other(project):
    before = project.latents()
    write_clip(project.folder / "clips" / "b.mp4", 9)
    with pytest.raises(OpenSoraError, match=r"1 of 3 clips were replaced, such as \.\./clips/b\.mp4; run opensora"):
        project.open()
    index = project.make()
    assert project.read == {"b.mp4": 1} and index.num_latents == 3
    after = project.latents()
    assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2])
    assert not torch.allclose(before[1], after[1], atol=1e-2)
    project.open()
    project.make()
    assert not project.read, "and then it is known"


def test_a_replaced_file_of_the_same_size_is_noticed_by_its_content(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"one")
    state = FileState.of(path)
    os.utime(path, (1, 1))
    assert not state.differs_from(path), "another time alone is no other file"
    path.write_bytes(b"two")
    os.utime(path, (1, 1))
    assert state.differs_from(path)
    path.unlink()
    assert not state.differs_from(path), "what is gone cannot be asked"
    assert FileState.noted(state.to_note()) == state
    assert FileState.noted({}) is None and FileState.noted({"size_bytes": []}) is None


def test_copied_and_moved_folders_need_no_new_cache(project, tmp_path):
    for path in (project.folder / "clips").iterdir():
        os.utime(path, (1, 1))
    project.make()
    assert not project.read
    shutil.copytree(project.folder, tmp_path / "copy")  # with new times
    shutil.move(project.folder, tmp_path / "moved")
    for folder in (tmp_path / "copy", tmp_path / "moved"):
        project.make(folder)
        assert not project.read
        project.open(folder / "cache")
        assert [row.path.exists() for row in Cache(folder / "cache").rows] == [True] * 3
    write_clip(tmp_path / "moved" / "clips" / "a.mp4", 9)
    with pytest.raises(OpenSoraError, match="1 of 3 clips were replaced"):
        project.open(tmp_path / "moved" / "cache")
    project.open(tmp_path / "copy" / "cache")
    shutil.rmtree(tmp_path / "copy" / "clips")
    project.open(tmp_path / "copy" / "cache")  # training from a cache needs no clips


def test_what_could_not_be_read_is_encoded_when_it_can_and_nothing_else(project, tmp_path):
    shutil.rmtree(project.cache)
    away = (project.folder / "clips" / "c.mp4").rename(tmp_path / "away.mp4")
    assert [clip.row for clip in project.make().failed] == [2]
    away.rename(project.folder / "clips" / "c.mp4")
    index = project.make()
    assert project.read == {"c.mp4": 1} and not index.failed and index.num_latents == 3


def test_a_cache_made_before_files_were_noted_is_still_read(project):
    from opensora.data.shards import read_note, write_shard

    for shard in Cache(project.cache).index.latents:
        note = read_note(project.cache / shard)
        reader = precompute.ShardReader(project.cache)
        tensors = {f"{i}.{n}": reader.read(shard, f"{i}.{n}") for i in range(3) for n in ("mean", "logvar")}
        old = [{key: clip[key] for key in ("row", "path", "first_frame", "fps")} for clip in note["clips"]]
        write_shard(project.cache / shard, tensors, {**note, "clips": old})
    project.open()
    project.make()
    assert not project.read


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [replace(rows[0], text="other words"), *rows[1:]], "text of a.mp4 is 'other words' (was 'clip a"),
        (lambda rows: [*rows[:2], replace(rows[2], num_frames=7)], "num_frames of c.mp4 is 7 (was 6)"),
        (lambda rows: rows[:2], "2 clips (were 3), c.mp4 is gone"),
        (
            lambda rows: [*rows, replace(rows[0], path=rows[0].path.with_name("d.mp4"))],
            "4 clips (were 3), d.mp4 is new",
        ),
        (lambda rows: [rows[1], rows[0], rows[2]], "the clips are in another order"),
    ],
)
def test_what_differs_is_named_clip_by_clip(project, change, message):
    rows = list(read_manifest(project.folder / "clips.csv").rows)
    write_manifest(project.folder / "clips.csv", change(rows))
    with pytest.raises(OpenSoraError) as caught:
        project.make()
    assert f"made otherwise: {message}" in str(caught.value) and "\n" not in str(caught.value)


def test_a_setting_that_differs_is_named(project):
    with pytest.raises(OpenSoraError, match=r"made otherwise: seed is 5 \(was 0\)"):
        project.make(seed=5)
