"""`opensora data`: tables of clips, and what training will make of them."""

from typing import Annotated

import tyro

from opensora.cli.data_manifest import DataManifest
from opensora.cli.data_plan import DataPlan
from opensora.cli.data_precompute import DataPrecompute

Data = (
    Annotated[DataManifest, tyro.conf.subcommand("manifest")]
    | Annotated[DataPlan, tyro.conf.subcommand("plan")]
    | Annotated[DataPrecompute, tyro.conf.subcommand("precompute")]
)
"""What `opensora data` can do; every member has `run()`."""
