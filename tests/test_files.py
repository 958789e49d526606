"""Files are written whole or not at all, and places that cannot be written are found before the work."""

import pytest

from opensora.errors import OpenSoraError
from opensora.files import check_writable, replacing


def test_a_file_is_replaced_whole_and_its_folder_made(tmp_path):
    path = tmp_path / "new" / "a.txt"
    for text in ["one", "two"]:
        with replacing(path) as temporary:
            assert temporary.parent == path.parent and temporary != path
            temporary.write_text(text)
        assert path.read_text() == text and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interruption_leaves_the_old_file_and_no_half_one(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises((KeyboardInterrupt, OSError)), replacing(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_unwritable_places(tmp_path):
    (tmp_path / "file").write_text("")
    for path in [tmp_path, tmp_path / "file" / "a.mp4", "/proc/nowhere/a.mp4", tmp_path / ("a" * 300)]:
        with pytest.raises(OpenSoraError, match=r"^output [^\n]*$"):
            check_writable(path)
    check_writable(tmp_path / "new" / "folder" / "a.mp4")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
