"""`opensora plan`: what it prints, what it proposes, and how it answers bad input."""

import json
import re

import pytest
from tiny_pipeline import make_pipeline

from opensora.cli.main import main
from opensora.planning.devices import parse_memory


def run(capsys, *args: str) -> str:
    assert main(["plan", *args]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def plan_of(capsys, *args: str) -> dict:
    return json.loads(run(capsys, *args, "--json"))


def refusal(capsys, *args: str) -> str:
    assert main(["plan", *args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("opensora: ")
    return err


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    make_pipeline().save_pretrained(path)
    return str(path)


def test_a_plan_on_one_screen(capsys, model):
    lines = run(capsys, "--model", model, "--device", "cpu").splitlines()
    assert "5 frames of 16x24" in lines[0] and "float32 on the CPU" in lines[1]
    text = "\n".join(lines)
    assert all(stage in text for stage in ("text encoder", "transformer", "autoencoder"))
    assert "--offload blocks --sequential-guidance --micro-batch-size 1" in text
    assert len(lines) < 24 and max(map(len, lines)) < 100


def test_the_size_is_the_one_of_generate(capsys, model):
    plan = plan_of(capsys, "--model", model, "--device", "cpu", "--height", "32", "--width", "48", "--num-frames", "2s")
    assert plan["clip"].startswith("16 frames of 32x48")
    larger, smaller = (
        plan_of(capsys, "--model", model, "--device", "cpu", "--height", str(height))["stages"][2]["activation_bytes"]
        for height in (64, 32)
    )
    assert larger > 1.5 * smaller


def test_a_published_model_in_its_own_words(capsys):
    args = ("--model", "opensora-1.2", "--resolution", "144p", "--aspect-ratio", "9:16", "--num-frames", "2s")
    plan = plan_of(capsys, *args, "--device-memory", "24GB")
    assert plan["clip"].startswith("51 frames of 144x256")
    assert plan["dtype"] == "bfloat16" and plan["device"] == "accelerator"
    weights = {stage["network"]: stage["weight_bytes"] / 2**30 for stage in plan["stages"]}
    assert weights == pytest.approx({"text_encoder": 10.7, "transformer": 2.25, "autoencoder": 0.73}, rel=0.01)
    assert plan["fits"] and plan["with"]["options"] == []


def test_what_is_proposed_gets_more_intrusive_as_memory_shrinks(capsys, model):
    whole = plan_of(capsys, "--model", model, "--device", "cpu")
    as_it_is, by_network, by_block, smallest, eight_bits = (way["needed_bytes"] for way in whole["ways"])
    assert as_it_is > by_network > by_block > smallest and by_network > eight_bits

    def proposed(num_bytes: int) -> dict:
        memory = f"{num_bytes / 2**20:.6f}MB"
        return plan_of(capsys, "--model", model, "--device", "cpu", "--device-memory", memory)

    assert proposed(as_it_is + 10)["with"]["options"] == []
    less = proposed(smallest + 10)
    assert less["fits"] and less["with"]["needed_bytes"] <= smallest + 10
    assert "--dtype" not in less["with"]["options"]
    assert "--dtype" in proposed(smallest - 1000)["with"]["options"]
    nothing = proposed(smallest // 2)
    assert not nothing["fits"] and set(nothing["too_large"]) == {"text", "denoise", "decode"}


def test_a_dtype_that_was_chosen_is_kept(capsys, model):
    args = ("--model", model, "--device", "cpu", "--dtype", "float32", "--device-memory", "1MB")
    assert "--dtype" not in plan_of(capsys, *args)["smallest"]["options"]


def test_what_to_do_when_nothing_helps(capsys, model):
    lines = run(capsys, "--model", model, "--device", "cpu", "--device-memory", "1MB").splitlines()
    assert lines[-1].startswith("does not fit into 1 MB: with --dtype int8 --offload blocks")
    assert "--text-encoder" in lines[-1]


def test_guidance_that_is_off_takes_less(capsys, model):
    guided, plain = (
        plan_of(capsys, "--model", model, "--device", "cpu", "--guidance-scale", scale) for scale in ("3", "1")
    )
    assert not plain["guided"] and guided["guided"]
    assert plain["stages"][1]["activation_bytes"] < guided["stages"][1]["activation_bytes"]
    assert not any("--sequential-guidance" in way["options"] for way in plain["ways"])


def test_channels_that_are_all_unguided_take_as_much_as_no_guidance(capsys, model):
    plain, ranges, some = (
        plan_of(capsys, "--model", model, "--device", "cpu", *given)
        for given in (["--guidance-scale", "1"], ["--channel-scales", "0-3:1"], ["--channel-scales", "[1, 1, 7, 1]"])
    )
    assert ranges == plain and some["guided"]
    assert some["stages"] == plan_of(capsys, "--model", model, "--device", "cpu", "--guidance-scale", "7")["stages"]


def test_a_device_that_is_not_here(capsys, model):
    plan = plan_of(capsys, "--model", model, "--device", "cuda:3")
    assert plan["device"] == "cuda" and plan["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "opensora-1.4"], "unknown model 'opensora-1.4'; did you mean"),
        (["--device-memory", "plenty"], "--device-memory is 'plenty', expected a size such as 24GB"),
        (["--device-memory", "0GB"], "expected a size such as 24GB"),
        (["--device", "gpu"], "--device is 'gpu'"),
        (["--dtype", "bfloat61"], "unknown dtype 'bfloat61'; did you mean bfloat16?"),
        (["--guidance-scale", "-1"], "--guidance-scale is -1"),
        (["--channel-scales", "0-4:7"], "--channel-scales names channel 4, expected channels from 0 to 3"),
        (["--channel-scales", "0:7", "--guidance-scale", "7"], "leave out --guidance-scale"),
        (["--height", "63"], "63"),
        (["--num-frames", "9000"], "num_frames 9000"),
        (["--download"], "leave out --download"),
        (["--devicememory", "24GB"], "unknown option --devicememory; did you mean --device-memory?"),
    ],
)
def test_mistakes_are_one_line(capsys, args, message):
    assert message in refusal(capsys, *args)


def test_broken_checkpoints_are_one_line(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    for name, message in (("empty", "holds no model_index.json"), ("cut.safetensors", "damaged")):
        assert message in refusal(capsys, "--model", str(tmp_path / name))


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("24GB", 24 * 2**30), ("24", 24 * 2**30), ("7.5 GiB", 7.5 * 2**30), ("16000mb", 16000 * 2**20), ("8G", 2**33)],
)
def test_sizes_of_memory(text, num_bytes):
    assert parse_memory(text) == num_bytes


def test_options_that_are_proposed_are_spelled_as_options(capsys, model):
    plan = plan_of(capsys, "--model", model, "--device", "cpu", "--device-memory", "1MB")
    for way in [*plan["ways"], plan["smallest"]]:
        assert all(re.fullmatch(r"--[a-z-]+|\d+|\w+", option) for option in way["options"])
