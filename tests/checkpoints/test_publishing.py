"""`opensora push`, and loading what was pushed; the Hub is a stand-in that keeps files in memory."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, ModelCard, constants
from tiny_pipeline import make_pipeline

from opensora.checkpoints.loading import load_pipeline
from opensora.checkpoints.publishing import prepare_upload
from opensora.checkpoints.source import ModelSource
from opensora.cli.main import main
from opensora.errors import OpenSoraError
from opensora.weights import fingerprint


@dataclass
class StandIn:
    """What of huggingface_hub is called: repositories, branches and commits.

    Attributes:
        cache: local cache, which downloads go to.
        private: repository -> whether it is.
        branches: (repository, branch) -> its files.
        calls: names of the methods that were called.
    """

    cache: Path
    private: dict[str, bool] = field(default_factory=dict)
    branches: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)

    def create_repo(self, repository: str, *, private: bool | None, exist_ok: bool) -> None:
        assert exist_ok
        self.calls.append("create_repo")
        self.private.setdefault(repository, bool(private))
        self.branches.setdefault((repository, "main"), {".gitattributes": b""})

    def repo_info(self, repository: str) -> Any:
        return SimpleNamespace(private=self.private[repository])

    def create_branch(self, repository: str, *, branch: str, exist_ok: bool) -> None:
        assert exist_ok
        self.branches.setdefault((repository, branch), dict(self.branches[repository, "main"]))

    def list_repo_files(self, repository: str, *, revision: str | None) -> list[str]:
        return list(self.branches[repository, revision or "main"])

    def create_commit(
        self, repository: str, operations: list[Any], *, commit_message: str, revision: str | None
    ) -> Any:
        assert commit_message
        self.calls.append("create_commit")
        files = self.branches[repository, revision or "main"]
        for operation in operations:
            if isinstance(operation, CommitOperationDelete):
                del files[operation.path_in_repo]
            else:
                assert isinstance(operation, CommitOperationAdd)
                with operation.as_file() as content:
                    files[operation.path_in_repo] = content.read()
        return SimpleNamespace(oid="0" * 39 + "1")

    def download(self, repository: str, *, revision: str | None, allow_patterns: None, cache_dir: None) -> None:
        """As `snapshot_download` lays out its cache."""
        self.calls.append("download")
        stored = self.cache / f"models--{repository.replace('/', '--')}"
        for name, content in self.branches[repository, revision or "main"].items():
            path = stored / "snapshots" / f"commit-{revision}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        pointer = stored / "refs" / (revision or "main")
        pointer.parent.mkdir(parents=True, exist_ok=True)
        pointer.write_text(f"commit-{revision}")


@pytest.fixture
def the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn(tmp_path / "hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(stand_in.cache))
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: stand_in)
    monkeypatch.setattr("huggingface_hub.snapshot_download", stand_in.download)
    monkeypatch.chdir(tmp_path)
    return stand_in


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "good"
    autoencoder = make_pipeline().autoencoder
    record = {
        "latent_space": autoencoder.latent_space.to_dict() | {"trained_with": "a|b"},
        "autoencoder": fingerprint(autoencoder.state_dict()),
    }
    make_pipeline(trained_on=record).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def refusal(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    assert main(["push", *map(str, args)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()[-1]


def test_weights_that_are_not_read_are_no_part_of_a_model(folder: Path):
    """As of repositories that hold the same weights twice, as safetensors and pickled."""
    before = ModelSource.find(str(folder)).hash()
    for name in ("pytorch_model.bin", "model.fp16.safetensors"):
        (folder / "text_encoder" / name).write_bytes(b"other weights")
    assert ModelSource.find(str(folder)).hash() == before
    left_out = prepare_upload(folder, "somebody/model").left_out
    assert left_out == ("text_encoder/model.fp16.safetensors", "text_encoder/pytorch_model.bin")


# --- push -------------------------------------------------------------------------------------------------------------


def test_what_is_pushed_is_loaded_by_its_name(the_hub: StandIn, folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["push", str(folder), "somebody/model", "--license", "apache-2.0"]) == 0
    out, _ = capsys.readouterr()
    assert out == f"somebody/model@{'0' * 39}1\n"
    with pytest.raises(OpenSoraError, match=r"unknown model 'somebody/model'.*hf download somebody/model"):
        ModelSource.find("somebody/model")  # nothing is fetched that nobody asked for
    assert "download" not in the_hub.calls
    pipeline = load_pipeline("somebody/model", download=True)
    assert pipeline.config.height == 16
    assert ModelSource.find("somebody/model").hash() == ModelSource.find(str(folder)).hash()
    assert the_hub.private == {"somebody/model": False}


def test_a_revision_is_another_model(the_hub: StandIn, folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["push", str(folder), "somebody/model"]) == 0
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"height": 32}))
    assert main(["push", str(folder), "somebody/model", "--revision", "large/v2"]) == 0
    assert load_pipeline("somebody/model", download=True).config.height == 16
    with pytest.raises(OpenSoraError, match="hf download somebody/model --revision large/v2"):
        load_pipeline("somebody/model@large/v2")
    assert load_pipeline("somebody/model@large/v2", download=True).config.height == 32
    capsys.readouterr()
    assert main(["inspect", "somebody/model@large/v2", "--quick"]) == 0
    assert "24x32" in capsys.readouterr().out


def test_a_commit_is_a_revision(the_hub: StandIn, saved: Path):
    commit = "a" * 40
    shutil.copytree(saved, the_hub.cache / "models--somebody--model" / "snapshots" / commit)
    assert load_pipeline(f"somebody/model@{commit}").config.height == 16
    with pytest.raises(OpenSoraError, match="unknown model"):
        load_pipeline(f"somebody/model@{'b' * 40}")


@pytest.mark.parametrize("name", ["somebody/model@../../x", "somebody/model@", "../model@v2", "somebody/model@a/../b"])
def test_no_name_leads_out_of_the_cache(the_hub: StandIn, saved: Path, name: str, tmp_path: Path):
    for place in (tmp_path / "x", the_hub.cache / "models--somebody--model" / "refs"):
        place.mkdir(parents=True)
    with pytest.raises(OpenSoraError, match="unknown model"):
        load_pipeline(name, download=True)
    assert the_hub.calls == []


def test_a_folder_goes_before_a_revision_of_its_name(the_hub: StandIn, saved: Path, tmp_path: Path):
    shutil.copytree(saved, tmp_path / "somebody" / "model")
    with pytest.raises(OpenSoraError, match="unknown model 'somebody/model@v2'"):
        load_pipeline("somebody/model@v2", download=True)
    assert the_hub.calls == []


def test_nothing_but_the_model_is_uploaded(the_hub: StandIn, folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / ".env").write_text("HF_TOKEN=secret")
    (folder / "transformer" / "losses.csv").write_text("0.1")
    (folder / "calibrations").mkdir()
    (folder / "calibrations" / "default.json").write_text("{}")
    (folder / "LICENSE").write_text("free")
    assert main(["push", str(folder), "somebody/model"]) == 0
    names = the_hub.branches["somebody/model", "main"].keys()
    assert {"model_index.json", "README.md", "LICENSE", "pipeline.py", "calibrations/default.json"} <= names
    assert {name.partition("/")[0] for name in names if "/" in name} == {
        *("transformer", "autoencoder", "text_encoder", "tokenizer", "scheduler", "calibrations")
    }
    assert not {".env", "transformer/losses.csv"} & names
    said = capsys.readouterr().err
    assert ".env" in said and "transformer/losses.csv" in said


def test_files_of_an_older_model_go(the_hub: StandIn, folder: Path):
    the_hub.create_repo("somebody/model", private=None, exist_ok=True)
    old = {"transformer/model-00001-of-00002.safetensors": b"old", "samples/ball.mp4": b"clip"}
    the_hub.branches["somebody/model", "main"] |= old
    assert main(["push", str(folder), "somebody/model"]) == 0
    names = the_hub.branches["somebody/model", "main"].keys()
    assert "samples/ball.mp4" in names and "transformer/model-00001-of-00002.safetensors" not in names


def test_the_card_says_what_the_model_is(the_hub: StandIn, folder: Path):
    assert main(["push", str(folder), "somebody/model", "--license", "apache-2.0"]) == 0
    text = the_hub.branches["somebody/model", "main"]["README.md"].decode()
    card = ModelCard(text)
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "text-to-video"
    rows = dict(line.strip("|").split("|", 1) for line in text.splitlines() if line.startswith("| "))
    facts = {name.strip(): value.strip() for name, value in rows.items()}
    assert "scaling factor" in facts["latent space"] and "scaling factor" in facts["trained on"]
    assert facts["licence"] == "apache-2.0"
    assert ModelSource.find(str(folder)).hash() in facts["model hash"]
    assert "--model somebody/model --download" in text
    assert str(folder) not in text


def test_a_card_of_ones_own_stays(the_hub: StandIn, folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "README.md").write_text("# mine")
    assert "say the licence there" in refusal(capsys, folder, "somebody/model", "--license", "mit")
    assert main(["push", str(folder), "somebody/model"]) == 0
    assert the_hub.branches["somebody/model", "main"]["README.md"] == b"# mine"


def test_a_dry_run_uploads_nothing(the_hub: StandIn, folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["push", str(folder), "somebody/model", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "transformer/config.json" in out and "pipeline_tag: text-to-video" in out
    assert the_hub.calls == []


def test_private_is_private(the_hub: StandIn, folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["push", str(folder), "somebody/secret", "--private"]) == 0
    assert the_hub.private["somebody/secret"]
    the_hub.create_repo("somebody/public", private=False, exist_ok=True)
    capsys.readouterr()
    assert "somebody/public is public" in refusal(capsys, folder, "somebody/public", "--private")
    assert the_hub.branches["somebody/public", "main"].keys() == {".gitattributes"}


# --- mistakes, of which nothing reaches the Hub ----------------------------------------------------------------------


def without_weights(folder: Path) -> None:
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()


def damaged(folder: Path) -> None:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def other_autoencoder(folder: Path) -> None:
    path = folder / "autoencoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scaling_factor": 0.5}))


@pytest.mark.parametrize("harm", [without_weights, damaged, other_autoencoder, shutil.rmtree])
def test_a_model_that_is_wrong_is_not_uploaded(
    the_hub: StandIn, folder: Path, harm: Any, capsys: pytest.CaptureFixture[str]
):
    harm(folder)
    refusal(capsys, folder, "somebody/model")
    assert the_hub.calls == []


@pytest.mark.parametrize("name", ["model", "somebody/model@v2", "a/b/c", "../model", "somebody/mo del", ""])
def test_a_name_that_is_none_is_refused(the_hub: StandIn, folder: Path, name: str, capsys: pytest.CaptureFixture[str]):
    assert "expected one such as somebody/model" in refusal(capsys, folder, name)
    assert the_hub.calls == []


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--license", "My Own!"], "expected an identifier of the Hub"), (["--revision", "../x"], "name of a branch")],
)
def test_an_option_that_is_wrong_is_refused(
    the_hub: StandIn, folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert message in refusal(capsys, folder, "somebody/model", *options)
    assert the_hub.calls == []


def test_a_model_that_borrows_a_part_is_refused(the_hub: StandIn, capsys: pytest.CaptureFixture[str]):
    from opensora.checkpoints.published import BUNDLED

    folder = BUNDLED["toybox-iddpm"].folder
    assert "has no autoencoder of its own" in refusal(capsys, folder, "somebody/model")
    assert "opensora convert NAME FOLDER" in refusal(capsys, "toybox", "somebody/model")
    assert the_hub.calls == []


def test_a_server_that_does_not_answer_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", "http://127.0.0.1:9", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main(["push", str(folder), "somebody/model"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "somebody/model was not uploaded" in said and "hf_secret" not in said


def test_without_a_token_nothing_is_uploaded(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["push", str(folder), "somebody/model"]) == 2
    assert "somebody/model was not uploaded" in capsys.readouterr().err
