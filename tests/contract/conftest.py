"""Pipelines of each generation and scheduler."""

from collections.abc import Iterator

import pytest
import torch
from published_pipelines import PIPELINES, pipeline_of

from opensora.pipeline import OpenSoraPipeline


@pytest.fixture(scope="module", params=PIPELINES)
def kept(request: pytest.FixtureRequest) -> OpenSoraPipeline:
    """A tiny pipeline of each kind, not to be changed."""
    return pipeline_of(*PIPELINES[request.param])


@pytest.fixture(params=PIPELINES)
def pipe(request: pytest.FixtureRequest) -> OpenSoraPipeline:
    """A tiny pipeline of each kind, to be changed."""
    return pipeline_of(*PIPELINES[request.param])


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums of several threads of one operator depend on how busy a machine is."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
