"""Pictures are read as people see them, whatever they are made of and called, for generating and training alike."""

import io
import struct
import sys
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageCms

from opensora.data.scan import make_manifest
from opensora.errors import OpenSoraError
from opensora.generation.inputs import InputFiles
from opensora.generation.request import ClipRequest
from opensora.media.frames import ClipFile, probe
from opensora.media.read import read_video
from opensora.media.transforms import clips_of

pillow_heif.register_heif_opener()

HEIGHT, WIDTH = 32, 48
# Flat quarters, which no codec harms much: red and green above blue and grey.
QUARTERS = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
QUARTERS[:16, :24], QUARTERS[:16, 24:] = (200, 40, 40), (40, 180, 60)
QUARTERS[16:, :24], QUARTERS[16:, 24:] = (40, 60, 200), (128, 128, 128)
# How to lay down what a camera stored, by its orientation tag.
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def read(path: Path) -> np.ndarray:
    """The picture (H, W, 3), which all readers must agree on."""
    frames, _ = read_video(path)
    assert len(frames) == 1
    facts = probe(path)
    assert (facts.num_frames, facts.height, facts.width) == (1, *frames.shape[1:3])
    return frames[0]


def near(found: np.ndarray, expected: np.ndarray, by: float = 6) -> None:
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected.astype(int)).mean() < by


def notes(path: Path) -> str:
    return "; ".join(probe(path).notes)


@pytest.mark.parametrize("name", ["png", "jpg", "webp", "tiff", "avif", "heic"])
@pytest.mark.parametrize("tag", TURNS)
def test_a_photo_stands_as_it_was_taken(tmp_path, name, tag):
    exif = Image.Exif()
    exif[0x0112] = tag
    stored = Image.fromarray(QUARTERS)
    if name == "heic":  # turned by a property, not by its EXIF; some have the EXIF alone
        stored.save(tmp_path / "b.heic", exif=exif.tobytes())
        near(read(tmp_path / "b.heic"), TURNS[tag](QUARTERS))
    stored.save(tmp_path / f"a.{name}", exif=exif)
    (tmp_path / f"a.{name}").rename(tmp_path / "photo.mp4")  # whatever it is called
    near(read(tmp_path / "photo.mp4"), TURNS[tag](QUARTERS))


def test_a_phone_photo_is_read_whole(tmp_path):
    """Phones store a photo as tiles of 512x512; it may also be called .jpg, or hold a second picture."""
    large = np.kron(QUARTERS, np.ones((20, 25, 1), np.uint8))
    assert min(large.shape[:2]) > 512
    heif = pillow_heif.from_pillow(Image.fromarray(large))
    heif.save(tmp_path / "photo.jpg", quality=90)
    near(read(tmp_path / "photo.jpg"), large)
    heif = pillow_heif.from_pillow(Image.fromarray(QUARTERS))
    heif.add_from_pillow(Image.new("RGB", (64, 64)))
    heif.save(tmp_path / "two.heic", quality=90)
    near(read(tmp_path / "two.heic"), QUARTERS)
    assert "holds 2 pictures, the first is taken" in notes(tmp_path / "two.heic")


def test_without_pillow_heif_one_line_says_what_to_install(tmp_path, monkeypatch):
    pillow_heif.from_pillow(Image.fromarray(QUARTERS)).save(tmp_path / "a.jpg")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for look in (read_video, probe, ClipFile):
        with pytest.raises(OpenSoraError, match=r'HEIC picture.*pip install "opensora\[heic\]"'):
            look(tmp_path / "a.jpg")


def test_avif(tmp_path):
    Image.fromarray(QUARTERS).save(tmp_path / "a.png", format="AVIF", quality=90)
    near(read(tmp_path / "a.png"), QUARTERS)
    path = tmp_path / "cut.avif"
    path.write_bytes((tmp_path / "a.png").read_bytes()[:300])
    with pytest.raises(OpenSoraError):
        read_video(path)


RAMP = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
GREYS = {
    "16 bits.png": lambda path: Image.fromarray(RAMP).save(path),
    "16 bits.tif": lambda path: Image.fromarray(RAMP).save(path),
    "white is zero.tif": lambda path: Image.fromarray(65535 - RAMP).save(path, tiffinfo={262: 0}),
    "16 bits.pgm": lambda path: path.write_bytes(b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + RAMP.astype(">u2").tobytes()),
    "float.tif": lambda path: Image.fromarray((RAMP / 65535).astype(np.float32)).save(path),
    "stated range.tif": lambda path: Image.fromarray(RAMP.astype(np.int32)).save(path, tiffinfo={340: 0, 341: 65535}),
}


@pytest.mark.parametrize("name", GREYS)
def test_greys_of_many_bits(tmp_path, name):
    GREYS[name](tmp_path / name)
    near(read(tmp_path / name), np.repeat((RAMP / 257)[..., None], 3, axis=2).round().astype(np.uint8), by=0.6)


@pytest.mark.parametrize(
    "values", [RAMP.astype(np.int32), RAMP.astype(np.float32), np.full((4, 4), np.nan, np.float32)]
)
def test_greys_whose_black_and_white_nobody_states(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(OpenSoraError, match="does not say which are black and white; save it with 8 or 16 bits"):
        read_video(tmp_path / "a.tif")


def see_through(mode: str) -> tuple[Image.Image, dict]:
    """A picture whose left half is clear, with red behind it."""
    pixels = np.dstack([QUARTERS, np.full((HEIGHT, WIDTH), 255, np.uint8)])
    pixels[:, :24] = (255, 0, 0, 0)
    image = Image.fromarray(pixels)
    if mode == "RGBA":
        return image, {}
    if mode == "LA":
        return Image.merge("LA", [image.convert("L"), image.getchannel("A")]), {}
    if mode == "RGB":
        return image.convert("RGB"), {"transparency": (255, 0, 0)}
    if mode == "L":
        return image.convert("L"), {"transparency": image.convert("L").getpixel((0, 0))}
    palette = image.convert("RGB").quantize(8)
    return palette, {"transparency": palette.getpixel((0, 0))}


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGBA", "png"),
        ("LA", "png"),
        ("RGB", "png"),
        ("L", "png"),
        ("P", "png"),
        ("P", "gif"),
        ("RGBA", "webp"),
        ("RGBA", "tiff"),
        ("RGBA", "avif"),
        ("RGBA", "heic"),
    ],
)
def test_what_is_clear_is_laid_on_white_with_a_word(tmp_path, mode, suffix):
    image, options = see_through(mode)
    image.save(tmp_path / f"a.{suffix}", **options)
    found = read(tmp_path / f"a.{suffix}")
    near(found[:, :20], np.full((HEIGHT, 20, 3), 255), by=2)
    assert found[20:, 30:].mean() < 140
    assert notes(tmp_path / f"a.{suffix}") == "its transparent parts are laid on white"


def test_what_is_opaque_needs_no_word(tmp_path):
    Image.fromarray(QUARTERS).convert("RGBA").save(tmp_path / "a.png")
    np.testing.assert_array_equal(read(tmp_path / "a.png"), QUARTERS)
    assert not notes(tmp_path / "a.png")


def test_other_colours(tmp_path):
    Image.fromarray(QUARTERS).convert("CMYK").save(tmp_path / "a.tiff")
    near(read(tmp_path / "a.tiff"), QUARTERS)
    ink = ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(Image.fromarray(QUARTERS), ImageCms.createProfile("sRGB"), ink, outputMode="LAB")
    lab.save(tmp_path / "lab.tiff")
    near(read(tmp_path / "lab.tiff"), QUARTERS)
    Image.fromarray(QUARTERS).convert("1").save(tmp_path / "b.png")
    assert set(np.unique(read(tmp_path / "b.png"))) == {0, 255}


def wide_gamut_profile() -> bytes:
    """sRGB with its red and green named the other way round, which no rounding explains."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", profile[128:132])[0]
    entries = {bytes(profile[at : at + 4]): at for at in range(132, 132 + 12 * count, 12)}
    red, green = entries[b"rXYZ"] + 4, entries[b"gXYZ"] + 4
    profile[red : red + 8], profile[green : green + 8] = profile[green : green + 8], profile[red : red + 8]
    return bytes(profile)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
def test_colours_of_another_profile_are_converted(tmp_path, suffix):
    Image.fromarray(QUARTERS).save(tmp_path / f"a.{suffix}", icc_profile=wide_gamut_profile(), quality=95)
    near(read(tmp_path / f"a.{suffix}"), QUARTERS[..., [1, 0, 2]], by=8)
    assert "to sRGB" in notes(tmp_path / f"a.{suffix}")
    plain = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (plain, b"no profile"):
        Image.fromarray(QUARTERS).save(tmp_path / "b.png", icc_profile=profile)
        np.testing.assert_array_equal(read(tmp_path / "b.png"), QUARTERS)
        assert not notes(tmp_path / "b.png")


@pytest.mark.parametrize("suffix", ["tiff", "mpo"])
def test_of_several_pictures_the_first_is_taken_with_a_word(tmp_path, suffix):
    others = [Image.new("RGB", (WIDTH, HEIGHT)), Image.new("RGB", (8, 8))]
    Image.fromarray(QUARTERS).save(tmp_path / f"a.{suffix}", save_all=True, append_images=others)
    near(read(tmp_path / f"a.{suffix}"), QUARTERS)
    assert "holds 3 pictures, the first is taken" in notes(tmp_path / f"a.{suffix}")


def test_the_preview_of_a_raw_photo_is_not_the_photo(tmp_path):
    for name, tags in {"a.dng": {50706: b"\1\4\0\0"}, "b.nef": {254: 1}}.items():
        Image.fromarray(QUARTERS).save(tmp_path / name, format="TIFF", tiffinfo=tags)
        with pytest.raises(OpenSoraError, match=r"raw photo.*preview.*JPEG"):
            read_video(tmp_path / name)


def test_other_things_called_pictures_are_named(tmp_path):
    contents = {
        "a.jpg": (b"<!DOCTYPE html><html>", "a web page"),
        "b.png": (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
        "c.webp": (b"%PDF-1.4", "a PDF"),
        "d.jpg": (b"", "an empty file"),
        "e.jxl": (
            b"\x00\x00\x00\x0cJXL \r\n\x87\n" + bytes(50),
            "a picture that cannot be read; save it as PNG or JPEG",
        ),
    }
    for name, (content, words) in contents.items():
        (tmp_path / name).write_bytes(content)
        for look in (read_video, probe):
            with pytest.raises(OpenSoraError, match=words):
                look(tmp_path / name)


def test_generating_and_a_manifest_say_what_is_done(tmp_path):
    image, options = see_through("P")
    image.save(tmp_path / "a.png", **options)
    Image.fromarray(RAMP).save(tmp_path / "b.png")
    files = InputFiles()
    named = files.read(ClipRequest("a cat", image=tmp_path / "a.png"))
    assert files[named.image].clip.notes == ["its transparent parts are laid on white"]
    scan = make_manifest(tmp_path, tmp_path / "clips.csv", uncaptioned=True)
    assert scan.notes == {"its transparent parts are laid on white": (1, str(tmp_path / "a.png"))}


def test_a_picture_of_too_many_pixels_is_refused(tmp_path, monkeypatch):
    content = io.BytesIO()
    Image.fromarray(QUARTERS).save(content, "PNG")
    (tmp_path / "a.png").write_bytes(content.getvalue())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(OpenSoraError, match="exceeds limit"):
        read_video(tmp_path / "a.png")


def test_pictures_in_memory_are_taken_as_they_are_seen(tmp_path, caplog):
    """What a program opened with Pillow and hands to a pipeline."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(QUARTERS).save(tmp_path / "a.jpg", exif=exif, quality=95)
    clear, options = see_through("P")
    clear.save(tmp_path / "b.png", **options)
    for image, expected in [
        (Image.open(tmp_path / "a.jpg"), TURNS[6](QUARTERS)),
        (Image.open(tmp_path / "b.png"), np.hstack([np.full_like(QUARTERS[:, :24], 255), QUARTERS[:, 24:]])),
        (Image.open(tmp_path / "a.jpg").rotate(-90, expand=True), TURNS[6](QUARTERS)),
        (Image.fromarray(RAMP), np.repeat((RAMP // 257).astype(np.uint8)[..., None], 3, axis=2)),
    ]:
        (video,) = clips_of(image, *expected.shape[:2], pictures=True)
        near(((video[:, 0].permute(1, 2, 0) + 1) * 127.5).numpy().round().astype(np.uint8), expected)
    assert "its transparent parts are laid on white" in caplog.text
