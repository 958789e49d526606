"""The models this package knows by name, in one table."""

from dataclasses import dataclass
from pathlib import Path

# Inside the installed package: offline from the first minute.
_WEIGHTS = Path(__file__).parent.parent / "toybox" / "weights"


@dataclass(frozen=True)
class BundledModel:
    """A complete pipeline folder that is shipped inside the package.

    Attributes:
        folder: where it lies.
        summary: one line that says what it is.
    """

    folder: Path
    summary: str


BUNDLED: dict[str, BundledModel] = {
    "toybox": BundledModel(_WEIGHTS / "toybox", "moving shapes, rectified flow, all latent channels guided"),
    "toybox-iddpm": BundledModel(_WEIGHTS / "toybox-iddpm", "the same world, IDDPM with learned variance, 3 guided"),
}
