"""The families of networks that are known: those of this package, and those that installed packages declare.

A package brings a family by an entry point of the group "opensora.families" that names a `Format`, or several:

    [project.entry-points."opensora.families"]
    mynet = "mypackage.mynet:FORMAT"

Its networks are then recognised, loaded, planned and trained like this package's own, and `model_index.json` may name
classes of that package.
"""

import functools
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points

from opensora.errors import OpenSoraError
from opensora.models import mmdit_format, stdit, stdit2, stdit3, stdit4
from opensora.models.autoencoders.formats import FORMATS as AUTOENCODERS
from opensora.models.format import LIBRARIES, Format, Kind
from opensora.models.text import clip_format, t5_format

FORMATS: tuple[Format, ...] = (
    mmdit_format.FORMAT,
    stdit4.FORMAT,
    stdit3.FORMAT,
    stdit2.FORMAT,
    stdit.FORMAT,
    *AUTOENCODERS,
    t5_format.FORMAT,
    clip_format.FORMAT,
)
"""Of this package, of each kind the newest first; weights are compared with them in this order."""

_GROUP = "opensora.families"


def formats() -> tuple[Format, ...]:
    """Every family: this package's, then those of installed packages.

    Raises:
        OpenSoraError: a package declares a family that cannot be imported.
    """
    return FORMATS + tuple(found for _, declared in _declared(tuple(sys.path)) for found in declared)


def format_of(cls: type) -> Format:
    """What is true of a class of networks; of one that nothing is known of, nothing special."""
    known = {found.cls: found for found in formats()}
    return next((known[base] for base in cls.__mro__ if base in known), Format(cls))


def network_class(kind: Kind, name: str | None = None) -> type:
    """The class of that name; where none is given, the newest of this package.

    Raises:
        OpenSoraError: no family has one.
    """
    known = {found.cls.__name__: found.cls for found in formats() if found.kind == kind}
    if name is None:
        return next(iter(known.values()))
    if name not in known:
        raise OpenSoraError(f"unknown {kind.replace('_', ' ')} {name!r}; known are {', '.join(known)}")
    return known[name]


def may_hold_components(library: str) -> bool:
    """Whether classes of a module may be components: of this package, of `LIBRARIES`, of a package with a family."""
    packages = {"opensora", *(package for package, _ in _declared(tuple(sys.path)))}
    return library in LIBRARIES or library.partition(".")[0] in packages


@functools.lru_cache(maxsize=1)
def _declared(path: tuple[str, ...]) -> tuple[tuple[str, tuple[Format, ...]], ...]:
    """Package and families of each entry point on a search path."""
    found: list[tuple[str, tuple[Format, ...]]] = []
    for entry in entry_points(group=_GROUP):
        try:
            named = entry.load()
        except Exception as error:  # whatever a foreign module trips over
            reason = " ".join(str(error).split()) or type(error).__name__
            raise OpenSoraError(
                f"{entry.value}, which an installed package declares in {_GROUP}, cannot be imported ({reason}); "
                "update that package, or uninstall it"
            ) from error
        named = tuple(named) if isinstance(named, Iterable) else (named,)
        found.append((entry.module.partition(".")[0], named))
    return tuple(found)
