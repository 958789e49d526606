"""docs/training.py: from a folder of clips to generated ones, by the commands it shows, at a tiny size."""

import importlib.util
from pathlib import Path

import pytest
from PIL import Image
from tiny_pipeline import make_autoencoder

from opensora.media.write import write_video
from opensora.toybox.captions import plain_caption
from opensora.toybox.specs import sample_specs
from opensora.toybox.world import render

SCRIPT = Path(__file__).parent.parent / "docs" / "training.py"


@pytest.fixture
def page():
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("training_page", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_whole_way_from_clips_to_pictures(page, tmp_path, monkeypatch, capsys):
    specs = sample_specs(3, 0)
    video, _ = render(specs, num_frames=page.FRAMES + 3, height=96, width=96)
    pieces = []
    for number, (spec, clip) in enumerate(zip(specs, video, strict=True)):
        write_video(tmp_path / "videos" / f"{number}.mp4", clip, fps=8)
        pieces.append(page.Piece(f"{number}.mp4", 1, 1, plain_caption(spec)))
    make_autoencoder().save_pretrained(tmp_path / "autoencoder")
    monkeypatch.chdir(tmp_path)
    page.cut(tuple(pieces), tmp_path / "videos", tmp_path / "clips")
    small = {"hidden_size": 48, "depth": 1, "num_heads": 2}
    settings = [f"objective.autoencoder={tmp_path / 'autoencoder'}", "loop.steps=6", "loop.log_every=2"]
    settings += [f"objective.transformer.{name}={value}" for name, value in small.items()]
    settings += ["objective.defaults.num_inference_steps=2"]
    captions = [piece.caption for piece in pieces]
    figures = page.whole_way(captions, tmp_path / "pictures", tuple(settings))
    assert set(figures) == {"autoencoder_db", "generated_db", "generated_to_autoencoder_db", "nearest_is_own"}
    assert 0 <= figures["nearest_is_own"] <= 1 and 0 < figures["generated_db"] < 40
    loss, clips = (Image.open(tmp_path / "pictures" / f"overfit_{name}") for name in ("loss.png", "clips.jpg"))
    assert loss.size == (600, 320)
    assert clips.size == (9 * (128 + 2) + 2, 3 * (80 + 14 + 2) + 2)
    assert "3 clips, 3 captions" in capsys.readouterr().out


def test_a_folder_without_the_videos_is_told(page, tmp_path):
    with pytest.raises(SystemExit, match=r"holds no bigbuckbunny.mp4; make clips fetches it"):
        page.cut(page.PIECES, tmp_path, tmp_path)
