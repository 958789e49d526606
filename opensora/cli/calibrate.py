"""`opensora calibrate`: which predictions of a model can be forecast, found on clips that are made exactly."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional

from opensora import limits
from opensora.checkpoints.published import BUNDLED
from opensora.cli.options import option
from opensora.cli.progress import Progress, quiet_libraries, say
from opensora.errors import OpenSoraError
from opensora.files import check_writable
from opensora.generation.request import DEFAULT_MODEL, ClipRequest

if TYPE_CHECKING:
    from opensora.generation.fast import Calibration


@dataclass(frozen=True)
class Calibrate:
    """Find out which steps generate --fast computes, and which it forecasts.

    A few clips are made exactly, and what the network says of them at every step is compared. The file is for this
    model, so sampled, and this number of steps.
    """

    model: Annotated[Positional[str], option("NAME|FOLDER", DEFAULT_MODEL)] = DEFAULT_MODEL
    """Name or folder of the model."""
    num_inference_steps: Annotated[str | None, option("N", "the model's")] = None
    """Sampling steps; for IDDPM models also a respacing such as ddim50."""
    sampler: Annotated[str | None, option("NAME", "the model's")] = None
    """As generate's."""
    time_shift: Annotated[float | None, option("S", "the model's")] = None
    """As generate's."""
    prompts: int = 8
    """How many clips are made."""
    prompt_path: Annotated[Path | None, option("FILE", "captions of the toy world, for bundled models")] = None
    """Text file with as many prompts or more, one a line, such as the model will be given."""
    num_frames: Annotated[str | None, option("N|4s", "the model's")] = None
    """Length of the clips; short ones are quicker, and tell nearly as much."""
    resolution: Annotated[str | None, option("NAME", "the model's")] = None
    """Size of the clips, such as 240p, likewise."""
    output: Annotated[Path | None, option("FILE", "in the model's folder, where --fast finds it")] = None
    """JSON file of what was found; generate takes it with --calibration."""
    device: Annotated[str | None, option("NAME", "an accelerator if there is one, else cpu")] = None
    """cpu, cuda, cuda:1, mps."""
    dtype: Annotated[str | None, option("NAME", "float32 on the cpu, else bfloat16")] = None
    """Numbers the networks compute in."""

    def run(self) -> None:
        from opensora.generation.calibrating import calibrate
        from opensora.generation.engine import Engine
        from opensora.generation.loading import locate_model
        from opensora.settings import save_settings

        requests = self._requests()
        for request in requests:
            request.check()
        locate_model(requests[0])
        output = self._output()
        check_writable(output)
        quiet_libraries()
        engine = Engine.load(requests[0])
        with Progress("calibrating") as progress:
            found = calibrate(engine, requests, progress.update)
        save_settings(found, output)
        _print_found(found)
        print(output)

    def _requests(self) -> list[ClipRequest]:
        """The clips that are made."""
        names = ("model", "num_inference_steps", "sampler", "time_shift", "num_frames", "resolution", "device", "dtype")
        wishes = {name: value for name in names if (value := getattr(self, name)) is not None}
        return [ClipRequest(prompt, seed=seed, **wishes) for seed, prompt in enumerate(self._prompts())]

    def _prompts(self) -> list[str]:
        from opensora.evaluation.suites import read_suite
        from opensora.generation.calibrating import toy_prompts

        limits.check_count("`prompts`", self.prompts, limits.CLIPS)
        if self.prompt_path is not None:
            return [prompt.text for prompt in read_suite(self.prompt_path, self.prompts)]
        if self.model not in BUNDLED:
            raise OpenSoraError(
                f"which prompts is {self.model} given? name a text file with {self.prompts} of them, one a line, as "
                "`prompt_path`"
            )
        return toy_prompts(self.prompts)

    def _output(self) -> Path:
        """Where the model's own calibrations lie, or a file here for a model that has no folder of its own."""
        from opensora.checkpoints.source import ModelSource
        from opensora.generation.fast import FOLDER

        if self.output is not None:
            return self.output
        sampled = (self.num_inference_steps or "default", self.sampler, self.time_shift)
        name = "-".join(f"{part}" for part in sampled if part is not None)
        folder = ModelSource.find(self.model).folder
        if folder is None or self.model in BUNDLED:
            return Path(f"{self.model}-{name}.json")
        return folder / FOLDER / f"{name}.json"


def _print_found(found: "Calibration") -> None:
    """What each way of `--fast` comes to."""
    from opensora.cli.tables import print_table
    from opensora.sampling.forecast_plan import FAST

    rated = {name: found.rated(name) for name in FAST}
    rows = [
        (name, f"{one.evaluations} of {found.evaluations}", f"{100 * one.error:.1f} %") for name, one in rated.items()
    ]
    print_table(("--fast", "evaluations", "error of the forecasts"), rows)
    say(f"{found.model}, {found.num_steps} steps, {found.num_prompts} clips")
