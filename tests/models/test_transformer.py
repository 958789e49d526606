"""What all space-time transformers share: numbers, text, frame masks, training, mistakes.

Files, offloading, caches and adapters are in `tests/contract/test_transformers.py`.
"""

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from tiny_pipeline import make_pipeline, seeded
from tiny_transformers import CLIP, MODELS, SIZES, TINY, build, channels, inputs, some_frames_kept
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opensora.errors import OpenSoraError
from opensora.models.clip_conditions import ClipConditions
from opensora.models.stdit import STDiT
from opensora.models.stdit2 import STDiT2
from opensora.models.stdit3 import STDiT3
from opensora.models.stdit4 import STDiT4

CONDITIONS = replace(CLIP, aspect_ratio=32 / 48)
TOLD: dict[Any, set[str]] = {STDiT: set(), STDiT2: set(asdict(CONDITIONS))} | {
    cls: {"fps", "height", "width"} for cls in (STDiT3, STDiT4)
}


@pytest.fixture(scope="module", params=MODELS)
def shared(request) -> Any:
    """One model of each kind for the tests that change nothing about it."""
    return build(request.param).requires_grad_(False)


@pytest.fixture(params=MODELS)
def model(request) -> Any:
    return build(request.param)


def equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# ---- what comes out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", MODELS)
@pytest.mark.parametrize("size", [(1, 4, 4), (3, 5, 7), (2, 1, 1)])
@pytest.mark.parametrize("patch_size", [(1, 2, 2), (2, 2, 3)])
def test_any_size_and_patch(cls, patch_size, size):
    sample = build(cls, patch_size=patch_size)(**inputs(size=size), **SIZES).sample
    assert sample.shape == (2, 6, *size)
    assert sample.isfinite().all()


@pytest.mark.parametrize("cls", MODELS)
def test_without_a_learned_variance(cls):
    assert build(cls, pred_sigma=False)(**inputs(), **SIZES).sample.shape[1] == 3


@pytest.mark.parametrize("cls", [STDiT, STDiT2, STDiT3])
def test_fresh_model_predicts_zero_from_untouched_tokens(cls):
    torch.manual_seed(0)
    fresh, seen = cls(**TINY), []
    fresh.blocks[0].register_forward_hook(lambda _module, args, out: seen.append((args[0], out)))
    assert not fresh(**inputs(), **SIZES).sample.any()
    ((before, after),) = seen
    equal(after, before)


def test_same_seed_same_numbers(shared):
    equal(build(type(shared))(**inputs(), **SIZES).sample, shared(**inputs(), **SIZES).sample)


# ---- what it is told of a clip --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", asdict(CONDITIONS))
def test_what_a_model_is_told_matters_and_nothing_else(shared, name):
    plain = shared(**inputs(), clip_conditions=CONDITIONS).sample
    changed = replace(CONDITIONS, **{name: getattr(CONDITIONS, name) * 0.5})
    assert torch.allclose(shared(**inputs(), clip_conditions=changed).sample, plain) != (name in TOLD[type(shared)])


def test_timestep_matters(shared):
    earlier = {**inputs(), "timestep": inputs()["timestep"] * 0.5}
    assert not torch.allclose(shared(**inputs(), **SIZES).sample, shared(**earlier, **SIZES).sample)


def test_each_sample_has_its_own_conditions(shared):
    """Sizes, lengths and frame rates may differ within a batch, or be one number."""
    arguments = inputs()
    times = {"height": 1, "width": 1} if isinstance(shared, STDiT4) else {}  # its windows turn alike in all samples
    conditions = {name: torch.tensor([value, value * times.get(name, 2)]) for name, value in asdict(CONDITIONS).items()}
    both = shared(**arguments, clip_conditions=ClipConditions(**conditions)).sample
    mixed = shared(**arguments, clip_conditions=ClipConditions(**{**conditions, "height": 32.0})).sample
    torch.testing.assert_close(mixed[0], both[0], atol=1e-6, rtol=1e-5)
    for i in range(2):
        one = {name: value[i : i + 1] for name, value in arguments.items()}
        alone = ClipConditions(**{name: value[i].item() for name, value in conditions.items()})
        sample = shared(**one, clip_conditions=alone).sample
        torch.testing.assert_close(sample[0], both[i], atol=1e-6, rtol=1e-5)


# ---- conditioning frames --------------------------------------------------------------------------------------------


def test_frame_mask_of_ones_is_no_mask(shared):
    mask = torch.ones(2, 3, dtype=torch.bool)
    equal(shared(**inputs(), **SIZES, frame_mask=mask).sample, shared(**inputs(), **SIZES).sample)


@pytest.mark.parametrize("cls", [STDiT2, STDiT3])
def test_conditioning_frames_ignore_the_timestep(cls):
    """With every frame given, the blocks never see the timestep; the last layer alone still does."""
    model, seen = build(cls).requires_grad_(False), []
    model.blocks[-1].register_forward_hook(lambda _module, _args, out: seen.append(out))
    mask = torch.zeros(2, 3, dtype=torch.bool)
    for timestep, frame_mask in ((0.0, mask), (700.0, mask), (0.0, None)):
        model(**{**inputs(), "timestep": timestep}, **SIZES, frame_mask=frame_mask)
    equal(seen[0], seen[1])
    torch.testing.assert_close(seen[0], seen[2], rtol=1e-5, atol=1e-6)


# ---- text -----------------------------------------------------------------------------------------------------------


def test_text_context_equals_plain_and_is_projected_once(shared):
    arguments, calls = inputs(), []
    text = {name: arguments.pop(name) for name in ("encoder_hidden_states", "encoder_attention_mask")}
    expected = {timestep: shared(**{**arguments, "timestep": timestep}, **text, **SIZES) for timestep in (900.0, 100.0)}
    handles = [block.cross_attn.kv_linear.register_forward_hook(lambda *_: calls.append(1)) for block in shared.blocks]
    context = shared.encode_text(*text.values())
    for timestep, plain in expected.items():
        equal(shared(**{**arguments, "timestep": timestep}, text_context=context, **SIZES).sample, plain.sample)
    for handle in handles:
        handle.remove()
    assert len(calls) == len(shared.blocks)


def test_padding_tokens_do_not_matter(shared):
    arguments = inputs()
    before = shared(**arguments, **SIZES).sample
    arguments["encoder_hidden_states"][arguments["encoder_attention_mask"] == 0] = 1e4
    equal(shared(**arguments, **SIZES).sample, before)
    short = {name: value[1:] for name, value in arguments.items()}
    for name in ("encoder_hidden_states", "encoder_attention_mask"):
        short[name] = short[name][:, :4]
    torch.testing.assert_close(shared(**short, **SIZES).sample, before[1:], atol=1e-6, rtol=1e-5)


def test_drop_text_reads_the_null_text(shared):
    arguments = inputs()
    null = arguments["encoder_hidden_states"].clone()
    null[0] = shared.null_text[:6]
    expected = shared(**{**arguments, "encoder_hidden_states": null}, **SIZES).sample
    equal(shared(**arguments, drop_text=torch.tensor([True, False]), **SIZES).sample, expected)


def test_weights_that_are_away_project_in_forward(model):
    """`encode_text` with its weights away stores the text; a block whose weights were away projects for itself."""
    model.requires_grad_(False)
    arguments = inputs()
    expected = model(**arguments, **SIZES).sample
    text = arguments.pop("encoder_hidden_states"), arguments.pop("encoder_attention_mask")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for away in (model.y_embedder, model.blocks[1].cross_attn):
        away.to("meta")
        context = model.encode_text(*text)
        model.load_state_dict(state, assign=True)
        equal(model(**arguments, text_context=context, **SIZES).sample, expected)


# ---- training -------------------------------------------------------------------------------------------------------


def gradients(model: Any) -> dict[str, Any]:
    model.train().zero_grad()
    text = inputs()["encoder_hidden_states"].requires_grad_()
    arguments = {**inputs(), "encoder_hidden_states": text, "drop_text": torch.tensor([True, False])}
    arguments |= {"frame_mask": some_frames_kept(), **channels(model)}
    model(**arguments, **SIZES).sample.square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad} | {"text": text.grad}


@pytest.mark.parametrize("cls", MODELS)
@pytest.mark.parametrize("learn_null_text", [True, False])
def test_gradients_reach_everything(cls, learn_null_text):
    found = gradients(build(cls, learn_null_text=learn_null_text))
    assert ("y_embedder.y_embedding" in found) == learn_null_text
    assert "rope.freqs" not in found
    assert not [name for name, gradient in found.items() if gradient is None or not gradient.any()]
    assert not found["text"][0].any(), "a dropped caption has no gradient"
    assert found["text"][1].any()


def test_encode_text_is_differentiable(model):
    arguments = inputs()
    text, mask = arguments.pop("encoder_hidden_states").requires_grad_(), arguments.pop("encoder_attention_mask")
    model(**arguments, text_context=model.encode_text(text, mask), **SIZES).sample.sum().backward()
    assert text.grad is not None and text.grad[0].any()
    assert not text.grad[1, 4:].any(), "padding has no gradient"


def test_gradient_checkpointing_by_a_function_of_ones_own(model):
    """Which blocks are computed again is the caller's choice."""
    plain, seen = {name: gradient.clone() for name, gradient in gradients(model).items()}, []

    def first_block_only(block: Any, *arguments: Any) -> Any:
        seen.append(block)
        again = block is model.blocks[0]
        return checkpoint(block, *arguments, use_reentrant=False) if again else block(*arguments)

    model.enable_gradient_checkpointing(first_block_only)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, plain[name], msg=name)
    assert seen == list(model.blocks)


@pytest.mark.parametrize("mode", ["autocast", "whole"])
def test_bf16(model, mode):
    """bf16 stays near float32, and the tokens stay bf16 from block to block."""
    arguments, dtypes = {**inputs(), **SIZES, "frame_mask": some_frames_kept()}, set()
    expected = model(**arguments).sample
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _args, out: dtypes.add(out.dtype))
    if mode == "whole":
        sample = model.to(torch.bfloat16)(**arguments).sample
    else:
        with torch.autocast("cpu", torch.bfloat16):
            sample = model(**arguments).sample
    assert dtypes == {torch.bfloat16}
    assert (sample.float() - expected).abs().mean() < 0.04 * expected.abs().mean()


def test_timesteps_are_not_rounded(model):
    """999 and 1000 are one number in bf16; the model tells them apart all the same."""
    seen: list[Tensor] = []
    model.to(torch.bfloat16).t_embedder.register_forward_hook(lambda _module, _args, out: seen.append(out))
    for timestep in (999, 1000):
        model(**{**inputs(), "timestep": torch.tensor([timestep, timestep])}, **SIZES)
    assert not torch.equal(seen[0], seen[1])


# ---- as a part ------------------------------------------------------------------------------------------------------


def test_blocks_are_registered(shared):
    assert {type(block) for block in shared.blocks} == {type(shared.blocks[0])}
    assert [type(shared.blocks[0]).__name__] == shared._no_split_modules == shared._repeated_blocks
    assert TransformerBlockRegistry.get(type(shared.blocks[0])).return_hidden_states_index == 0


@pytest.mark.parametrize("cls", MODELS)
def test_pipeline(cls):
    """The pipeline calls every transformer of the family alike."""
    pipeline = make_pipeline("iddpm")
    width, length = pipeline.transformer.null_text.shape[1], pipeline.transformer.null_text.shape[0]
    other = build(cls, in_channels=4, caption_channels=width, model_max_length=length)
    pipeline.register_modules(transformer=other)
    frames = pipeline("a red ball moves left", num_inference_steps=2, generator=seeded(0), output_type="pt").frames
    assert frames.shape == (1, 5, 3, 16, 24)
    assert frames.isfinite().all()


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_states": torch.zeros(2, 4, 3, 4, 6)}, r"expected \(B, 3, T, H, W\)"),
        ({"encoder_hidden_states": torch.zeros(2, 6, 9)}, r"expected \(B, L, 10\)"),
        ({"encoder_hidden_states": torch.zeros(2, 8, 10), "encoder_attention_mask": None}, "at most 7"),
        ({"encoder_hidden_states": torch.zeros(1, 6, 10), "encoder_attention_mask": None}, "the text has 1 samples"),
        ({"encoder_hidden_states": None}, "no text"),
        ({"encoder_attention_mask": torch.ones(2, 5)}, r"expected \(2, 6\)"),
        ({"encoder_attention_mask": torch.tensor([[1] * 6, [0] * 6])}, "hides every token"),
        ({"frame_mask": torch.ones(2, 4, dtype=torch.bool)}, r"expected torch.bool \(2, 3\)"),
        ({"frame_mask": torch.ones(2, 3)}, "torch.float32"),
        ({"timestep": torch.ones(3)}, r"\(2,\)"),
        ({"drop_text": torch.ones(1, dtype=torch.bool)}, "drop_text"),
    ],
)
def test_mistakes(shared, changes, message):
    with pytest.raises(OpenSoraError, match=message) as error:
        shared(**{**inputs(), **SIZES, **changes})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cls", [STDiT2, STDiT3, STDiT4])
def test_mistakes_of_what_is_told(cls):
    model = build(cls)
    with pytest.raises(TypeError, match="clip_conditions"):
        model(**inputs())
    for name in ("fps", "height"):
        with pytest.raises(OpenSoraError, match=rf"{name}.*\(2,\)"):
            model(**inputs(), clip_conditions=replace(CLIP, **{name: torch.ones(3)}))


@pytest.mark.parametrize("cls", MODELS)
def test_mistakes_of_configuration(cls):
    with pytest.raises(OpenSoraError, match="hidden_size 26"):
        cls(**{**TINY, "hidden_size": 26})
    with pytest.raises(OpenSoraError, match="patch_size"):
        cls(**{**TINY, "patch_size": (2, 2)})
    with pytest.raises(OpenSoraError, match="patches of one frame"):
        build(cls, patch_size=(3, 2, 2))(**inputs(), **SIZES, frame_mask=torch.ones(2, 3, dtype=torch.bool))


def test_one_text_or_the_other(shared):
    with pytest.raises(OpenSoraError, match="give either"):
        shared(**inputs(), **SIZES, text_context=shared.encode_text(torch.zeros(2, 1, 10)))
