"""Clips of phones, cameras, screens and editors are read as players show them, for generating and training alike."""

import random
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from numbered_clips import HEIGHT, WIDTH, encode, number_of, numbered
from PIL import Image

from opensora.data.buckets import Bucket
from opensora.data.clips import read_clip
from opensora.data.scan import make_manifest
from opensora.errors import OpenSoraError
from opensora.generation.inputs import InputFiles
from opensora.generation.request import ClipRequest
from opensora.manifest import read_manifest
from opensora.media.frames import ClipFile, probe, read_frames
from opensora.media.read import read_video

ONE = 0x10000
# The matrix of a track, a b u c d v x y w, and what it does to a frame.
MATRICES = {
    "a quarter to the right": ((0, 1, -1, 0), lambda f: np.rot90(f, -1)),
    "half": ((-1, 0, 0, -1), lambda f: np.rot90(f, 2)),
    "a quarter to the left": ((0, -1, 1, 0), lambda f: np.rot90(f)),
    "mirrored": ((-1, 0, 0, 1), lambda f: f[:, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda f: f[::-1]),
    "transposed": ((0, 1, 1, 0), lambda f: f.swapaxes(0, 1)),
}


def with_matrix(path: Path, matrix: tuple[int, int, int, int]) -> None:
    a, b, c, d = (ONE * value for value in matrix)
    content = path.read_bytes()
    start, plain = content.index(b"tkhd"), struct.pack(">9i", ONE, 0, 0, 0, ONE, 0, 0, 0, 0x40000000)
    turned = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000)
    path.write_bytes(content[:start] + content[start:].replace(plain, turned, 1))


@pytest.mark.parametrize("name", MATRICES)
def test_a_phone_clip_stands_as_it_was_filmed(tmp_path, name):
    matrix, expected = MATRICES[name]
    path = encode(tmp_path / "a.mp4", numbered(5))
    plain, _ = read_video(path)
    with_matrix(path, matrix)
    frames, _ = read_video(path)
    np.testing.assert_array_equal(frames, np.stack([expected(frame) for frame in plain]))
    facts = probe(path)
    assert (facts.height, facts.width) == frames.shape[1:3]
    np.testing.assert_array_equal(next(read_frames(path, [3], 5)), frames[3])


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov"])
@pytest.mark.parametrize(("aspect", "width"), [(Fraction(4, 3), 85), (Fraction(1, 2), 32)])
def test_pixels_that_are_no_squares_are_made_so(tmp_path, suffix, aspect, width):
    """Anamorphic clips are as wide as players show them: in a manifest, in training and for generating."""
    path = encode(tmp_path / f"a.{suffix}", numbered(20), aspect=aspect)
    assert read_video(path)[0].shape == (20, HEIGHT, width, 3)
    make_manifest(tmp_path, tmp_path / "clips.csv", uncaptioned=True)
    (row,) = read_manifest(tmp_path / "clips.csv", text_required=False).rows
    assert (row.height, row.width) == (HEIGHT, width)
    video = read_clip(row, Bucket("a", 4, 1.0, 24, 24, 1), 1, random.Random(0))
    assert video.shape == (3, 4, 24, 24)
    files = InputFiles()
    clip = files[files.read(ClipRequest("a cat", extend=path)).extend]
    assert (clip.height, clip.width) == (HEIGHT, width)
    assert "its pixels are not square" in clip.clip.notes[0]


def with_edit(path: Path, skipped_s: float, lasts_s: float) -> None:
    """Shows a part of what the file stores, as editors on phones cut."""
    content = path.read_bytes()
    movie, track = (int.from_bytes(content[(at := content.index(name) + 16) : at + 4]) for name in (b"mvhd", b"mdhd"))
    at = content.index(b"elst") + 12
    edit = struct.pack(">Ii", int(lasts_s * movie), int(skipped_s * track))
    path.write_bytes(content[:at] + edit + content[at + 8 :])


def test_an_edit_list_is_no_damage(tmp_path):
    path = encode(tmp_path / "a.mp4", numbered(40), bf="0")
    with_edit(path, 2.3, 1.0)
    frames, fps = read_video(path)
    assert [number_of(frame) for frame in frames] == list(range(23, 33)) and fps == 10
    assert probe(path, "decode").num_frames == probe(path).num_frames == 10
    assert [number_of(frame) for frame in read_frames(path, [0, 9], 10)] == [23, 32]
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(OpenSoraError):
        read_video(path)


def test_a_count_that_is_only_a_header_is_no_damage(tmp_path):
    """An avi counts pictures that stand still, and some programs write any number."""
    times = [0, 100, 200, 600, *range(700, 1300, 100)]
    path = encode(tmp_path / "a.avi", numbered(10), times, codec="mpeg4", time_base=Fraction(1, 10), b="9000000")
    frames, fps = read_video(path)
    assert [number_of(frame) for frame in frames] == [0, 1, 2, 2, 2, 2, *range(3, 10)] and fps == 10
    plain = encode(tmp_path / "b.avi", numbered(10), codec="mpeg4", time_base=Fraction(1, 10), b="9000000")
    content = bytearray(plain.read_bytes())
    at = content.index(b"strh") + 40  # its length
    content[at : at + 4] = struct.pack("<I", 25)
    plain.write_bytes(content)
    assert len(read_video(plain)[0]) == 10
    plain.write_bytes(content[: len(content) // 2])
    with pytest.raises(OpenSoraError):
        read_video(plain)


FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}


@pytest.mark.parametrize(
    "name", ["a.mp4", "fragments.mp4", "a.mov", "a.mkv", "a.webm", "a.avi", "a.gif", "a.webp", "a.png"]
)
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_a_clip_that_was_cut_short_is_never_a_shorter_one(tmp_path, name, kept):
    path, suffix = tmp_path / name, Path(name).suffix
    noise = np.random.default_rng(0).integers(0, 256, (30, HEIGHT, WIDTH, 3), np.uint8)
    if suffix in (".gif", ".webp", ".png"):
        pictures = [Image.fromarray(frame) for frame in noise]
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100)
    else:
        codec = {".webm": "libvpx", ".avi": "mpeg4"}.get(suffix, "libx264")
        encode(path, noise, codec=codec, container=FRAGMENTS if name == "fragments.mp4" else {})
    assert probe(path).num_frames == 30
    content = path.read_bytes()
    path.write_bytes(content + bytes(100))  # what is behind its end is nobody's
    assert probe(path).num_frames == 30
    path.write_bytes(content[: int(len(content) * kept)])
    for verify in ("count", "decode"):
        with pytest.raises(OpenSoraError):
            probe(path, verify)
    with pytest.raises(OpenSoraError):
        read_video(path)


CLEAR = np.dstack([np.full((HEIGHT, WIDTH, 3), 90, np.uint8), np.full((HEIGHT, WIDTH, 1), 255, np.uint8)])
CLEAR[:, :32] = (255, 0, 0, 0)
ALPHA = {
    "vp9.webm": {"codec": "libvpx-vp9", "pix_fmt": "yuva420p", "deadline": "realtime", "cpu-used": "8"},
    "vp8.webm": {"codec": "libvpx", "pix_fmt": "yuva420p", "auto-alt-ref": "0"},
    "prores.mov": {"codec": "prores_ks", "pix_fmt": "yuva444p10le"},
    "png.mov": {"codec": "png", "pix_fmt": "rgba"},
    "ffv1.mkv": {"codec": "ffv1", "pix_fmt": "bgra"},
}


@pytest.mark.parametrize("name", ALPHA)
def test_a_clip_that_is_clear_in_parts_is_laid_on_white(tmp_path, name):
    path = encode(tmp_path / name, np.stack([CLEAR] * 6), **ALPHA[name])
    frames, _ = read_video(path)
    assert len(frames) == 6
    assert np.abs(frames[:, :, :24].astype(int) - 255).mean() < 4
    assert np.abs(frames[:, :, 40:].astype(int) - 90).mean() < 6
    assert probe(path).notes == ("its transparent parts are laid on white",)


def test_a_palette_that_is_clear_in_parts(tmp_path):
    indices = np.zeros((HEIGHT, WIDTH), np.uint8)
    indices[:, 32:] = 1
    palette = np.zeros((256, 4), np.uint8)
    palette[:2] = [(0, 255, 0, 0), (255, 90, 90, 90)]  # alpha first
    path = tmp_path / "a.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "pal8"
        frame = av.VideoFrame.from_ndarray((indices, palette), format="pal8")
        frame.pts, frame.time_base = 0, Fraction(1, 10)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (frame,), _ = read_video(path)
    assert frame[:, :32].min() == 255 and (frame[:, 32:] == 90).all()


def test_colours_of_full_and_limited_range(tmp_path):
    """Phones write full-range clips, most others limited ones; both say so."""
    frames = np.full((3, HEIGHT, WIDTH, 3), 250, np.uint8)
    frames[:, :, :32] = (30, 180, 60)
    for name, codec, pix_fmt in [("a.avi", "mjpeg", "yuvj420p"), ("b.mp4", "libx264", "yuv420p")]:
        found, _ = read_video(encode(tmp_path / name, frames, codec=codec, pix_fmt=pix_fmt))
        assert np.abs(found.astype(int) - frames).mean() < 3


def test_a_film_with_a_cover_is_the_film(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        cover, film = container.add_stream("mjpeg", rate=1), container.add_stream("libx264", rate=10)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        film.width, film.height, film.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        frame = av.VideoFrame.from_ndarray(numbered(1, 32, 32)[0], format="rgb24")
        container.mux(cover.encode(frame))
        container.mux(cover.encode(None))
        for index, picture in enumerate(numbered(5)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 10)
            container.mux(film.encode(frame))
        container.mux(film.encode(None))
    assert read_video(path)[0].shape == (5, HEIGHT, WIDTH, 3)


def test_a_gif_that_is_clear_in_parts(tmp_path):
    pictures = []
    for level in (60, 120):
        image = Image.new("RGBA", (WIDTH, HEIGHT), (255, 0, 0, 0))
        image.paste((level, level, level, 255), (32, 0, 64, 48))
        pictures.append(image)
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=100, disposal=2)
    frames, _ = read_video(tmp_path / "a.gif")
    assert frames[:, :, :32].min() > 250 and [int(frame[0, 60, 0]) for frame in frames] == [60, 120]
    assert probe(tmp_path / "a.gif").notes == ("its transparent parts are laid on white",)


def test_ten_bits_are_scaled_to_eight(tmp_path):
    levels = np.linspace(0, 65535, WIDTH).astype(np.uint16)
    ramp = np.broadcast_to(levels[None, None, :, None], (3, HEIGHT, WIDTH, 3)).copy()
    for name, codec, pix_fmt in [("a.mp4", "libx264", "yuv444p10le"), ("b.mkv", "ffv1", "yuv444p16le")]:
        frames, _ = read_video(encode(tmp_path / name, ramp, codec=codec, pix_fmt=pix_fmt))
        assert np.abs(frames[1, 24, :, 0] - levels / 257).max() < 4
    path = encode(tmp_path / "c.mp4", ramp, pix_fmt="yuv420p10le", color_trc=16)
    assert "it is HDR (PQ)" in probe(path).notes[0]


def audio_file(path: Path, codec: str, format: str | None = None, cover: bool = True) -> Path:
    with av.open(str(path), "w", format=format) as container:
        sound = container.add_stream(codec, rate=44100)
        if cover:
            picture = container.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
            picture.disposition = Disposition.attached_pic
            frame = av.VideoFrame.from_ndarray(numbered(1)[0], format="rgb24")
            container.mux(picture.encode(frame))
            container.mux(picture.encode(None))
        for index in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 2304), np.int16), format="s16", layout="stereo")
            frame.rate, frame.pts = 44100, index * 1152
            container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    return path


@pytest.mark.parametrize(
    ("name", "codec", "format"), [("a.mp3", "libmp3lame", None), ("a.flac", "flac", None), ("a.m4a", "aac", "mp4")]
)
def test_the_cover_of_an_audio_file_is_no_video(tmp_path, name, codec, format):
    path = audio_file(tmp_path / name, codec, format)
    for look in (read_video, probe, ClipFile):
        with pytest.raises(OpenSoraError, match="an audio file with a cover picture, no video in it"):
            look(path)
    plain = audio_file(tmp_path / f"b.{name}", codec, format or None, cover=False)
    with pytest.raises(OpenSoraError, match="an audio file, no video in it"):
        read_video(plain)


LISTS = {
    "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{clip}\n#EXT-X-ENDLIST\n",
    "list.ffconcat": "ffconcat version 1.0\nfile '{clip}'\n",
    "session.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "manifest.mpd": '<?xml version="1.0"?><MPD><Period><BaseURL>{clip}</BaseURL></Period></MPD>',
    "picture.svg": '<?xml version="1.0"?><svg><image href="{clip}"/></svg>',
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("called", ["", ".mp4", ".png"])
def test_a_list_of_other_files_is_no_video(tmp_path, name, called):
    """Neither files nor addresses are opened for one that names them, whatever it is called."""
    clip = encode(tmp_path / "clip.ts", numbered(5))
    path = tmp_path / f"{name}{called}"
    for where in (clip, clip.name, "http://127.0.0.1:9/a.ts"):
        path.write_text(LISTS[name].format(clip=where))
        for look in (read_video, probe):
            with pytest.raises(OpenSoraError, match="not a video or a picture"):
                look(path)


def test_every_container_is_opened_in_one_place():
    """Nothing but `media.opening` opens what may be hostile."""
    package = Path(__file__).parents[2] / "opensora"
    opening = {p.name for p in package.rglob("*.py") if "av.open(" in p.read_text() or "Image.open(" in p.read_text()}
    assert opening <= {"opening.py", "write.py"}


def test_a_clip_that_changes_its_size_is_one_line(tmp_path):
    small, large = (encode(tmp_path / f"{n}.ts", numbered(10, 16 * n, 16 * n)) for n in (2, 4))
    path = tmp_path / "both.ts"
    path.write_bytes(small.read_bytes() + large.read_bytes())
    with pytest.raises(OpenSoraError, match=r"^[^\n]*$"):
        read_video(path)


@pytest.mark.parametrize("called", ["a.mp4", "a.png", "a.gif", "a"])
def test_a_file_is_what_it_holds(tmp_path, called):
    encode(tmp_path / "source.mp4", numbered(5)).rename(tmp_path / called)
    assert len(read_video(tmp_path / called)[0]) == 5
    assert not ClipFile(tmp_path / called).is_picture


def test_generating_and_training_read_the_same_pixels(tmp_path):
    path = encode(tmp_path / "a.mp4", numbered(9), aspect=Fraction(4, 3))
    with_matrix(path, (0, 1, -1, 0))
    frames, _ = read_video(path)
    make_manifest(tmp_path, tmp_path / "clips.csv", uncaptioned=True)
    (row,) = read_manifest(tmp_path / "clips.csv", text_required=False).rows
    video = read_clip(row, Bucket("a", 9, 1.0, row.height, row.width, 1), 1, random.Random(0))
    torch.testing.assert_close(video, torch.tensor(frames).permute(3, 0, 1, 2) / 127.5 - 1)


@pytest.mark.slow
def test_real_clips_turned_and_stretched(tmp_path, real_clips):
    """What is noted in a container changes how frames are shown, and nothing else."""
    for number, source in enumerate(real_clips):
        plain = list(ClipFile(source).frames(range(5)))
        path = tmp_path / f"{number}.mkv"
        with av.open(str(source)) as old, av.open(str(path), "w") as new:
            stream = new.add_stream_from_template(old.streams.video[0])
            stream.set_display_rotation(90)
            for packet in old.demux(old.streams.video[0]):
                if packet.dts is not None:
                    packet.stream = stream
                    new.mux(packet)
        turned = list(ClipFile(path).frames(range(5)))
        np.testing.assert_array_equal(turned, [np.rot90(frame) for frame in plain], err_msg=source.name)
