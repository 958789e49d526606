"""Ways in which an input goes wrong: values nobody means, JSON of other values, files cut, flipped and swapped."""

import copy
import json
import math
import os
import random
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NUMBERS = [
    *("0", "-1", "1", "2", "3", "7", "1.5", "-0.0", "1e3", "1e400", "1e-400", "nan", "inf", "-inf", "1000000000"),
    *("9" * 5000, "-" + "9" * 5000, "1." + "9" * 5000, "999999999999", "18446744073709551616", "-9223372036854775809"),
    *("0x10", "１２", "1_000", " 5 ", "+5", "", "true", "None", "null", "[]", "{}", "0,1", "1,", "2x", "4s", "1e9s"),
    *("999999999s", "999999999x", "9" * 400 + "s", "ddim50", "ddim0", "ddim999999999", "ddim" + "9" * 5000),
    *("1,1,1", "999999999,999999999", "0," * 5000, "0-2:7,3:1", "0-2:7", "3-0:7", "0-3:nan", "0-999999999:7"),
    *("0:7,0:1", "0-3:7,2:1", "-1:7", "[7,7,7,1]", "[7,7,7]", "[7,7,7,-1]", "[1e400,1,1,1]", "0-3:" * 999),
    "[" + "7," * 50_000 + "7]",
]
TEXTS = [
    *(
        "",
        " ",
        "x",
        "a" * 100_000,
        "\n",
        "a\nb",
        "\x1b[31m",
        "../..",
        "/",
        "~",
        "~nobody/x",
        "-",
        "--",
        "@",
        ":",
        "a:b",
    ),
    *("x@999999999", "{", "{}", "[1", '{"a": 1}', "[" * 5000, '{"a":' * 5000, "|0|", "|0|a|999999999|b", "|-1|a"),
    *("猫", "a\udcff", "%s", "{0}", ";", "a;b", "e" * 300, "64x64x1000000000", "16:9", "1:1000000000", "0:0", "nan:1"),
    *("240p", "999999999p", "999999999x999999999", "0x0", "24GB", "1e99GB", "-1GB", "nanGB", "fp8", "cuda:999999999"),
    *(
        "meta",
        "h100-80g",
        "http://127.0.0.1:1/v1",
        "file:///etc/passwd",
        "0,0,0,0,999999999,0",
        "0;0",
        "a" * 5000 + "/",
    ),
    *("tiny:nan", "tiny:1e999", "look:", "look:-5", "look:" + "9" * 5000, "C:\\x", "\u202e", "a\u2028b"),
]
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        3,
        10**9,
        -(10**9),
        2**31,
        2**63,
        -(2**63),
        10**18,
        1.5,
        -0.5,
        1e308,
        -1e308,
        0.0,
    ),
    *("", "x", "../x", "/etc/passwd", "a" * 10_000, "cpu", "猫", "1", "nan", "a\nb", "%s{0}"),
    *([], {}, [1], [[]], {"a": 1}, [None] * 3, [1, 2, 3], ["a", "b"], [10**9], {"type": "x"}, [0.5] * 40),
]
RAW = [
    *("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "-" + "9" * 400, '"\\ud800"', '"\\u0000"', '"a\\nb"'),
    *("[" * 40 + "]" * 40, "[" * 100_000, '{"a":' * 70 + "1" + "}" * 70, "", "0x10", "'x'", "undefined"),
]


def hostile_text(rng: random.Random) -> str:
    """A value for an option of any kind."""
    return rng.choice(NUMBERS if rng.random() < 0.55 else TEXTS)


# --- JSON -------------------------------------------------------------------------------------------------------------


def mutate_json(text: str, rng: random.Random) -> str:
    """A JSON text with one to three things changed: a value, a key, or the text itself."""
    try:
        value = json.loads(text)
    except ValueError:
        return mutate_text(text, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _changed(value, rng)
    written = json.dumps(value)
    if rng.random() < 0.15:
        places = [p for p, v in _places(value) if not isinstance(v, dict | list)]
        if places:
            mark = "@RAW@"
            written = json.dumps(_replaced(value, rng.choice(places), mark)).replace(f'"{mark}"', rng.choice(RAW), 1)
    return mutate_text(written, rng) if rng.random() < 0.05 else written


def _changed(value: Any, rng: random.Random) -> Any:
    places = list(_places(value))
    if not places:
        return rng.choice(VALUES)
    place, old = rng.choice(places)
    how = rng.random()
    if how < 0.5:
        return _replaced(value, place, rng.choice(VALUES))
    if how < 0.75:
        return _replaced(value, place, _alike(old, rng))
    changed = copy.deepcopy(value)
    holder = changed
    for step in place[:-1]:
        holder = holder[step]
    if isinstance(holder, list):
        return _replaced(value, place, [old])
    if how < 0.85:
        del holder[place[-1]]
    elif how < 0.92:
        holder[place[-1] + rng.choice(("x", "_", "s", " "))] = holder.pop(place[-1])
    else:
        holder[rng.choice(("new", "_new", "", "type", "steps"))] = rng.choice(VALUES)
    return changed


def _alike(old: Any, rng: random.Random) -> Any:
    """Another value of the same kind."""
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        return rng.choice((old + 1, old - 1, old * 10, -old, old * 10**6, old // 2, float(old) + 0.5))
    if isinstance(old, float):
        return rng.choice((-old, old * 1e300, 0.0, old * 1e-300, int(old) if math.isfinite(old) else 0))
    if isinstance(old, str):
        return rng.choice((old + "x", old[:-1], old.upper(), old * 100, f"../{old}", f"{old}\n"))
    if isinstance(old, list):
        return rng.choice((old[:-1], old * 2, old * 1000, [*old, None], [str(item) for item in old], old[::-1]))
    if isinstance(old, dict):
        return rng.choice(([old], list(old.items()), list(old), {}, {**old, "x": 1}, dict.fromkeys(old)))
    return rng.choice(VALUES)


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value inside, with the way to it; of long lists the first ones."""
    if place:
        yield place, value
    inside = value.items() if isinstance(value, dict) else enumerate(value[:6]) if isinstance(value, list) else ()
    for key, item in inside:
        yield from _places(item, (*place, key))


def _replaced(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return new
    changed = copy.copy(value)
    changed[place[0]] = _replaced(value[place[0]], place[1:], new)
    return changed


def mutate_text(text: str, rng: random.Random) -> str:
    """A text with a piece missing, twice, swapped or new."""
    at, to = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
    piece = rng.choice(
        ("", text[at:to] * 2, "\x00", "\ufeff", '"', ",", "\n", ";", "9" * 5000, "猫", "None", "\r", "\t")
    )
    return text[:at] + piece + text[rng.choice((at, to)) :]


# --- files ------------------------------------------------------------------------------------------------------------


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """A file that was damaged on its way."""
    data = bytearray(content)
    how = rng.random()
    if how < 0.45 and data:
        for _ in range(rng.choice((1, 1, 2, 8, 64))):
            reach = rng.choice((16, 64, 1024, len(data)))
            data[rng.randrange(min(reach, len(data)))] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
        return bytes(data)
    if how < 0.6:
        return bytes(data[: rng.randrange(len(data) + 1)])
    if how < 0.68:
        at = rng.randrange(len(data) + 1)
        return bytes(data[:at] + rng.randbytes(rng.choice((1, 4, 100))) + data[at:])
    if how < 0.76 and len(data) > 8:
        at = rng.randrange(len(data) - 4)
        data[at : at + 4] = rng.choice((b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", bytes(4)))
        return bytes(data)
    return rng.choice(
        (
            b"",
            b"\n",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            b"<!DOCTYPE html><html><body>404</body></html>",
            b"\x1f\x8b\x08\x00" + rng.randbytes(100),
            b"PK\x03\x04" + rng.randbytes(100),
            b"\x80\x02cos\nsystem\nq\x00X\x02\x00\x00\x00idq\x01\x85q\x02Rq\x03.",
            b"GIF89a" + rng.randbytes(20),
            b"\xff\xd8\xff\xe1" + rng.randbytes(50),
            struct.pack("<Q", 2**62) + b"{}",
            struct.pack("<Q", 2) + b"{}",
            rng.randbytes(1000),
            "a cat\nein Bär".encode("utf-16"),
            bytes(data) * 2,
        )
    )


def mutate_safetensors(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header, or the JSON in its metadata, says something else."""
    length = struct.unpack("<Q", content[:8])[0]
    header, rest = json.loads(content[8 : 8 + length]), content[8 + length :]
    notes = header.get("__metadata__", {})
    inner = [key for key, text in notes.items() if text.startswith(("{", "["))]
    if inner and rng.random() < 0.6:
        key = rng.choice(inner)
        notes[key] = mutate_json(notes[key], rng)
        written = json.dumps(header)
    else:
        written = mutate_json(json.dumps(header), rng)
    encoded = written.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(encoded)) + encoded + rest


def make_special(path: Path, rng: random.Random) -> None:
    """Puts something there that is no file."""
    makers: list[Callable[[], Any]] = [
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to("/dev/stdin"),
        lambda: path.symlink_to(path.name),
        lambda: path.symlink_to("gone"),
        lambda: path.mkdir(),
        lambda: _listen(path),
    ]
    rng.choice(makers)()


def _listen(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket may have a hundred characters
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name)
    finally:
        os.chdir(here)
