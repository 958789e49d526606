"""What the latents of each autoencoder look like: known of the bundled ones, learnt from a clip of any other."""

import hashlib
import json
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor

from opensora.files import replacing
from opensora.models.autoencoders.latent_rgb import LatentRgb
from opensora.weights import fingerprint

if TYPE_CHECKING:
    from opensora.models.autoencoders.codec import VideoCodec

KNOWN = "latent_colours.json"
"""Of the bundled models, beside this file; `docs/latent_colours.py` makes it."""


class LatentColours:
    """Colours by what latents are of, see `name_of`.

    Args:
        folder: where those that were learnt are kept, a file each.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        known = json.loads(resources.files("opensora.server").joinpath(KNOWN).read_text())
        self._colours = {name: _read(values) for name, values in known.items()}
        self._names: WeakKeyDictionary[VideoCodec, str] = WeakKeyDictionary()

    def of(self, codec: "VideoCodec") -> LatentRgb | None:
        """The colours, if they are known."""
        name = self._name(codec)
        if name not in self._colours and self._file(name).is_file():
            self._colours[name] = _read(json.loads(self._file(name).read_text()))
        return self._colours.get(name)

    def learn(self, codec: "VideoCodec", latents: Tensor, frames: np.ndarray) -> None:
        """Keeps the colours that fit a clip best: normalised latents (C, T, H, W) and uint8 frames (T', H', W', 3)."""
        name = self._name(codec)
        self._colours[name] = LatentRgb.fit(latents, frames)
        with replacing(self._file(name)) as temporary:
            temporary.write_text(json.dumps(asdict(self._colours[name])))

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _name(self, codec: "VideoCodec") -> str:
        if codec not in self._names:
            self._names[codec] = name_of(codec)
        return self._names[codec]


def name_of(codec: "VideoCodec") -> str:
    """A hash of an autoencoder's weights, and of the latent space: other factors make other numbers of one picture."""
    space = codec.latent_space
    figures = [space.scaling_factor, space.convention, space.shift, space.scale]
    return hashlib.sha256(f"{fingerprint(codec.state_dict())} {json.dumps(figures)}".encode()).hexdigest()


def _read(values: dict[str, list]) -> LatentRgb:
    red, green, blue = (tuple(row) for row in values["weight"])
    return LatentRgb((red, green, blue), tuple(values["bias"]))
