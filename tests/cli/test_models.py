"""`opensora models`: what is listed, in words and for programs, and what it says of a cache of the Hub."""

import json

import pytest
import tiny_published
from huggingface_hub import constants

from opensora.checkpoints.published import ALIASES, BUNDLED, PUBLISHED
from opensora.cli.main import main


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def printed(capsys, *args: str) -> str:
    assert main(["models", *args]) == 0
    out, err = capsys.readouterr()
    assert err == "" and all(len(line) <= 100 for line in out.splitlines() if "/" not in line)
    return out


def listed(capsys) -> dict[str, dict]:
    return {entry["name"]: entry for entry in json.loads(printed(capsys, "--json"))}


def test_the_list(capsys):
    out = printed(capsys)
    for name in (*BUNDLED, *PUBLISHED):
        [line] = [line for line in out.splitlines() if line.split("  ")[0] == name]
        assert line.endswith("in the package" if name in BUNDLED else "GB to fetch")
    assert all(f"{alias} is {name}" in " ".join(out.split()) for alias, name in ALIASES.items())


def test_the_list_for_programs(capsys):
    entries = listed(capsys)
    assert list(entries) == [*BUNDLED, *PUBLISHED]
    assert entries["toybox"]["where"] == "package" and entries["toybox"]["download_bytes"] == 0
    third = entries["opensora-1.2"]
    assert third["where"] == "absent" and 25e9 < third["download_bytes"] < 26e9
    assert entries["opensora-1.1-stage3"]["aliases"] == ["opensora-1.1"]


def test_a_cache_that_fills_up(capsys, cache, monkeypatch):
    def where() -> dict[str, str]:
        return {name: entry["where"] for name, entry in listed(capsys).items() if "1.1" in name}

    model = tiny_published.tiny("opensora-1.1-stage3")
    monkeypatch.setitem(PUBLISHED, "opensora-1.1-stage3", model)
    assert where() == {"opensora-1.1-stage2": "absent", "opensora-1.1-stage3": "absent"}
    tiny_published.write_tokenizer(tiny_published.snapshot(cache, model.tokenizer))
    assert where() == {"opensora-1.1-stage2": "partly", "opensora-1.1-stage3": "partly"}
    assert "not here" in printed(capsys, "opensora-1.1")
    tiny_published.write_published(cache, model)
    assert where() == {"opensora-1.1-stage2": "partly", "opensora-1.1-stage3": "cache"}
    entries = listed(capsys)
    assert entries["opensora-1.1-stage3"]["download_bytes"] == 0
    assert entries["opensora-1.1-stage2"]["download_bytes"] == model.transformer.size_bytes, "the rest is shared"
    assert "in part, 3.1 GB to fetch" in printed(capsys)
    next(cache.glob("*t5*/snapshots/*/pytorch_model-00001*")).unlink()
    assert where() == {"opensora-1.1-stage2": "partly", "opensora-1.1-stage3": "partly"}
    assert "here but for pytorch_model-00001-of-00002.bin" in " ".join(printed(capsys, "opensora-1.1").split())


def test_one_model(capsys, cache):
    out = " ".join(printed(capsys, "opensora-1.2").split())
    for said in (
        "--model opensora-1.2 --download",
        "hpcai-tech/OpenSora-STDiT-v3",
        "hpcai-tech/OpenSora-VAE-v1.2",
        "DeepFloyd/t5-v1_1-xxl",
        "RectifiedFlowScheduler",
        "steps 30",
        "scale 7 on all latent channels",
        "51 frames of 240x424, 24 frames per second; the network is told 240x426",
        "written height:width",
        "multiplied by 0.18215, shift -0.1, 0.34, 0.27, 0.98, scale 3.85, 2.32, 2.33, 3.06",
        "up to 300 tokens",
        "aesthetic 6.5",
    ):
        assert said in out
    out = " ".join(printed(capsys, "opensora-1.1").split())
    assert out.startswith("opensora-1.1-stage3 (opensora-1.1)")
    assert "the first 3 latent channels" in out and "24 frames per second told, played at 8" in out


@pytest.mark.parametrize("name", BUNDLED)
def test_one_of_the_package(capsys, name):
    out = " ".join(printed(capsys, name).split())
    assert "in the package" in out and "up to 24 tokens" in out and "--download" not in out
    described = json.loads(printed(capsys, name, "--json"))
    assert all(part["path"] and part["size_bytes"] > 0 for part in described["parts"].values())


def test_one_model_for_programs(capsys):
    described = json.loads(printed(capsys, "opensora-1.0", "--json"))
    assert described["name"] == "opensora-1.0-hq-16x256x256"
    assert described["parts"]["transformer"]["files"] == ["OpenSora-v1-HQ-16x256x256.pth"]
    assert described["defaults"]["cfg_channels"] == 3 and described["text_tokens"] == 120
    total = sum(part["download_bytes"] for part in described["parts"].values())
    assert described["download_bytes"] == total > 20e9


def test_an_unknown_name_is_answered_with_the_nearest(capsys):
    assert main(["models", "opensora-1.4"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "unknown model 'opensora-1.4'; did you mean 'opensora-1." in err
