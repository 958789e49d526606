"""`opensora push`: a model's folder, put on the Hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from opensora.cli.options import FLAG, option
from opensora.cli.progress import ReadingBar, quiet_libraries, say


@dataclass(frozen=True)
class Push:
    """Put a model's folder on the Hub, where `--model ORG/NAME --download` finds it.

    First the folder is looked over as by `opensora inspect`; if anything is wrong, nothing is uploaded. Of the folder
    only what the model is read from goes there, in one commit, with its README.md, or with one that says what the model
    is. The token is the one of `hf auth login`, or HF_TOKEN.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")]
    """Folder of a whole model, or a finished training run."""
    repository: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ORG/NAME", help_behavior_hint="")]
    """Where it goes; made if there is none."""
    private: Annotated[bool, FLAG] = False
    """Nobody else may see it; a repository that is public is refused."""
    revision: Annotated[str | None, option("BRANCH", "main")] = None
    """Branch that it goes to, made if there is none; it is loaded as ORG/NAME@BRANCH."""
    license: Annotated[str | None, option("NAME", "not said")] = None
    """Licence for the model card, as the Hub writes it: apache-2.0, mit, other, ..."""
    dry_run: Annotated[bool, FLAG] = False
    """Say what would go, and the card, and upload nothing."""

    def run(self) -> None:
        from opensora.checkpoints.publishing import prepare_upload, upload
        from opensora.checkpoints.wording import megabytes

        quiet_libraries()
        with ReadingBar() as progress:
            prepared = prepare_upload(
                self.folder.expanduser(),
                self.repository,
                revision=self.revision,
                licence=self.license,
                on_progress=progress.update,
            )
        if prepared.left_out:
            say(f"not uploaded, for no model is read from it: {', '.join(prepared.left_out)}")
        if self.dry_run:
            print("\n".join([*prepared.files, *([] if prepared.card is None else ["", prepared.card.rstrip()])]))
            return
        say(f"uploading {len(prepared.files)} files, {megabytes(prepared.size_bytes)}")
        commit = upload(prepared, private=self.private)
        print(f"{self.repository}@{commit}")
