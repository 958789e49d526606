"""The models this package knows by name, in one table."""

from dataclasses import dataclass, field
from pathlib import Path

# Inside the installed package: offline from the first minute.
_WEIGHTS = Path(__file__).parent.parent / "toybox" / "weights"


@dataclass(frozen=True)
class BundledModel:
    """A complete pipeline folder that is shipped inside the package.

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


def component_folders(folder: Path) -> dict[str, Path]:
    """Component name -> folder, for a pipeline's folder: its own subfolders, and those a bundled model shares."""
    own = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()}
    shared = next((model.shared for model in BUNDLED.values() if model.folder == folder), {})
    return own | {name: BUNDLED[model].folder / name for name, model in shared.items() if name not in own}
