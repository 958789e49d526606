"""What a file is told by its content, whatever its name says."""

import gzip
import io
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from opensora.contents import describe_kind, kind_of
from opensora.errors import OpenSoraError
from opensora.media.write import write_video


def _archive() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("weights/readme.txt", "hello")
    return content.getvalue()


def _tar() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    return content.getvalue()


def _torch(zipped: bool) -> bytes:
    content = io.BytesIO()
    torch.save({"a": torch.ones(2)}, content, _use_new_zipfile_serialization=zipped)
    return content.getvalue()


def _picture(file_format: str) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, file_format)
    return content.getvalue()


FILES = {
    "empty": [b""],
    "safetensors": [save({"a": torch.ones(2)})],
    "torch zip": [_torch(True), _torch(True)[:300]],
    "pickle": [_torch(False), pickle.dumps([1])],
    "zip": [_archive()],
    "gzip": [gzip.compress(b"hello")],
    "tar": [_tar()],
    "7z": [b"7z\xbc\xaf\x27\x1c\x00\x04" + bytes(40)],
    "gguf": [b"GGUF\x03\x00\x00\x00" + bytes(16)],
    "git-lfs pointer": [b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"],
    "web page": [b"<!DOCTYPE html><html></html>", b"\n <HTML lang=en>", b"<?xml version='1.0'?><Error/>"],
    "image": [_picture(name) for name in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")],
    "json": [b'{"a": 1}', b"\xef\xbb\xbf [1]"],
    "text": [b"a cat", "ein Bär".encode("latin-1"), "一只猫".encode(), b"BM is a word", b"GIF89a too", b"G"],
    "unknown": [bytes(range(256))[1:] * 3],
}


@pytest.mark.parametrize(("kind", "number"), [(kind, i) for kind, files in FILES.items() for i in range(len(files))])
def test_the_kind_is_told_by_content_under_a_name_that_lies(tmp_path, kind, number):
    path = tmp_path / "model.safetensors"
    path.write_bytes(FILES[kind][number])
    assert kind_of(path) == kind
    assert "\n" not in describe_kind(kind)


def test_clips_are_videos(tmp_path):
    frames = np.zeros((3, 16, 16, 3), np.uint8)
    write_video(tmp_path / "clip.mp4", frames, 8)
    write_video(tmp_path / "clip.webp", frames, 8)
    assert kind_of(tmp_path / "clip.mp4") == "video"
    assert kind_of(tmp_path / "clip.webp") == "image"


def test_what_is_no_file_has_no_kind(tmp_path):
    with pytest.raises(OpenSoraError, match="is a folder"):
        kind_of(tmp_path)
