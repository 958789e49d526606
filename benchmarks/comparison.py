"""What a case hands to the runner: several ways of doing one thing, measured in turn."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Run = Callable[[], object]
"""Does the work once. What it makes is dropped, but for a `Figures`."""


class Figures(dict[str, float]):
    """What a way reports by itself, such as the seconds of a part of it, by name."""


OURS, PLAIN, FLOOR = "ours", "plain", "floor"


@dataclass(frozen=True)
class Setting:
    """What a run was asked for.

    Attributes:
        size: one of the case's names for sizes.
        dtype: "float32" or "bfloat16".
        compile: measure compiled blocks as well, where a case has any.
        threads: that commands are given; None for what they take by themselves.
    """

    size: str
    dtype: str = "float32"
    compile: bool = False
    threads: int | None = None


@dataclass(frozen=True)
class Comparison:
    """Ways of doing one thing.

    Attributes:
        name: of the thing.
        ways: name -> how it is done; where there is one called "ours", its products are measured by themselves, too.
        ratios: pairs of ways whose times are divided, round by round.
        counted: ways whose work is counted, in a run of its own that warms up as well; none of them for commands.
        gradients: whether a backward pass belongs to the work.
        note: what is to be known of the ways; "" for nothing.
        conclude: what else follows from the finished measurement, in words and figures.
    """

    name: str
    ways: Mapping[str, Run]
    ratios: Sequence[tuple[str, str]] = ()
    counted: Sequence[str] = ()
    gradients: bool = False
    note: str = ""
    conclude: "Callable[[Measured], Conclusion] | None" = None


@dataclass
class Way:
    """What was measured of one way.

    Attributes:
        seconds: of each round, by the clock.
        cpu_seconds: of each round, of all threads of this process and of those it started.
        figures: what the way itself reported, by name, of each round.
        counts: floating-point operations, bytes, operations, copies and tensors made; empty where it is not counted.
    """

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    figures: dict[str, list[float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


@dataclass
class Measured:
    """One comparison, measured.

    Attributes:
        case, size, name: what it is.
        ways: by name.
        ratios: "a / b" -> a's seconds over b's, of each round.
        cpu_ratios: the same of seconds of a core, which other work on the machine changes less.
        probe_tflops: what a product of matrices reached just before and just after, 10^12 operations a second.
        note: of the comparison.
        conclusion: of `Comparison.conclude`.
    """

    case: str
    size: str
    name: str
    ways: dict[str, Way]
    ratios: dict[str, list[float]]
    cpu_ratios: dict[str, list[float]]
    probe_tflops: tuple[float, float]
    note: str = ""
    conclusion: "Conclusion | None" = None


@dataclass
class Conclusion:
    """What follows from a measurement.

    Attributes:
        words: one sentence.
        figures: by name.
    """

    words: str
    figures: dict[str, Any]
