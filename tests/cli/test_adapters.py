"""Adapters on the command line: merged, recorded, asked for again, described."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_pipeline import make_pipeline

from opensora.adapters.reading import ADAPTER_FILE
from opensora.cli.main import main
from opensora.errors import OpenSoraError
from opensora.generation.loading import parse_adapter
from opensora.generation.record import read_record
from opensora.generation.request import Adapter
from opensora.media.read import read_video
from opensora.training.diffusion.lora import LoRAConfig, add_adapter, export_adapter

PROMPT = "a small red ball rolls left"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny pipeline's folder, with two of its adapters beside it."""
    folder = tmp_path_factory.mktemp("adapted")
    make_pipeline().save_pretrained(folder / "tiny")
    for number, name in enumerate(("look", "other")):
        transformer, config = make_pipeline().transformer, LoRAConfig(rank=2)
        add_adapter(transformer, config)
        torch.manual_seed(number)
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        export_adapter(transformer, config, folder / name, base="tiny", training={})
    return folder / "tiny"


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)


def generate(model: Path, output: str, *options: str) -> torch.Tensor:
    assert main(["generate", PROMPT, "--model", str(model), "--output", output, "--device", "cpu", *options]) == 0
    return torch.from_numpy(read_video(output)[0])


def refused(capsys, *command: str) -> str:
    assert main(["generate", *command]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_adapters_change_the_clip_and_are_recorded(model):
    look = model.parent / "look"
    plain, off = generate(model, "plain.png"), generate(model, "off.png", "--adapter", f"{look}:0")
    whole, half = (
        generate(model, "whole.png", "--adapter", str(look)),
        generate(model, "h.png", "--adapter", f"{look}:.5"),
    )
    assert torch.equal(plain, off)
    assert not torch.equal(plain, whole) and not torch.equal(half, whole) and not torch.equal(half, plain)
    both = generate(model, "both.png", "--adapter", f"{look}:0.5", "--adapter", str(model.parent / "other"))
    assert not torch.equal(both, half)
    used = read_record("both.png").adapters
    assert [(one.name, one.scale) for one in used] == [("look", 0.5), ("other", 1.0)]
    assert read_record("plain.png").adapters == ()
    assert str(model.parent) not in Path("both.png.json").read_text()


def test_from_makes_the_clip_again_with_the_same_adapter_alone(model, capsys):
    look, other = model.parent / "look", model.parent / "other"
    made = generate(model, "made.png", "--adapter", f"{look}:0.5")
    moved = Path(shutil.copytree(look, "moved")) / ADAPTER_FILE
    again = ["--from", "made.png", "--model", str(model), "--output", "again.png"]
    assert main(["generate", *again, "--adapter", str(moved)]) == 0
    assert torch.equal(torch.from_numpy(read_video("again.png")[0]), made)
    assert read_record("again.png").adapters[0].scale == 0.5
    capsys.readouterr()
    assert "made with the adapter look" in refused(capsys, *again) and "--adapter" not in again
    assert "is not one this clip was made with: look" in refused(capsys, *again, "--adapter", str(other))
    assert "acted at 0.5 in this clip, not at 1" in refused(capsys, *again, "--adapter", f"{look}:1")
    plain = ["--from", "plain.png", "--model", str(model), "--output", "p.png", "--adapter", str(look)]
    generate(model, "plain.png")
    capsys.readouterr()
    assert "made with: none" in refused(capsys, *plain)


def test_wrong_adapters_are_one_line(model, capsys):
    options = ["--model", str(model), "--output", "clip.png"]
    assert "is missing" in refused(capsys, PROMPT, *options, "--adapter", "nowhere")
    Path("broken.safetensors").write_bytes(b"no tensors")
    assert "not a readable adapter" in refused(capsys, PROMPT, *options, "--adapter", "broken.safetensors")
    look = str(model.parent / "look")
    assert "is given twice" in refused(capsys, PROMPT, *options, "--adapter", look, "--adapter", look)
    assert "expected a number" in refused(capsys, PROMPT, *options, "--adapter", f"{look}:nan")
    toybox = ["--model", "toybox", "--output", "clip.png"]
    assert "trained on tiny" in refused(capsys, PROMPT, *toybox, "--adapter", look)
    assert not Path("clip.png").exists()


def test_scales_are_read_off_the_end(tmp_path):
    assert parse_adapter("look") == Adapter(Path("look"))
    assert parse_adapter("runs/look:0.5") == Adapter(Path("runs/look"), 0.5)
    assert parse_adapter("look:-1") == Adapter(Path("look"), -1.0)
    assert parse_adapter(r"C:\look") == Adapter(Path(r"C:\look"))
    with pytest.raises(OpenSoraError):
        parse_adapter("look:inf")


def test_inspect_tells_what_an_adapter_is(model, capsys):
    file = model.parent / "look" / ADAPTER_FILE
    for path in (file, file.parent):
        assert main(["inspect", str(path)]) == 0
        said = capsys.readouterr().out
        assert "LoRA of rank 2 of a STDiT3, trained on tiny" in said and "no bundled model has" in said
    assert main(["inspect", "--json", str(file)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["origin"]["config"]["hidden_size"] == 48 and told["fits"] == []
    (file.parent.parent / "cut.safetensors").write_bytes(file.read_bytes()[:2000])
    assert main(["inspect", str(file.parent.parent / "cut.safetensors")]) == 2
