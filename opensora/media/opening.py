"""Pictures and videos opened: by their content, and nothing but the file itself.

Every picture goes through `open_picture`, every video through `open_video`. A video may be no list of other files or
addresses, whatever it calls itself: only containers that hold their frames themselves are opened, and FFmpeg is given
no protocol but that of files. What the libraries raise for broken files is put into words here.
"""

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
from av.stream import Disposition
from PIL import Image, UnidentifiedImageError

from opensora.contents import check_regular, describe_kind, kind_of
from opensora.errors import OpenSoraError

_PICTURES = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")
# Those of the HEVC codec; the brands that HEIF shares with AVIF count only without AVIF's own.
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_AVIF_BRANDS = (b"avif", b"avis")
_VIDEOS = (
    *("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "mpeg", "mpegts", "mpegvideo", "m4v", "h264", "hevc", "vvc"),
    *("obu", "ivf", "flv", "asf", "ogg", "gif", "yuv4mpegpipe", "nut", "mxf", "gxf", "dv", "rm", "amv", "wtv"),
    *("mp3", "flac", "wav", "aac", "aiff", "ac3"),  # to say what they are
)
# What the libraries raise for files that are broken or something else.
_BROKEN = (
    *(Image.DecompressionBombError, struct.error, EOFError, ValueError, TypeError),
    *(LookupError, ArithmeticError, SyntaxError, RuntimeError),
)
# A damaged header may ask for any amount of memory; this is 16 times 4k.
MOST_PIXELS = 2**27


@contextlib.contextmanager
def open_picture(path: str | Path) -> Iterator[Image.Image | None]:
    """The file as Pillow knows it, at its first picture; None if it is no picture.

    Raises:
        OpenSoraError: it cannot be opened, or needs a library that is missing; the message does not name the file.
    """
    with explained(path):
        check_regular(path)
        formats = [*_PICTURES, *(["HEIF"] if _registers_heif(path) else [])]
        try:
            image = Image.open(path, formats=formats)
        except UnidentifiedImageError:
            image = None
    if image is None:
        yield None
        return
    with explained(path), image:
        yield image


@contextlib.contextmanager
def open_video(path: str | Path, **options: str) -> Iterator[tuple[Any, Any]]:
    """The container (PyAV) and its video stream, which is decoded by one thread.

    Args:
        path: of the file.
        options: of FFmpeg's demuxer.

    Raises:
        OpenSoraError: no video in it, or damaged; the message does not name the file.
    """
    safe = {"protocol_whitelist": "file", "format_whitelist": ",".join(_VIDEOS)}
    with explained(path):
        if _is_no_video(path):
            raise OpenSoraError("a picture that cannot be read; save it as PNG or JPEG")
        try:  # absolute, because FFmpeg takes "12:30.mp4" for an address
            container = av.open(str(Path(path).absolute()), options=options | safe)
        except av.ArgumentError:
            raise OpenSoraError(_what_else(path)) from None
        with container:
            stream = _video_stream(container)
            stream.codec_context.thread_count = 1  # clips are read side by side, one thread each
            stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
            yield container, stream


def _video_stream(container: Any) -> Any:
    covers = [stream for stream in container.streams.video if stream.disposition & Disposition.attached_pic]
    streams = [stream for stream in container.streams.video if stream not in covers]
    if not streams and container.streams.audio:
        raise OpenSoraError(f"an audio file{' with a cover picture' if covers else ''}, no video in it")
    if not streams:
        raise OpenSoraError("no video in it")
    if streams[0].codec_context is None:
        raise OpenSoraError("nobody knows how its video is coded")
    return streams[0]


def _is_no_video(path: str | Path) -> bool:
    """A picture that Pillow could not read; FFmpeg would take a part of some for the whole."""
    with Path(path).open("rb") as file:
        moves = file.read(4) == b"GIF8"
    return kind_of(path) == "image" and not moves


def _registers_heif(path: str | Path) -> bool:
    """Whether it is a HEIC picture, as phones take them; then Pillow knows how to read it."""
    with Path(path).open("rb") as file:
        head = file.read(64)
    size = int.from_bytes(head[:4], "big")
    brands = [head[at : at + 4] for at in (8, *range(16, min(size, len(head)), 4))]
    if head[4:8] != b"ftyp" or brands[0] not in _HEIF_BRANDS or any(brand in _AVIF_BRANDS for brand in brands):
        return False
    try:
        import pillow_heif
    except ImportError:
        raise OpenSoraError(
            'a HEIC picture, which needs pillow-heif: pip install "opensora[heic]", or save it as JPEG'
        ) from None
    pillow_heif.register_heif_opener()
    return True


@contextlib.contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """Turns what the libraries raise for a broken file into an `OpenSoraError` with the reason alone."""
    try:
        yield
    except OpenSoraError as error:
        raise OpenSoraError(str(error).replace(f"file {path} ", "the file ", 1)) from error
    except (UnidentifiedImageError, av.InvalidDataError) as error:
        raise OpenSoraError(_what_else(path)) from error
    except av.FFmpegError as error:
        raise OpenSoraError(
            f"damaged: {_one_line(str(error)).replace(str(Path(path).absolute()), 'the file')}"
        ) from error
    except OSError as error:
        raise OpenSoraError(_one_line(error.strerror or str(error))) from error
    except MemoryError as error:
        raise OpenSoraError("more than fits into memory, or damaged") from error
    except _BROKEN as error:
        raise OpenSoraError(f"damaged: {_one_line(str(error)) or type(error).__name__}") from error


def _what_else(path: str | Path) -> str:
    kind = kind_of(path)
    if kind in ("image", "video", "unknown"):
        return "not a video or a picture that can be read, or damaged beyond reading"
    return f"not a video or a picture, but {describe_kind(kind)}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
