"""Files are written whole or not at all, and places that cannot be written are found before the work."""

import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from opensora.errors import OpenSoraError
from opensora.files import check_writable, owned, replacing, use_default_permissions


def test_a_file_is_replaced_whole_and_its_folder_made(tmp_path):
    path = tmp_path / "new" / "a.txt"
    for text in ["one", "two"]:
        with replacing(path) as temporary:
            assert temporary.parent.parent == path.parent and temporary.suffix == temporary.parent.suffix == ".part"
            temporary.write_text(text)
        assert path.read_text() == text and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interruption_leaves_the_old_file_and_no_half_one(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises((KeyboardInterrupt, OpenSoraError)), replacing(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_has_one_owner_and_is_left_as_it_was(tmp_path):
    with owned(tmp_path / "runs" / "run"), pytest.raises(OpenSoraError, match="in use by another process"):
        with owned(tmp_path / "runs" / "run"):
            pass
    assert not (tmp_path / "runs").exists(), "it stayed empty"
    with pytest.raises(ValueError), owned(tmp_path / "run"):
        (tmp_path / "run" / "kept").touch()
        raise ValueError
    with owned(tmp_path / "run"):
        pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["kept"]


def test_unwritable_places(tmp_path):
    (tmp_path / "file").write_text("")
    for path in [tmp_path, tmp_path / "file" / "a.mp4", "/proc/nowhere/a.mp4", tmp_path / ("a" * 300)]:
        with pytest.raises(OpenSoraError, match=r"^output [^\n]*$"):
            check_writable(path)
    check_writable(tmp_path / "new" / "folder" / "a.mp4")
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_weights_can_be_read_by_whoever_reads_other_files(tmp_path):
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / "x.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    before = os.umask(0o027)
    try:
        use_default_permissions(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [file.name for file in tmp_path.rglob("*")] == ["model", "x.safetensors"]
