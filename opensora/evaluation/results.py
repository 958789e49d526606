"""What files of results have in common: they are resumed only by an evaluation of the same settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opensora.errors import OpenSoraError


def check_same_settings(path: Path, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Holds the settings of a run against those that a file of results was made with.

    Raises:
        OpenSoraError: one differs.
    """
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            raise OpenSoraError(
                f"{path} was made with {name} = {theirs.get(name)!r}, this run has {mine.get(name)!r}; "
                "choose another `output`"
            )
