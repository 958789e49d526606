"""Parts of published models on this machine: what the cache of the Hub holds of them, and fetching what it does not.

Looking touches the disk only. `download_repository` is the one function of this package that fetches files, and is
called for nothing but a download that was asked for.
"""

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opensora.checkpoints.published_parts import PublishedPart
from opensora.contents import read_object
from opensora.errors import OpenSoraError

# "somebody/model", or with a branch, a tag or a commit behind it: "somebody/model@v2", "somebody/model@refs/pr/1".
_REPOSITORY = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w.-]*(?:/\w[\w.-]*)*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class CachedPart:
    """What of a part lies in the cache.

    Attributes:
        folder: the repository's snapshot; None if nothing of the repository is there.
        files: those of the part that are there.
        missing: names or patterns of those that are not.
    """

    folder: Path | None
    files: tuple[Path, ...]
    missing: tuple[str, ...]

    @property
    def complete(self) -> bool:
        return not self.missing

    @property
    def size_bytes(self) -> int:
        """Of the files that are there."""
        return sum(file.stat().st_size for file in self.files)

    def missing_bytes(self, part: PublishedPart) -> int:
        """Of the files that are not, about."""
        return 0 if self.complete else max(part.size_bytes - self.size_bytes, 0)


def look_up(part: PublishedPart, cache_dir: Path | None = None) -> CachedPart:
    """What the local cache holds of a part.

    Args:
        part: of a published model.
        cache_dir: the cache's folder; None for the one that huggingface_hub uses.
    """
    folder = snapshot(part.repository, cache_dir)
    if folder is None:
        return CachedPart(None, (), part.files)
    files: list[Path] = []
    missing: list[str] = []
    for pattern in part.files:
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        files += found
        if not found:
            missing.append(pattern)
    missing += _missing_shards(files)
    return CachedPart(folder, tuple(files), tuple(missing))


def split_revision(name: str) -> tuple[str, str | None] | None:
    """`"somebody/model@v2"` -> "somebody/model" and "v2"; without a revision None for it, and None for other names."""
    match = _REPOSITORY.fullmatch(name)
    return (match[1], match[2]) if match else None


def snapshot(name: str, cache_dir: Path | None = None) -> Path | None:
    """The folder that the cache keeps a repository in; None if it holds nothing of that.

    Args:
        name: of the repository, with a revision if it is another than the main branch.
        cache_dir: see `look_up`.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    repository, revision = split_revision(name) or (name, None)
    stored = Path(cache_dir or constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")
    try:
        commit = (stored / "refs" / (revision or "main")).read_text(encoding="utf-8").strip()
    except OSError:
        if revision is None or not _COMMIT.fullmatch(revision):
            return None
        commit = revision
    folder = stored / "snapshots" / commit
    return folder if folder.is_dir() else None


def part_path(part: PublishedPart, cached: CachedPart) -> Path | None:
    """Folder or file to load a part from; None if the cache does not hold all of it."""
    if cached.folder is None or not cached.complete:
        return None
    return cached.folder / part.lone_file if part.lone_file else cached.folder


def download(part: PublishedPart, cache_dir: Path | None = None) -> CachedPart:
    """Fetches what the cache lacks of a part, and nothing else of its repository; shows its progress on stderr.

    Raises:
        OpenSoraError: it could not be fetched, or the repository does not hold it.
    """
    download_repository(part.repository, part.files, cache_dir)
    cached = look_up(part, cache_dir)
    if not cached.complete:
        raise OpenSoraError(f"{part.repository} was fetched, but holds no {', '.join(cached.missing)}")
    return cached


def download_repository(name: str, files: Sequence[str] | None = None, cache_dir: Path | None = None) -> None:
    """Fetches what the cache lacks of a repository; shows its progress on stderr.

    Args:
        name: of the repository on the Hub, with a revision if it is another than the main branch.
        files: names or patterns of those that are needed; None for all.
        cache_dir: see `look_up`.

    Raises:
        OpenSoraError: it could not be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = None if files is None else list(files)
    repository, revision = split_revision(name) or (name, None)
    try:
        snapshot_download(repository, revision=revision, allow_patterns=patterns, cache_dir=cache_dir)
    except (OSError, HFValidationError) as error:  # no connection, no access, no such repository, no space left
        raise OpenSoraError(f"{name} could not be fetched: {' '.join(str(error).split())}") from error


def fetch_command(part: PublishedPart) -> str:
    """The command line of huggingface_hub that fetches a part."""
    return repository_command(part.repository, part.files)


def repository_command(name: str, files: Sequence[str] = ()) -> str:
    """The command line of huggingface_hub that fetches a repository, or files of it."""
    repository, revision = split_revision(name) or (name, None)
    names = [f"--include '{file}'" if "*" in file else file for file in files]
    return " ".join(["hf download", repository, *(["--revision", revision] if revision else []), *names])


def gigabytes(size_bytes: float) -> str:
    """`"4.8 GB"`; what is below 0.1 GB in MB."""
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.1f} MB"


def content_hash(file: Path) -> str | None:
    """SHA-256 of a file of the cache, which names large ones by it; None for all others."""
    name = file.resolve().name
    return name if file.is_symlink() and len(name) == 64 and set(name) <= set("0123456789abcdef") else None


def _missing_shards(files: list[Path]) -> list[str]:
    """Shards that are not among the files, and the index where shards lack one."""
    names = {file.name for file in files}
    missing: list[str] = []
    indices = [file for file in files if file.name.endswith(".index.json")]
    for index in indices:
        try:
            shards = set(read_object(index)["weight_map"].values())
        except (ValueError, LookupError, AttributeError, TypeError):
            missing.append(index.name)
            continue
        missing += sorted(shards - names)
    if not indices and fnmatch.filter(names, "*-of-*"):
        missing.append("*.index.json")
    return missing
