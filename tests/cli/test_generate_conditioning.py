"""Conditioning frames on the command line, with a real, tiny, untrained model: they are where they should be, twice."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipeline import make_autoencoder, make_pipeline

from opensora.cli.main import main
from opensora.media.read import read_metadata, read_video
from opensora.media.transforms import to_video
from opensora.media.write import write_video

PROMPT = "a small red ball rolls left"
HEIGHT, WIDTH = 16, 24


def frames_of(num_frames, seed):
    """Smooth ones, which no codec harms much."""
    noise = torch.rand(1, 3, 3, 2, 3, generator=torch.Generator().manual_seed(seed))
    size = (num_frames, HEIGHT, WIDTH)
    video = torch.nn.functional.interpolate(noise, size=size, mode="trilinear", align_corners=True)
    return (video[0].permute(1, 2, 3, 0) * 255).round().to(torch.uint8).numpy()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    make_pipeline("flow", num_frames=18, num_inference_steps=2).save_pretrained(folder)
    return folder


@pytest.fixture
def run(saved, tmp_path, monkeypatch):
    """Runs `opensora generate` with files at hand, and returns the frames."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("first", "last")):
        Image.fromarray(frames_of(1, seed)[0]).save(f"{name}.png")
    write_video("clip.png", frames_of(20, 2), 8)  # a sheet, exact to the bit

    def generate(*args, prompt=PROMPT, output="out.png"):
        prompts = [] if "--from" in args else [prompt]
        code = main(["generate", *prompts, "--model", str(saved), *args, "--output", output])
        return read_video(output)[0] if code == 0 else None

    return generate


def close(frames, video):
    """Frames uint8 (T, H, W, 3) and what the autoencoder makes of a video (3, T, H, W), from the front on."""
    expected = (video.permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1) * 255
    np.testing.assert_allclose(frames.astype(float), expected.numpy(), atol=1.001)


def reconstruction(video):
    autoencoder = make_autoencoder()
    with torch.no_grad():
        return autoencoder.decode_latents(autoencoder.encode_video(video[None]), video.shape[1])[0]


def picture(name):
    return to_video(np.asarray(Image.open(f"{name}.png").convert("RGB"))[None])


def clip(frames=slice(None)):
    return to_video(frames_of(20, 2)[frames])


# --- readable ---------------------------------------------------------------------------------------------------------


def test_a_clip_begins_with_an_image_and_ends_with_another(run):
    """17 frames are a chunk of the autoencoder and the 18th is one, so both are what they are alone."""
    frames = run("--image", "first.png", "--last-image", "last.png")
    close(frames[:1], reconstruction(picture("first")))
    close(frames[17:], reconstruction(picture("last")))
    plain = run()
    assert np.abs(frames[:1].astype(int) - plain[:1]).mean() > 5
    only_last = run("--last-image", "last.png")
    close(only_last[17:], reconstruction(picture("last")))
    assert np.abs(only_last[:1].astype(int) - frames[:1]).mean() > 5


def test_a_clip_goes_on_where_another_ends(run):
    frames = run("--extend", "clip.png")
    close(frames[:5], reconstruction(clip(slice(15, 20))))  # 2 latent frames
    frames = run("--extend", "clip.png", "--condition-frame-length", "3")
    close(frames[:9], reconstruction(clip(slice(11, 20))))


def test_a_clip_ends_where_another_begins(run):
    frames = run("--extend", "clip.png", "--backwards", "--num-frames", "34")
    close(frames[17:], reconstruction(clip(slice(17))))


def test_an_edited_clip_is_kept_or_forgotten_by_strength(run, capsys):
    kept = run("--edit", "clip.png", "--strength", "0")
    assert len(kept) == 20 and "are edited" not in capsys.readouterr().err
    close(kept, reconstruction(clip()))
    forgotten = run("--edit", "clip.png", "--strength", "1", "--num-frames", "18")
    np.testing.assert_allclose(forgotten.astype(int), run().astype(int), atol=1)
    half = run("--edit", "clip.png", "--strength", "0.5")
    assert np.abs(half.astype(int) - kept).mean() > 1


def test_as_much_is_edited_as_the_model_can_make(run, capsys):
    write_video("long.mp4", frames_of(40, 3), 8)
    assert len(run("--edit", "long.mp4", "--strength", "0.5")) == 34
    assert "note: the first 34 of 40 frames are edited" in capsys.readouterr().err


def test_files_of_other_sizes_are_resized_and_cropped(run, capsys):
    Image.fromarray(np.repeat(np.repeat(frames_of(1, 0)[0], 2, 0), 2, 1)).save("twice.png")
    with Image.open("first.png") as image:
        image.resize((48, 16)).save("wide.jpg")
    twice = run("--image", "twice.png")
    assert "cropped" not in capsys.readouterr().err
    assert np.abs(twice[0].astype(int) - run("--image", "first.png")[0]).mean() < 3
    run("--image", "wide.jpg")
    assert "note: wide.jpg is 16x48 (height x width), cropped to the shape of 16x24" in capsys.readouterr().err


def test_another_speed_is_said(run, capsys):
    write_video("slow.mp4", frames_of(20, 3), 4)
    run("--extend", "slow.mp4")
    assert "note: slow.mp4 plays at 4 fps, the new clip at 8" in capsys.readouterr().err


def test_long_videos(run):
    frames = run("--loop", "3", "--num-frames", "17", "--image", "first.png", "--last-image", "last.png")
    assert len(frames) == 17 + 2 * (17 - 5)  # 2 latent frames carried over
    close(frames[:1], reconstruction(picture("first")))
    carried = ("--loop", "2", "--num-frames", "17", "--condition-frame-length", "3")
    assert len(run(*carried)) == 17 + 17 - 9
    first, second = run(*carried, prompt="|0|a red ball|1|a blue square"), run(*carried, prompt="a red ball")
    assert np.array_equal(first[:17], second[:17]) and not np.array_equal(first[17:], second[17:])
    anew = run(*carried, "--condition-frame-edit", "1")
    assert not np.array_equal(anew[17:], run(*carried)[17:])


# --- the scripts' syntax ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (("first.png", "0"), ("--image", "first.png")),
        (("first.png;last.png", "0;0,1,0,-1,1"), ("--image", "first.png", "--last-image", "last.png")),
        (("clip.png", "0,0,0,0,6,0.5"), ("--edit", "clip.png", "--strength", "0.5", "--num-frames", "18")),
    ],
)
def test_both_languages_mean_the_same(run, script, words):
    path, strategy = script
    by_option = run("--reference-path", path, "--mask-strategy", strategy)
    named = json.dumps({"reference_path": path, "mask_strategy": strategy})
    assert np.array_equal(by_option, run(prompt=PROMPT + named))
    np.testing.assert_allclose(by_option.astype(int), run(*words).astype(int), atol=1)


def test_references_in_the_words_of_1_3(run):
    references = ("--reference-path", "first.png;last.png", "--loop", "2", "--num-frames", "34")
    in_words = run(*references, "--cond-type", "i2v_loop")
    as_strategy = run(*references, "--mask-strategy", "0;1,1,0,-1,1", "--align", "1")
    assert in_words is not None and np.array_equal(in_words, as_strategy)


def test_references_for_later_loops(run):
    loops = ("--loop", "2", "--num-frames", "18", "--condition-frame-length", "2")
    frames = run(*loops, "--reference-path", "first.png;last.png", "--mask-strategy", "0;1,1,0,-1,1")
    close(frames[:1], reconstruction(picture("first")))
    close(frames[-1:], reconstruction(picture("last")))
    assert len(frames) == 18 + 13


def test_starts_are_aligned(run):
    """Latent frame 9 moves to 5, where the second chunk begins."""
    options = ("--reference-path", "last.png", "--mask-strategy", "0,0,0,9", "--num-frames", "34")
    aligned = run(*options, "--align", "5")
    close(aligned[17:18], reconstruction(picture("last")))
    assert np.abs(run(*options)[17].astype(int) - aligned[17]).mean() > 5


def test_what_a_prompt_says_itself_goes_before_the_options(run, saved, tmp_path):
    (tmp_path / "prompts.txt").write_text(f'{PROMPT}\n{PROMPT}{{"reference_path": "last.png"}}\n')
    options = ["--reference-path", "first.png", "--mask-strategy", "0", "--output", "both.png"]
    assert main(["generate", "--prompt-path", "prompts.txt", "--model", str(saved), *options]) == 0
    close(read_video("both-0.png")[0][:1], reconstruction(picture("first")))
    close(read_video("both-1.png")[0][:1], reconstruction(picture("last")))
    assert read_metadata("both-1.png")["prompt"] == PROMPT


# --- made again -------------------------------------------------------------------------------------------------------

WAYS = [
    ("--image", "first.png", "--last-image", "last.png"),
    ("--extend", "clip.png", "--backwards", "--num-frames", "18"),
    ("--edit", "clip.png", "--strength", "0.5"),
    ("--reference-path", "first.png;clip.png", "--mask-strategy", "0;1,1,2,-1,1", "--loop", "2", "--align", "1"),
]


@pytest.mark.parametrize("way", WAYS)
def test_a_clip_with_conditioning_frames_is_made_again(run, way):
    first = run(*way)
    assert np.array_equal(first, run("--from", "out.png", output="again.png"))
    assert read_metadata("again.png")["given"] == read_metadata("out.png")["given"]


def test_files_are_found_by_what_they_hold(run, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    shutil.move("first.png", "in/first.png")
    frames = run("--image", "in/first.png", output="made/out.png")
    record = (tmp_path / "made/out.png.json").read_text()
    assert str(tmp_path) not in record and '"first.png"' in record and "in/first" not in record
    again = ("--from", "made/out.png")
    capsys.readouterr()
    assert run(*again, output="again.png") is None
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "was made with first.png" in err and "it is not beside the clip" in err
    shutil.copy("last.png", "first.png")
    assert run(*again, output="again.png") is None
    assert "first.png is another file of that name" in capsys.readouterr().err
    assert run(*again, "--image", "last.png", output="again.png") is None
    assert "last.png is not among the files that out.png was made with" in capsys.readouterr().err
    assert np.array_equal(run(*again, "--image", "in/first.png", output="again.png"), frames)
    shutil.copy("in/first.png", "made/first.png")
    assert np.array_equal(run(*again, output="again.png"), frames)


def test_a_clip_without_conditioning_frames_takes_none(run, capsys):
    run()
    assert run("--from", "out.png", "--image", "first.png", output="again.png") is None
    assert "first.png is not among the files" in capsys.readouterr().err
    assert run("--from", "out.png", "--loop", "2", output="again.png") is None
    assert "cannot be combined with --loop" in capsys.readouterr().err


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", "no.png"], "--image: no.png does not exist"),
        (["--image", "clip.png"], "--image: clip.png is a video of 20 frames, expected a picture"),
        (["--image", "text.png"], "--image: text.png cannot be read: not a video or a picture, but a text file"),
        (["--extend", "first.png"], "--extend: first.png is a single picture, expected a video"),
        (["--edit", "first.png", "--strength", "0.5"], "--edit: first.png is a single picture"),
        (["--edit", "clip.png"], "--edit needs --strength"),
        (["--edit", "clip.png", "--strength", "1.4"], "--strength is 1.4, expected 0"),
        (["--edit", "clip.png", "--strength", "0.5", "--image", "first.png"], "--edit gives all frames"),
        (["--edit", "clip.png", "--strength", "0.5", "--loop", "2"], "leave out --loop"),
        (["--strength", "0.5"], "give the clip as --edit"),
        (["--backwards"], "give the clip as --extend"),
        (["--extend", "clip.png", "--image", "first.png"], "leave out --image"),
        (["--extend", "clip.png", "--backwards", "--last-image", "first.png"], "leave out --last-image"),
        (["--loop", "0"], "--loop is 0"),
        (["--condition-frame-length", "2"], "give one of them"),
        (["--loop", "2", "--condition-frame-length", "0"], "--condition-frame-length is 0"),
        (["--loop", "2", "--condition-frame-edit", "2"], "--condition-frame-edit is 2"),
        (["--reference-path", "first.png"], "give --mask-strategy"),
        (["--cond-type", "i2v_head"], "i2v_head takes 1 reference, got 0; name them by --reference-path"),
        (["--reference-path", "first.png", "--cond-type", "i2v"], "unknown condition type 'i2v'; known are v2v_head"),
        (
            ["--reference-path", "first.png", "--cond-type", "i2v_head", "--mask-strategy", "0"],
            "--cond-type says where frames go; leave out --mask-strategy",
        ),
        (["--mask-strategy", "0"], "give them as --reference-path"),
        (["--reference-path", "first.png;no.png", "--mask-strategy", "0"], "--reference-path: no.png does not exist"),
        (["--reference-path", "first.png", "--mask-strategy", "0,1"], "takes reference 1 (0 is the first)"),
        (["--reference-path", "first.png", "--mask-strategy", "1"], "is for loop 1 too"),
        (["--reference-path", "first.png", "--mask-strategy", "0,0,0,x"], "target_start"),
        (["--reference-path", "first.png", "--mask-strategy", "0", "--align", "0"], "--align is 0"),
        (["--align", "5"], "--align moves the frames of --reference-path"),
        (["--reference-path", "first.png", "--mask-strategy", "0", "--image", "first.png"], "given in two ways"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(run, tmp_path, monkeypatch, capsys, options, message):
    from opensora.checkpoints import loading

    monkeypatch.setattr(loading, "load_pipeline", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "text.png").write_text("a picture")
    assert run(*options) is None
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err, err


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (PROMPT + '{"reference_path": "no.png", "mask_strategy": "0"}', "no.png does not exist"),
        (PROMPT + '{"reference_pth": "first.png"}', "'reference_pth'"),
        (PROMPT + '{"reference_path": ', "is not a JSON object"),
        ('{"reference_path": "first.png", "mask_strategy": "0"}', "the prompt is empty but for the JSON object"),
        ("|0|a red ball|2|a blue square", "says what loop 2 shows (0 is the first), but --loop is 1"),
        ("|0|a red ball|1", "must take turns"),
    ],
)
def test_mistakes_in_a_prompt(run, capsys, prompt, message):
    assert run(prompt=prompt) is None
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err, err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--extend", "short.png"], "extend has 3 frames; this clip of 18 needs 5"),
        (["--extend", "clip.png", "--condition-frame-length", "6"], "6 of 6 latent frames"),
        (["--edit", "clip.png", "--strength", "0.5", "--num-frames", "30"], "edit has 20 frames"),
        (["--reference-path", "first.png", "--mask-strategy", "0,0,1"], "reference_start is 1"),
        (["--reference-path", "first.png", "--mask-strategy", "1,0,0,9", "--loop", "2"], "target_start is 9"),
        (["--loop", "2", "--condition-frame-length", "6"], "--condition-frame-length is 6, expected 1 to 5"),
        (["--aes", "6"], "not trained with the score 'aesthetic'"),
        (["--sampler", "ddim"], "for models that predict noise"),
        (["--download"], "--download fetches published models"),
    ],
)
def test_what_this_model_cannot_do_is_found_before_sampling(run, monkeypatch, capsys, options, message):
    from opensora.models.stdit3 import STDiT3

    monkeypatch.setattr(STDiT3, "forward", lambda *_, **__: pytest.fail("sampling began"))
    write_video("short.png", frames_of(3, 2), 8)
    assert run(*options) is None
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err, err
