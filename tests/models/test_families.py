"""Families of networks: each knows its own, no two know the same, and a package that is installed brings more."""

import sys
from pathlib import Path

import pytest
import torch
from tiny_pipeline import make_autoencoder, make_text_encoder, make_transformer
from tiny_transformers import TINY

from opensora.checkpoints.components import find_class
from opensora.checkpoints.source import find_part
from opensora.errors import OpenSoraError
from opensora.models.families import FORMATS, format_of, formats, network_class
from opensora.models.format import Format, TensorShapes
from opensora.models.identify import identify
from opensora.models.stdit import STDiT
from opensora.models.stdit2 import STDiT2
from opensora.models.stdit3 import STDiT3

MODULE = """
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from opensora.models.format import Format, RenamedWeights


class TinyNet(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.twist = torch.nn.Linear(width, width)


class TinyFormat(Format):
    cls = TinyNet
    kind = "transformer"
    summary = "a tiny network"
    prefixes = ("twist.",)
    lora_targets = ("twist",)

    def read_shapes(self, shapes):
        return {"width": shapes.size("twist.weight", 0)}, {}

    def adapt_weights(self, model, weights, source):
        return RenamedWeights(weights, {name: name for name in weights if not name.startswith("old.")})


FORMAT = TinyFormat()
"""


def install(folder: Path, package: str, module: str, entry: str) -> None:
    """A package as an installer leaves it behind, with one entry point."""
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text("")
    (folder / package / "net.py").write_text(module)
    about = folder / f"{package}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[opensora.families]\ntiny = {entry}\n")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The module of a package that brings a family."""
    install(tmp_path / "site", "tinyfamily", MODULE, "tinyfamily.net:FORMAT")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    formats()
    yield sys.modules["tinyfamily.net"]
    for name in ("tinyfamily", "tinyfamily.net"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("network", [make_transformer, make_autoencoder, make_text_encoder])
def test_every_network_is_known_by_one_family(network):
    shapes = TensorShapes(network().state_dict())
    assert len([found for family in FORMATS if (found := family.identify(shapes))]) == 1


@pytest.mark.parametrize("cls", [STDiT, STDiT2, STDiT3])
def test_a_class_and_what_derives_from_it_have_its_format(cls):
    derived = type("Derived", (cls,), {})
    assert format_of(cls).cls is cls and format_of(derived) is format_of(cls)
    with torch.device("meta"):
        network = cls(**TINY)
    names = [name for name, _ in network.named_parameters()]
    parts = {format_of(cls).part_of(name) for name in names}
    assert {"temporal_blocks", "last_layer", None} <= parts


def test_of_other_classes_nothing_special_is_true():
    family = format_of(torch.nn.Linear)
    weights = torch.nn.Linear(2, 2).state_dict()
    assert type(family) is Format and family.cls is torch.nn.Linear
    assert family.adapt_weights(torch.nn.Linear(2, 2), weights, "") is weights
    assert family.lora_targets == () and family.part_of("weight") is None


def test_an_installed_package_brings_a_family(tiny, tmp_path):
    network = tiny.TinyNet(width=6)
    identity = identify(network.state_dict())
    assert identity is not None and identity.supported and identity.summary == "a tiny network"
    assert network_class("transformer", "TinyNet") is tiny.TinyNet
    assert find_class("transformer", "tinyfamily.net", "TinyNet") is tiny.TinyNet
    network.save_pretrained(tmp_path / "tiny")
    torch.save({**network.state_dict(), "old.twist.bias": torch.zeros(6)}, tmp_path / "tiny.pt")
    for path in (tmp_path / "tiny", tmp_path / "tiny.pt"):
        loaded = find_part(path, "transformer").load()
        assert type(loaded) is tiny.TinyNet and torch.equal(loaded.twist.weight, network.twist.weight)


def test_without_the_package_its_family_is_unknown():
    assert formats() == FORMATS
    with pytest.raises(OpenSoraError, match="components come from opensora, diffusers and transformers only"):
        find_class("transformer", "tinyfamily.net", "TinyNet")
    with pytest.raises(
        OpenSoraError, match="unknown transformer 'TinyNet'; known are MMDiT, STDiT4, STDiT3, STDiT2, STDiT"
    ):
        network_class("transformer", "TinyNet")


@pytest.mark.parametrize("library", ["opensora.nowhere", "opensora" + ".a" * 2000])
def test_a_module_that_does_not_exist_is_one_line_however_long_its_name(library):
    with pytest.raises(OpenSoraError, match="which has none") as error:
        find_class("transformer", library, "Net")
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_a_package_that_cannot_be_imported_is_named(tmp_path, monkeypatch):
    install(tmp_path, "brokenfamily", "raise RuntimeError('out of\\norder')", "brokenfamily.net:FORMAT")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        OpenSoraError, match=r"brokenfamily\.net:FORMAT, .* cannot be imported \(out of order\)"
    ) as error:
        formats()
    assert "\n" not in str(error.value)
