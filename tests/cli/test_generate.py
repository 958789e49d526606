"""`opensora generate` around a pipeline that paints seeded noise: options, files, records, and every bad input."""

import json

import numpy as np
import pytest
import torch

from opensora.checkpoints.published import FORMER_BUNDLED
from opensora.cli.main import main
from opensora.errors import OpenSoraError
from opensora.media.read import read_metadata, read_video

PROMPT = "a small red ball rolls left"


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_prompt_becomes_a_file_with_a_record(pipe, tmp_path, capsys):
    assert main(["generate", PROMPT, "--output", "clip.mp4", "--seed", "7"]) == 0
    out, err = capsys.readouterr()
    assert out == "clip.mp4\n"
    assert "peak memory" in err and "5 frames of 16x16" in err
    assert files(tmp_path) == ["clip.mp4", "clip.mp4.json"]
    frames, fps = read_video("clip.mp4")
    assert frames.shape == (5, 16, 16, 3) and fps == 8
    inside, beside = read_metadata("clip.mp4"), json.loads((tmp_path / "clip.mp4.json").read_text())
    assert inside == beside
    assert inside["prompt"] == PROMPT and inside["seed"] == 7 and inside["model_hash"] == "a" * 64
    assert inside["sampling"]["num_inference_steps"] == 3 and "torch" in inside["versions"]


def test_without_metadata(pipe, tmp_path):
    assert main(["generate", PROMPT, "--output", "clip.mp4", "--no-metadata"]) == 0
    assert files(tmp_path) == ["clip.mp4"]
    with pytest.raises(OpenSoraError):
        read_metadata("clip.mp4")


def test_without_metadata_no_record_of_an_older_clip_stays(pipe, tmp_path):
    assert main(["generate", PROMPT, "--output", "clip.mp4"]) == 0
    assert main(["generate", PROMPT, "--output", "clip.mp4", "--no-metadata", "--seed", "1"]) == 0
    assert files(tmp_path) == ["clip.mp4"]


def test_a_record_that_cannot_be_written_is_found_before_the_work(pipe, tmp_path, capsys):
    (tmp_path / "clip.mp4.json").mkdir()
    assert main(["generate", PROMPT, "--output", "clip.mp4"]) == 2
    assert "output clip.mp4.json is a folder" in capsys.readouterr().err
    assert not pipe.calls and files(tmp_path) == []


@pytest.mark.parametrize("suffix", ["mp4", "gif", "webp", "png"])
def test_from_makes_the_same_frames_again(pipe, tmp_path, suffix, capsys):
    options = ["--seed", "9", "--height", "24", "--negative-prompt", "blue", "--cfg-channels", "0,2"]
    assert main(["generate", PROMPT, "--output", f"one.{suffix}", *options]) == 0
    assert main(["generate", "--from", f"one.{suffix}", "--output", f"two.{suffix}"]) == 0
    assert main(["generate", "--from", f"one.{suffix}.json", "--output", f"three.{suffix}"]) == 0
    one, two, three = ((tmp_path / f"{name}.{suffix}").read_bytes() for name in ("one", "two", "three"))
    assert one == two == three
    assert pipe.calls[0] == pipe.calls[1] == pipe.calls[2]
    assert pipe.calls[0].negative_prompt == ["blue"] and pipe.calls[0].cfg_channels == [0, 2]
    capsys.readouterr()
    assert main(["generate", "--from", f"one.{suffix}"]) == 0
    assert capsys.readouterr().out.strip() == f"outputs/a-small-red-ball-rolls-left-9.{suffix}"


@pytest.mark.parametrize(
    ("options", "recorded"),
    [
        (
            ["--channel-scales", "0-2:7,3:1"],
            {"channel_scales": [7.0, 7.0, 7.0, 1.0], "guidance_scale": None, "cfg_channels": None},
        ),
        (
            ["--guidance-scale", "7", "--cfg-channels", "3", "--equivalent-to", "all"],
            {"guidance_scale": 5.5, "cfg_channels": "all", "channel_scales": None},
        ),
    ],
)
def test_guidance_is_recorded_as_it_was_and_made_again(pipe, options, recorded, capsys):
    prompts = [PROMPT, "a blue square spins"]
    assert main(["generate", "--prompt", *prompts, "--output", "clip.png", *options]) == 0
    said = capsys.readouterr().err
    assert ("guidance 7 on 3 of 4 channels = 5.5 on all 4" in said) == ("--equivalent-to" in options)
    for number in range(2):
        sampling = read_metadata(f"clip-{number}.png")["sampling"]
        assert {name: sampling[name] for name in recorded} == recorded
        assert main(["generate", "--from", f"clip-{number}.png", "--output", "again.png"]) == 0
        assert pipe.calls[-1] == pipe.calls[number]
        assert read_metadata("again.png")["sampling"] == sampling


def test_from_keeps_device_and_dtype(pipe):
    assert main(["generate", PROMPT, "--output", "one.mp4", "--device", "cpu", "--dtype", "bfloat16"]) == 0
    assert pipe.asked.dtype is torch.bfloat16
    assert main(["generate", "--from", "one.mp4"]) == 0
    assert pipe.asked.dtype is torch.float32 and pipe.asked.device == "cpu"  # what the pipeline reported


@pytest.mark.parametrize(
    ("name", "ending"),
    [("one.gif.json", "gif"), ("one.GIF", "gif"), ("one.json", "mp4"), ("one.v2.JSON", "mp4"), ("one.Png.json", "png")],
)
def test_from_writes_the_format_it_was_given(pipe, tmp_path, name, ending, capsys):
    assert main(["generate", PROMPT, "--output", "made.gif"]) == 0
    (tmp_path / ("made.gif.json" if name.lower().endswith(".json") else "made.gif")).rename(tmp_path / name)
    capsys.readouterr()
    assert main(["generate", "--from", name]) == 0
    assert capsys.readouterr().out.strip() == f"outputs/a-small-red-ball-rolls-left-42.{ending}"


def test_a_record_tells_no_folders_and_from_asks_for_the_model(pipe, tmp_path, capsys):
    folder = "/home/somebody/other"
    assert main(["generate", PROMPT, "--model", folder, "--output", "one.png"]) == 0
    assert b"somebody" not in (tmp_path / "one.png").read_bytes()
    assert read_metadata("one.png")["model"] == "other" and "somebody" not in (tmp_path / "one.png.json").read_text()
    record = json.loads((tmp_path / "one.png.json").read_text())
    (tmp_path / "moved.json").write_text(json.dumps(record | {"model": "elsewhere"}))
    capsys.readouterr()
    assert main(["generate", "--from", "moved.json"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "unknown model 'elsewhere'" in err and "--model says where" in err
    assert main(["generate", "--from", "moved.json", "--model", folder, "--output", "two.png"]) == 0
    assert np.array_equal(read_video("two.png")[0], read_video("one.png")[0])


def test_from_refuses_numbers_nobody_computes_in(pipe, tmp_path, capsys):
    assert main(["generate", PROMPT, "--output", "one.mp4"]) == 0
    record = json.loads((tmp_path / "one.mp4.json").read_text())
    for dtype in ["float99", "Tensor", "int4"]:
        (tmp_path / "odd.json").write_text(json.dumps(record | {"dtype": dtype}))
        capsys.readouterr()
        assert main(["generate", "--from", "odd.json"]) == 2
        assert f"dtype in odd.json is '{dtype}', expected one of float32" in capsys.readouterr().err


def test_from_says_which_weights_of_before_a_clip_needs(pipe, tmp_path, capsys):
    assert main(["generate", PROMPT, "--output", "one.mp4"]) == 0
    record = json.loads((tmp_path / "one.mp4.json").read_text())
    for former, name in FORMER_BUNDLED.items():
        (tmp_path / "old.json").write_text(json.dumps(record | {"model_hash": former}))
        capsys.readouterr()
        assert main(["generate", "--from", "old.json", "--output", "two.mp4"]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and f"those of {name}, see docs/log.md" in err
    assert not (tmp_path / "two.mp4").exists()


def test_from_refuses_another_model(pipe, tmp_path, capsys):
    assert main(["generate", PROMPT, "--output", "one.mp4"]) == 0
    pipe.hash = "b" * 64
    capsys.readouterr()
    assert main(["generate", "--from", "one.mp4", "--output", "two.mp4"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "is not the one this clip was made with" in err
    assert files(tmp_path) == ["one.mp4", "one.mp4.json"]


def test_from_says_which_versions_changed(pipe, tmp_path, capsys):
    assert main(["generate", PROMPT, "--output", "one.mp4"]) == 0
    record = json.loads((tmp_path / "one.mp4.json").read_text())
    record["versions"]["torch"] = "1.0"
    (tmp_path / "old.json").write_text(json.dumps(record))
    capsys.readouterr()
    assert main(["generate", "--from", "old.json"]) == 0
    assert "note: torch 1.0 -> " in capsys.readouterr().err


def test_a_prompt_file_as_windows_writes_it(pipe, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbf" + PROMPT.encode() + b"\r\n")
    assert main(["generate", "--prompt-path", "prompts.txt", "--output", "a.png"]) == 0
    assert [call.prompt for call in pipe.calls] == [PROMPT]


def test_each_of_several_clips_can_be_made_alone(pipe, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n\n  a blue square spins \n")
    options = ["--prompt-path", "prompts.txt", "--num-videos", "2", "--seed", "5"]
    assert main(["generate", *options, "--output", "clip.png"]) == 0
    paths = capsys.readouterr().out.split()
    assert paths == ["clip-0.png", "clip-1.png", "clip-2.png", "clip-3.png"]
    assert [call.prompt for call in pipe.calls] == [PROMPT, PROMPT, "a blue square spins", "a blue square spins"]
    assert [read_metadata(path)["seed"] for path in paths] == [5, 6, 7, 8]
    assert main(["generate", "a blue square spins", "--seed", "8", "--output", "alone.png"]) == 0
    assert (tmp_path / "alone.png").read_bytes() == (tmp_path / "clip-3.png").read_bytes()


def test_names_nobody_chose_replace_nothing(pipe, capsys):
    for expected in ["a-small-red-ball-rolls-left-42.gif", "a-small-red-ball-rolls-left-42-2.gif"]:
        assert main(["generate", PROMPT, "--format", "gif"]) == 0
        assert capsys.readouterr().out.strip() == f"outputs/{expected}"
    assert main(["generate", PROMPT, "--output", "folder"]) == 0
    assert capsys.readouterr().out.strip() == "folder/a-small-red-ball-rolls-left-42.mp4"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"num_frames": 5, "height": 16, "width": 16, "cfg_channels": None, "fps": 8, "guidance_scale": 3.0}),
        (["--num-frames", "17"], {"num_frames": 17}),
        (["--num-frames", "2s"], {"num_frames": 17}),
        (["--num-frames", "2s", "--fps", "24"], {"num_frames": 49, "fps": 24}),
        (["--cfg-channels", "3"], {"cfg_channels": 3}),
        (["--cfg-channel", "1,"], {"cfg_channels": [1]}),
        (["--cfg-channels", "all"], {"cfg_channels": "all"}),
        (["--channel-scales", "0-2:7,3:1"], {"channel_scales": [7.0, 7.0, 7.0, 1.0]}),
        (["--channel-scales=[7, 6.5, 0, 1]"], {"channel_scales": [7.0, 6.5, 0.0, 1.0]}),
        (["--cfg-channels", "3", "--equivalent-to", "all"], {"guidance_scale": 2.5, "cfg_channels": "all"}),
        (["--guidance-scale", "7", "--equivalent-to", "3"], {"guidance_scale": 9.0, "cfg_channels": 3}),
        (["--guidance-scale", "1"], {"guidance_scale": 1.0}),
        (["--num-inference-steps", "7"], {"num_inference_steps": 7}),
        (["--num-inference-steps", "ddim50"], {"num_inference_steps": "ddim50"}),
        (["--aspect-ratio", "4:1"], {"height": 8, "width": 32}),
        (["--resolution", "144p", "--aspect-ratio", "16:9"], {"height": 144, "width": 256}),
    ],
)
def test_options_reach_the_pipeline(pipe, options, expected):
    assert main(["generate", PROMPT, "--output", "a.png", *options]) == 0
    assert {name: getattr(pipe.calls[0], name) for name in expected} == expected


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([""], "prompt is empty"),
        (["  "], "prompt is empty"),
        ([], "what should the video show?"),
        ([PROMPT, "--prompt-path", "x.txt"], "give one of them"),
        (["--prompt-path", "x.txt"], "x.txt does not exist"),
        (["--prompt-path", "empty.txt"], "holds no prompt"),
        (["a zebra eats gras"], "toybox does not know: zebra, eats, gras. It knows"),
        ([PROMPT, "--negative-prompt", "ugly"], "toybox does not know: ugly"),
        (["!!!"], "the prompt '!!!' holds no word. toybox knows one object"),
        ([PROMPT, "--negative-prompt", "🦓"], "holds no word"),
        ([PROMPT, "--height", "20"], "height 20 must be a multiple of 8; the nearest valid is 16 or 24"),
        ([PROMPT, "--width", "0"], "nearest valid is 8"),
        ([PROMPT, "--num-frames", "16"], "the nearest valid is 13 or 17"),
        ([PROMPT, "--num-frames", "0"], "the nearest valid is 1"),
        ([PROMPT, "--num-frames", "long"], "neither a count"),
        ([PROMPT, "--num-frames", "60s"], "the nearest valid is 65 frames"),
        ([PROMPT, "--resolution", "143p"], "unknown resolution '143p'; known: 144p"),
        ([PROMPT, "--resolution", "144p", "--height", "64"], "give one of them"),
        ([PROMPT, "--aspect-ratio", "wide"], "not width:height"),
        ([PROMPT, "--model", "toybux"], "unknown model 'toybux'; known are toybox"),
        ([PROMPT, "--format", "mp5"], "unknown format 'mp5'; did you mean mp4?"),
        ([PROMPT, "--output", "a.avi"], "must end in one of .mp4"),
        ([PROMPT, "--output", "a.mp4", "--format", "gif"], "ends in .mp4 but the format asked for is gif"),
        ([PROMPT, "--output", "empty.txt/a.mp4"], "cannot be written"),
        ([PROMPT, "--output", "/proc/nowhere/a.mp4"], "cannot be written"),
        ([PROMPT, "--dtype", "float23"], "did you mean float32?"),
        ([PROMPT, "--cfg-channels", "some"], "--cfg-channels is 'some'"),
        ([PROMPT, "--cfg-channels", "0"], "at least one channel"),
        ([PROMPT, "--cfg-channels=-1"], "at least one channel"),
        ([PROMPT, "--cfg-channels", "0:1,2:0.5"], "a scale for each is --channel-scales"),
        ([PROMPT, "--channel-scales", "7,7,7,1"], "--channel-scales is '7,7,7,1', expected a scale for each latent"),
        ([PROMPT, "--channel-scales", "[7, 7, 7"], "--channel-scales is not valid JSON"),
        ([PROMPT, "--channel-scales", "[7, 7, 7]"], "--channel-scales has 3 scales, expected 4"),
        ([PROMPT, "--channel-scales", "[7, 7, 7, -1]"], "holds the number -1 for channel 3"),
        ([PROMPT, "--channel-scales", "[7, 7, 7, NaN]"], "--channel-scales is not valid JSON"),
        ([PROMPT, "--channel-scales", "0-3:nan"], "holds the number nan for channels 0 to 3"),
        ([PROMPT, "--channel-scales", "0-2:7,2-3:1"], "--channel-scales names channel 2 twice"),
        ([PROMPT, "--channel-scales", "3-0:7"], "the range 3-0, which runs backwards; write 0-3"),
        ([PROMPT, "--channel-scales", "0-2:7"], "leaves out channel 3; add 3:1 for no guidance there"),
        ([PROMPT, "--channel-scales", "0-4:7"], "names channel 4, expected channels from 0 to 3"),
        ([PROMPT, "--channel-scales", "0-999999999:7"], "a channel of --channel-scales is 999999999, expected"),
        ([PROMPT, "--channel-scales", "0-3:7", "--guidance-scale", "7"], "leave out --guidance-scale"),
        ([PROMPT, "--channel-scales", "0-3:7", "--cfg-channels", "3"], "leave out --cfg-channels"),
        ([PROMPT, "--channel-scales", "0-3:7", "--equivalent-to", "all"], "leave out --equivalent-to"),
        ([PROMPT, "--channel-scales", "0-3:1", "--negative-prompt", "blue"], "all --channel-scales are 1"),
        ([PROMPT, "--equivalent-to", "some"], "--equivalent-to is 'some', expected a number such as 3"),
        ([PROMPT, "--equivalent-to", "0"], "--equivalent-to is '0', expected at least one channel"),
        ([PROMPT, "--equivalent-to", "all"], "--equivalent-to has no effect: these channels are guided already"),
        ([PROMPT, "--equivalent-to", "5"], "got --equivalent-to=5 for a latent of 4 channels"),
        ([PROMPT, "--guidance-scale", "1", "--equivalent-to", "3"], "--equivalent-to has no effect: --guidance-scale"),
        ([PROMPT, "--guidance-scale", "0", "--equivalent-to", "3"], "has no equal on 3"),
        ([PROMPT, "--guidance-scale=-2"], "--guidance-scale is -2"),
        ([PROMPT, "--guidance-scale", "nan"], "--guidance-scale is nan"),
        ([PROMPT, "--num-inference-steps", "0"], "--num-inference-steps is 0"),
        ([PROMPT, "--num-videos", "0"], "--num-videos is 0"),
        ([PROMPT, "--seed=-1"], "--seed is -1"),
        ([PROMPT, "--fps", "0"], "fps is 0, expected a number from 0.01 to 1000 for mp4"),
        ([PROMPT, "--fps", "0.001"], "fps is 0.001"),
        ([PROMPT, "--fps", "nan"], "fps is nan"),
        ([PROMPT, "--fps", "120", "--format", "gif"], "fps is 120, expected a number from 0.01 to 50 for gif"),
        ([PROMPT, "--output", "a" * 300 + ".mp4"], "name too long"),
        (["--from", "no.mp4"], "no.mp4 does not exist"),
        (["--from", "empty.txt"], "empty.txt cannot be read"),
        (["--from", "strange.json"], "strange.json"),
        (["--from", "no.mp4", "--seed", "3"], "cannot be combined with --seed"),
        (["--from", "no.mp4", "--latent-space", "0.5"], "cannot be combined with --latent-space"),
        ([PROMPT, "--from", "no.mp4"], "cannot be combined with a prompt"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(pipe, tmp_path, capsys, args, message):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "strange.json").write_text('{"prompt": "x"}')
    before = files(tmp_path)
    assert main(["generate", *args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("opensora: ") and err.count("\n") == 1, err
    assert message in err
    assert files(tmp_path) == before and not pipe.calls


def test_ctrl_c_leaves_no_half_file(pipe, tmp_path, capsys):
    pipe.fail_at_step = 1
    assert main(["generate", PROMPT, "--output", "clip.mp4"]) == 130
    out, err = capsys.readouterr()
    assert out == "" and err == "opensora: interrupted\n"
    assert files(tmp_path) == []


def test_ctrl_c_while_writing_leaves_no_half_file(pipe, tmp_path, monkeypatch):
    def interrupted(path, *_, **__):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("opensora.media.write._write_stream", interrupted)
    assert main(["generate", PROMPT, "--output", "clip.mp4"]) == 130
    assert files(tmp_path) == []


def test_frames_that_are_not_finite_are_an_error(pipe, tmp_path, capsys):
    pipe.nan = True
    assert main(["generate", PROMPT, "--output", "clip.mp4"]) == 2
    assert "NaN" in capsys.readouterr().err and files(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
        RuntimeError("MPS backend out of memory"),
        MemoryError(),
    ],
)
def test_too_little_memory_is_one_line(pipe, tmp_path, capsys, error):
    pipe.error = error
    assert main(["generate", PROMPT, "--output", "clip.mp4"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("opensora: out of memory for 5 frames of 16x16; choose fewer") and err.count("\n") == 1
    assert files(tmp_path) == []
    pipe.error = RuntimeError("shapes do not fit")
    with pytest.raises(RuntimeError, match="shapes"):
        main(["generate", PROMPT, "--output", "clip.mp4"])


def test_a_sheet_too_big_is_found_before_sampling(pipe, capsys, monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)
    assert main(["generate", PROMPT, "--output", "clip.png"]) == 2
    assert "png sheet of 5 frames" in capsys.readouterr().err and not pipe.calls


def test_another_model_may_know_other_words(pipe):
    assert main(["generate", "a zebra eats grass", "--model", "other", "--output", "a.png"]) == 0
