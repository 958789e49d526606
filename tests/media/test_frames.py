"""Chosen frames are those that a full decode shows, whatever the file is made of; and what is broken is said."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from broken_clips import make_broken_clips, moving_square
from PIL import Image

from opensora.errors import OpenSoraError
from opensora.media import opening
from opensora.media import video as video_module
from opensora.media.frames import ClipFacts, ClipFile, is_picture, probe, read_frames, read_picture
from opensora.media.write import write_video

NUM_FRAMES = 50


def encode(path: Path, codec: str = "libx264", times=None, **options: str) -> Path:
    """A clip of 50 frames at 10 a second, or at these times (in hundredths of a second)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.height, stream.width = 48, 64
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 10 if path.suffix == ".avi" else 100)  # avi counts its ticks
        for index, picture in enumerate(moving_square(NUM_FRAMES)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = (10 * index if times is None else times[index]), Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def decoded(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


FILES = {
    "one group with B-frames.mp4": {},
    "short groups.mp4": {"g": "12", "bf": "3"},
    "open groups.mp4": {"x264-params": "keyint=12:open-gop=1:bframes=3"},
    "every frame a keyframe.mp4": {"g": "1"},
    "refreshed bit by bit.mp4": {"x264-params": "intra-refresh=1:keyint=12"},
    "matroska.mkv": {"g": "12", "bf": "3"},
    "no times.avi": {"codec": "mpeg4", "g": "12", "bf": "2"},
    "vp9.webm": {"codec": "libvpx-vp9", "g": "12", "deadline": "realtime", "cpu-used": "8"},
    "transport stream.ts": {"g": "12", "bf": "3"},
    "animation.gif": {"codec": "gif"},
}


@pytest.mark.parametrize("name", FILES)
def test_chosen_frames_are_those_of_a_full_decode(tmp_path, name):
    path = encode(tmp_path / name, **FILES[name])
    whole = decoded(path)
    assert len(whole) == NUM_FRAMES
    assert len({frame.tobytes() for frame in whole}) == NUM_FRAMES, "frames that look alike would prove nothing"
    for indices in ([0], [49], [7, 8, 9], [11, 12, 13], [20, 33, 47], [36], range(50), [25, 49]):
        found = list(read_frames(path, indices, NUM_FRAMES))
        np.testing.assert_array_equal(found, whole[list(indices)], err_msg=str(list(indices)))
    assert probe(path) == probe(path, "decode")
    assert (probe(path).num_frames, probe(path).height, probe(path).width) == (NUM_FRAMES, 48, 64)


def test_no_more_is_decoded_than_needed(tmp_path, monkeypatch):
    """From the keyframe before the window to its end, of a clip with a keyframe every 10 frames."""
    path = encode(tmp_path / "a.mp4", g="10", bf="0", sc_threshold="0")
    decoded_frames = []
    real_decoded = video_module._decoded

    def counting(container, stream):
        for frame in real_decoded(container, stream):
            decoded_frames.append(frame.pts)
            yield frame

    monkeypatch.setattr(video_module, "_decoded", counting)
    list(read_frames(path, [33, 35], NUM_FRAMES))
    assert len(decoded_frames) == 6  # 30 to 35


def test_written_clips_are_read_as_they_were_made(tmp_path):
    """Odd sizes, which mp4 pads; and the files of `write_video` that are no mp4."""
    rows, columns = np.indices((47, 63))
    odd = np.stack([np.stack([rows * 4, columns * 4, rows + columns], axis=2)] * 9).astype(np.uint8)
    path = write_video(tmp_path / "odd.mp4", odd, 8)
    assert probe(path) == ClipFacts(9, 47, 63, 8.0)
    (found,) = read_frames(path, [4], 9)
    assert found.shape == (47, 63, 3) and np.abs(found.astype(int) - odd[4]).mean() < 6
    for suffix in ("gif", "webp", "png"):
        path = write_video(tmp_path / f"a.{suffix}", odd, 8)
        assert probe(path) == ClipFacts(9, 47, 63, 8.0)
        assert np.abs(next(read_frames(path, [4], 9)).astype(int) - odd[4]).mean() < 6


def test_pictures(tmp_path):
    pixels = moving_square(1)[0]
    for name in ("a.png", "a.bmp", "a.tiff", "a.mp4"):
        Image.fromarray(pixels).save(tmp_path / name, format="png" if name == "a.mp4" else None)
        assert is_picture(tmp_path / name) and probe(tmp_path / name) == ClipFacts(1, 48, 64, None)
        np.testing.assert_array_equal(np.asarray(read_picture(tmp_path / name)), pixels)
    Image.fromarray(pixels).convert("P").save(tmp_path / "palette.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.jpg")
    assert read_picture(tmp_path / "palette.png").mode == read_picture(tmp_path / "grey.jpg").mode == "RGB"


def test_rotation_is_applied(tmp_path):
    """As phones note it: in the orientation tag of a photo, in the matrix of a film."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned to the right
    pixels = moving_square(1)[0]
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(read_picture(tmp_path / "a.png")), np.rot90(pixels, -1))
    assert probe(tmp_path / "a.png") == ClipFacts(1, 64, 48, None)

    path = encode(tmp_path / "a.mp4")
    upright = next(read_frames(path, [3], NUM_FRAMES))
    content = path.read_bytes()
    one, identity = 0x10000, struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    turned = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 0x40000000)
    start = content.index(b"tkhd")
    path.write_bytes(content[:start] + content[start:].replace(identity, turned, 1))
    assert probe(path) == ClipFacts(NUM_FRAMES, 64, 48, 10.0)
    np.testing.assert_array_equal(next(read_frames(path, [3], NUM_FRAMES)), np.rot90(upright, -1))


def test_broken_files_say_what_is_wrong(tmp_path):
    clips = make_broken_clips(tmp_path / "clips", num_good=1)
    for name in clips.usable:
        assert probe(clips.folder / name, "decode").height == 48
    for name, reason in clips.broken.items():
        for verify in ("count", "decode"):
            with pytest.raises(OpenSoraError, match=reason) as caught:
                probe(clips.folder / name, verify)
            assert "\n" not in str(caught.value)
    with pytest.raises(OpenSoraError, match="does not exist"):
        probe(tmp_path / "nowhere.mp4")
    with pytest.raises(OpenSoraError, match="is a folder"):
        probe(tmp_path)


@pytest.mark.parametrize("indices", [[0, 1], [55]])
def test_a_truncated_clip_is_found_wherever_the_window_lies(tmp_path, indices):
    clips = make_broken_clips(tmp_path / "clips", num_good=1)
    with pytest.raises(OpenSoraError, match=r"truncated: \d+ of 60 frames"):
        list(read_frames(clips.folder / "cut.mp4", indices, 60))


def test_fewer_frames_than_somebody_said(tmp_path):
    path = encode(tmp_path / "a.mp4")
    with pytest.raises(OpenSoraError, match="50 of 51 frames"):
        list(read_frames(path, [0], 51))


def test_damage_in_the_middle_is_found_by_decoding(tmp_path):
    path = encode(tmp_path / "a.mp4", g="10")
    content = bytearray(path.read_bytes())
    middle = content.index(b"mdat") + (len(content) - content.index(b"mdat")) // 2
    content[middle : middle + 2000] = bytes(2000)
    path.write_bytes(content)
    with pytest.raises(OpenSoraError):
        probe(path, "decode")


def test_a_stream_that_was_joined_late(tmp_path):
    """What comes before its first keyframe is nobody's frame."""
    path = encode(tmp_path / "a.ts", g="12", bf="3", sc_threshold="0")
    path.write_bytes(path.read_bytes()[188 * 40 :])  # whole packets of the transport stream
    whole = decoded(path)
    assert len(whole) < NUM_FRAMES - 5
    assert probe(path).num_frames == probe(path, "decode").num_frames == len(whole)
    indices = [0, 5, len(whole) - 1]
    np.testing.assert_array_equal(list(read_frames(path, indices, len(whole))), whole[indices])


def test_a_header_that_asks_for_too_much_memory(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4")
    monkeypatch.setattr(opening, "MOST_PIXELS", 1000)
    with pytest.raises(OpenSoraError, match="max_pixels"):
        probe(path)


def test_no_other_file_is_opened_for_one_that_names_it(tmp_path):
    """A list of segments that calls itself a clip."""
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:10,\nhttp://localhost:9/a.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(OpenSoraError):
        probe(tmp_path / "list.mp4")


@pytest.mark.slow
def test_chosen_frames_of_real_clips(real_clips):
    for path in real_clips:
        whole = np.stack(list(ClipFile(path).decode_all()))
        assert probe(path, "decode") == probe(path)
        assert probe(path).num_frames == len(whole)
        for indices in ([0], [len(whole) - 1], range(len(whole) // 2, len(whole) // 2 + 17), [len(whole) // 3]):
            found = list(read_frames(path, indices, len(whole)))
            np.testing.assert_array_equal(found, whole[list(indices)], err_msg=f"{path.name} {list(indices)}")
