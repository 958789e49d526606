"""The options of prompt refinement, and the key, which comes from a file or a variable that the user names."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from opensora.cli.jobs import Job
from opensora.cli.options import given_options, option
from opensora.errors import OpenSoraError

if TYPE_CHECKING:
    from opensora.refinement import Refiner


@dataclass(frozen=True)
class RefinementOptions:
    """A language model of your choice writes the prompt out first; off unless an endpoint is named."""

    refine_endpoint: Annotated[str | None, option("URL")] = None
    """Server that speaks OpenAI's chat completions, such as http://localhost:8000/v1."""
    refine_model: Annotated[str | None, option("NAME")] = None
    """Name of the language model there."""
    refine_key_file: Annotated[Path | None, option("FILE")] = None
    """File that holds the key, if one is needed; it is never shown or recorded."""
    refine_key_env: Annotated[str | None, option("NAME")] = None
    """Environment variable that holds the key instead."""

    def refiner(self, closed_vocabulary: str | None) -> "Refiner | None":
        """What refines prompts; None if that was not asked for.

        Args:
            closed_vocabulary: name of a model that knows few words; None for any other.

        Raises:
            OpenSoraError: half of the options, an unreadable key, or a model that would not know the words.
        """
        from opensora.refinement import Refiner

        if not any(given_options(self)):
            return None
        if self.refine_endpoint is None or self.refine_model is None:
            raise OpenSoraError("refining the prompt needs both --refine-endpoint URL and --refine-model NAME")
        if closed_vocabulary is not None:
            raise OpenSoraError(f"{closed_vocabulary} knows a closed list of words, so its prompts cannot be refined")
        return Refiner(self.refine_endpoint, self.refine_model, self._key())

    def _key(self) -> str | None:
        if self.refine_key_file is not None and self.refine_key_env is not None:
            raise OpenSoraError("--refine-key-file and --refine-key-env both say the key; give one of them")
        if self.refine_key_env is not None:
            if self.refine_key_env not in os.environ:
                raise OpenSoraError(f"the environment variable {self.refine_key_env} (--refine-key-env) is not set")
            return os.environ[self.refine_key_env].strip()
        if self.refine_key_file is None:
            return None
        try:
            return self.refine_key_file.expanduser().read_text(encoding="utf-8").strip()
        except OSError as error:
            raise OpenSoraError(f"key file {self.refine_key_file} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise OpenSoraError(f"key file {self.refine_key_file} cannot be read: it is not text") from None


def refine_jobs(refiner: "Refiner", jobs: Sequence[Job]) -> list[Job]:
    """The jobs with refined prompts; a prompt of several clips is refined once."""
    refined = {prompt: refiner.refine(prompt) for prompt in dict.fromkeys(job.prompt for job in jobs)}
    return [job.refined(refined[job.prompt]) for job in jobs]
