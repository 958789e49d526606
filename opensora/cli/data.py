"""`opensora data`: tables of clips, and what training will make of them."""

from typing import Annotated

import tyro

from opensora.cli.data_manifest import DataManifest
from opensora.cli.data_plan import DataPlan

Data = Annotated[DataManifest, tyro.conf.subcommand("manifest")] | Annotated[DataPlan, tyro.conf.subcommand("plan")]
"""What `opensora data` can do; every member has `run()`."""
