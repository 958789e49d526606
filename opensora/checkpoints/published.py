"""The models this package knows by name, in one table."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

# Inside the installed package: offline from the first minute.
_WEIGHTS = Path(__file__).parent.parent / "toybox" / "weights"


@dataclass(frozen=True)
class BundledModel:
    """A pipeline folder that is shipped inside the package, complete but for what it shares with another one.

    Attributes:
        folder: where it lies.
        summary: one line that says what it is.
        shared: component -> bundled model whose copy it uses, so that the package holds one autoencoder.
    """

    folder: Path
    summary: str
    shared: dict[str, str] = field(default_factory=dict)


BUNDLED: dict[str, BundledModel] = {
    "toybox": BundledModel(_WEIGHTS / "toybox", "moving shapes, rectified flow, all latent channels guided"),
    "toybox-iddpm": BundledModel(
        _WEIGHTS / "toybox-iddpm",
        "the same world, IDDPM with learned variance, 3 latent channels guided",
        shared={"autoencoder": "toybox"},
    ),
}


def component_folders(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Component name -> folder: a subfolder of the pipeline's own, or one that a bundled model shares."""
    here = folder.resolve()
    shared = next((model.shared for model in BUNDLED.values() if model.folder.resolve() == here), {})
    own = {name: folder / name for name in names}
    return {
        name: BUNDLED[shared[name]].folder / name if name in shared and not part.is_dir() else part
        for name, part in own.items()
    }
