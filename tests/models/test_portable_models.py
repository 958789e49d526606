"""The precision of loaded models, which must not depend on whether accelerate is there."""

from typing import Any

import pytest
import torch
from tiny_transformers import MODELS, build

from opensora.evaluation.judge import Judge

KINDS = [*MODELS, "Judge"]


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_end_in_the_precision_asked_for(kind: Any, dtype: torch.dtype, low_cpu_mem_usage: bool, tmp_path):
    model = Judge(dim=8) if kind == "Judge" else build(kind)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(
        tmp_path, torch_dtype=dtype, low_cpu_mem_usage=low_cpu_mem_usage, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    stored = loaded.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(stored[name].float(), value.to(stored[name].dtype).float())
    assert type(model).from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).dtype == torch.float32
