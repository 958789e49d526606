"""Settings and options without effect are errors, and so are runs that learnt nothing."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tiny_pipeline import make_pipeline

from opensora.cli.main import main
from opensora.data.cached import CachedLatents
from opensora.data.clips import ManifestClips
from opensora.errors import OpenSoraError
from opensora.generation.engine import Engine
from opensora.generation.request import ClipRequest
from opensora.overrides import apply_overrides
from opensora.recipes import RECIPES, find_recipe
from opensora.training.diffusion.networks import DiffusionNetworks
from opensora.training.diffusion.previews import Prompts
from opensora.training.diffusion.text import CachedText
from opensora.training.trainer import Trainer

BALL = "a red ball rolls left"


# --- recipes


@pytest.mark.parametrize(
    ("recipe", "setting", "reason"),
    [
        ("v1_2_debug", "loop.preview_every=5", "objective.preview is none"),
        ("v1_2_debug", 'objective.preview={"type": "Prompts", "prompts": ["a cat"]}', "loop.preview_every is 0"),
        ("toybox", "loop.preview_every=5000", "the run has 1200 steps"),
        ("v1_2_debug", "loop.critic.lr=1e-3", "objective.discriminator is none"),
        ("v1_2_debug", "loop.optimizer.muon_lr=0.1", "AdamW updates all weights"),
        ("v1_2_debug", "loop.checkpoint_every=0 loop.keep_checkpoints=5", "keeps one"),
        ("v1_2_debug", "loop.ema_decay=0 loop.ema_warmup=false", "there is no average"),
        ("v1_2_debug", 'objective.new_parts=["temporal_blocks"]', "without objective.init_from"),
        ("v1_2_debug", "objective.sample_posterior=false", "are means"),
        ("toybox_lora", "objective.architecture=STDiT2", "that of objective.init_from"),
        ("toybox_lora", "objective.freeze_text_embedder=true", "an adapter alone is trained"),
        ("toybox_lora", "objective.text.exported=false", "an adapter alone is exported"),
        ("toybox_lora", "objective.object_weight=2", "the toybox's clips alone"),
        ("vae_small_stage1", "objective.train_encoder=true", "only stage pixels"),
        ("vae_small_stage3", "objective.identity_weight=1", "only stage latents"),
        ("vae_debug", "objective.preview_batches=1 loop.preview_every=0", "never come"),
    ],
)
def test_a_setting_without_effect_cannot_be_set(recipe, setting, reason):
    with pytest.raises(OpenSoraError, match=f"has no effect: .*{reason}"):
        apply_overrides(find_recipe(recipe), setting.split(" ") if "{" not in setting else [setting])


@pytest.mark.parametrize("make", RECIPES, ids=lambda make: make.__name__)
def test_settings_with_an_effect_can_be_set(make):
    recipe = apply_overrides(make(), ["loop.steps=9", "loop.preview_every=0", "loop.seed=3", "loop.optimizer.lr=1e-4"])
    assert recipe.loop.steps == 9


def test_previews_that_never_come_are_found_in_python_too(tmp_path):
    recipe = find_recipe("v1_2_debug")
    recipe = dataclasses.replace(recipe, loop=dataclasses.replace(recipe.loop, preview_every=2))
    with pytest.raises(OpenSoraError, match=r"loop.preview_every=2 has no effect: objective.preview is none"):
        Trainer(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("default", "says"),
    [
        ("height=x", "objective.defaults.height is 'x', expected int"),
        ("hieght=64", "did you mean objective.defaults.height?"),
        ("steps=5", "unknown setting objective.defaults.steps"),
        ("clean_prompts=maybe", "expected bool"),
        ("transformer=none", "unknown setting objective.defaults.transformer"),
    ],
)
def test_defaults_of_the_exported_pipeline_are_checked_at_once(default, says):
    with pytest.raises(OpenSoraError, match=r"objective.defaults") as caught:
        apply_overrides(find_recipe("v1_2_debug"), [f"objective.defaults.{default}"])
    assert says in str(caught.value)


def test_a_size_that_the_model_cannot_make_is_found_before_the_first_step():
    recipe = apply_overrides(find_recipe("v1_2_debug"), ["objective.defaults.height=63"])
    with pytest.raises(OpenSoraError, match="63"):
        DiffusionNetworks(recipe.objective, "meta")


# --- settings of other kinds of data


def test_a_table_takes_the_place_of_the_toy_world_by_its_name():
    data = apply_overrides(find_recipe("v1_2_debug"), ["objective.data.manifest=clips.csv"]).objective.data
    assert data == ManifestClips({"64x64": {"17": (1.0, 4)}}, manifest=Path("clips.csv"))
    settings = ['objective.data.buckets={"144p": {"17": [1.0, 2]}}', "objective.data.manifest=clips.csv"]
    data = apply_overrides(find_recipe("v1_2_debug"), settings).objective.data
    assert data.buckets == {"144p": {"17": [1.0, 2]}} and data.manifest == Path("clips.csv")
    vae = apply_overrides(find_recipe("vae_debug"), ["objective.data.manifest=clips.csv"]).objective.data
    assert isinstance(vae, ManifestClips) and vae.manifest == Path("clips.csv")


def test_the_kind_is_chosen_by_what_only_one_has():
    recipe = apply_overrides(find_recipe("v1_2_debug"), ["objective.data.folder=cache"])
    assert recipe.objective.data == CachedLatents(Path("cache"))
    settings = ['objective.preview.prompts=["a cat"]', "loop.preview_every=5"]
    assert apply_overrides(find_recipe("v1_2_debug"), settings).objective.preview == Prompts(("a cat",))
    with pytest.raises(OpenSoraError, match=r"did you mean|known:"):
        apply_overrides(find_recipe("v1_2_debug"), ["objective.data.manifets=clips.csv"])


@pytest.mark.parametrize(
    ("setting", "meant"),
    [
        ("steps=3", "loop.steps"),
        ("lr=3", "loop.optimizer.lr"),
        ("loop.step=3", "loop.steps"),
        ("loop.optimizer.warmup=3", "loop.optimizer.warmup_steps"),
        ("objective.dat.manifest=x", "objective.data"),
        ("optimizer.lr=3", "loop.optimizer.lr"),
    ],
)
def test_suggestions_name_the_whole_key(setting, meant):
    with pytest.raises(OpenSoraError, match=f"did you mean .*{meant}"):
        apply_overrides(find_recipe("v1_2_debug"), [setting])


def test_a_cache_is_named_by_its_folder(tmp_path, capsys):
    from opensora.training.diffusion.precompute import on_cache

    (tmp_path / "cache").mkdir()
    recipe = find_recipe("vae_debug")
    with pytest.raises(OpenSoraError, match="no use for `cache`"):
        on_cache(recipe.name, recipe.objective, tmp_path / "cache")
    assert main(["train", "v1_2_debug", "--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert isinstance(find_recipe("overfit").objective.text, CachedText)


# --- runs that learn nothing


def test_text_states_that_are_no_numbers_stop_a_run_and_nothing_is_exported(tmp_path):
    recipe = apply_overrides(
        find_recipe("v1_2_debug"),
        [
            "loop.steps=2",
            "objective.data.num_clips=4",
            "objective.data.other_lengths=[]",
            "objective.data.batch_size=2",
        ],
    )
    trainer = Trainer(recipe, tmp_path / "run")
    encoder = trainer.task.networks.captions.encoders["text_encoder"]  # type: ignore[attr-defined]
    torch.nn.init.constant_(encoder.encoder.final_layer_norm.weight, float("nan"))
    with pytest.raises(OpenSoraError, match=r"the text states of .* hold NaN"):
        trainer.run()
    assert not (tmp_path / "run" / "model").exists()


# --- options of generate


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"guidance_scale": 1.0, "negative_prompt": "a red ball rolls"}, "`negative_prompt` has no effect"),
        ({"guidance_scale": 1.0, "cfg_channels": 3}, "`cfg_channels` has no effect"),
        ({"guidance_scale": 1.0, "equivalent_to": 3}, "`equivalent_to` has no effect"),
        ({"channel_scales": "0-3:1", "negative_prompt": "a red ball rolls"}, "all `channel_scales` are 1"),
        ({"condition_frame_edit": 0.5, "loop": 1}, "`condition_frame_edit` has no effect"),
        ({"condition_frame_length": 1, "loop": 1}, "`condition_frame_length` has no effect"),
        ({"frame_interval": 2, "save_fps": 8.0}, "`frame_interval` has no effect: `save_fps`"),
    ],
)
def test_wishes_without_effect_are_refused(wish, says):
    engine = Engine(make_pipeline())
    with pytest.raises(OpenSoraError) as caught:
        engine.prepare([ClipRequest(BALL, **wish)])
    assert says in str(caught.value)
    Engine(make_pipeline(), allows_idle=True).prepare([ClipRequest(BALL, **wish)])  # older clips may have been made so


def test_a_model_that_is_not_guided_says_so():
    engine = Engine(make_pipeline(guidance_scale=1.0))
    with pytest.raises(OpenSoraError, match="`guidance_scale` is 1 in this model"):
        engine.prepare([ClipRequest(BALL, "a blue ball rolls left")])
    engine.prepare([ClipRequest(BALL, "", guidance_scale=1)])
    engine.pipeline.sequential_guidance = True
    with pytest.raises(OpenSoraError, match="`sequential_guidance` has no effect"):
        engine.prepare([ClipRequest(BALL)])


def test_a_score_that_the_prompt_says_already():
    from opensora.generation.resolve import check_effects, resolve

    request = ClipRequest(f"{BALL} aesthetic score: 5.0.", scores={"aesthetic": 6.0})
    with pytest.raises(OpenSoraError, match="says its aesthetic score already"):
        check_effects(request, resolve(make_pipeline(), request))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["evaluate", "loss", "--manifest", "m.csv", "--sizes", "32x32"], "--sizes has no effect: it is for toy clips"),
        (["evaluate", "loss", "--cache", "cache", "--batch-size", "3"], "--batch-size has no effect"),
        (["evaluate", "loss", "--frame-interval", "2"], "--frame-interval has no effect"),
        (["evaluate", "loss", "--scores"], "--scores has no effect: it is for the clips of --manifest"),
        (["data", "precompute", "overfit", "--no-text", "--text-dtype", "float32"], "--text-dtype has no effect"),
        (["generate", BALL, "--skip-comments"], "--skip-comments is for the lines of --prompt-path"),
        (["generate", BALL, "--start-index", "1"], "choose lines of --prompt-path"),
        (["generate", BALL, "--align", "4"], "--align moves the frames of --reference-path"),
    ],
)
def test_options_without_effect_are_refused(args, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and says in err
    assert not list(tmp_path.iterdir())


def test_the_recorded_settings_stay_json():
    assert json.loads(ClipRequest(BALL, "").to_json())["negative_prompt"] == ""
