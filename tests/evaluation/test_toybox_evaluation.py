"""The toybox evaluation: fixed samples, honest counting, gates, mistakes on the command line."""

import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipeline import make_autoencoder

from opensora.cli.main import main
from opensora.errors import OpenSoraError
from opensora.evaluation.judge import Judge
from opensora.evaluation.toybox import (
    contact_sheet,
    generate,
    held_out_samples,
    real_accuracy,
    reconstruction_accuracy,
    share_right,
)
from opensora.toybox.captions import language_of, plain_caption
from opensora.toybox.specs import ATTRIBUTES, EASY_WORLD, is_held_out, sample_specs
from opensora.toybox.world import render


class Pipeline:
    """Draws what it is told, and remembers what it was asked."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.specs = {plain_caption(s): s for s in sample_specs(40, 0, EASY_WORLD, "held_out")}

    def __call__(self, prompts, *, generator, output_type):
        assert output_type == "pt"
        assert len(generator) == len(prompts)
        self.prompts += prompts
        self.drawn = [float(torch.rand((), generator=g)) for g in generator]
        video, _ = render([self.specs[p] for p in prompts], num_frames=3, height=16, width=16)
        return SimpleNamespace(frames=(video.transpose(1, 2) + 1) / 2)


def test_samples_are_held_out_and_fixed():
    samples = held_out_samples(30, seed=4)
    assert samples[:10] == held_out_samples(10, seed=4)
    assert samples[0].id == "held_out-4-00000"
    assert all(is_held_out(s.wanted["shape"], s.wanted["colour"], s.wanted["motion"]) for s in samples)
    draws = [float(torch.rand((), generator=s.noise())) for s in samples]
    assert len(set(draws)) == len(draws)
    assert draws == [float(torch.rand((), generator=s.noise())) for s in samples]


def test_the_same_clips_are_asked_for_in_chinese():
    english, chinese = held_out_samples(20), held_out_samples(20, language="zh")
    assert [(s.id, s.wanted) for s in english] == [(s.id, s.wanted) for s in chinese]
    assert all(language_of(s.prompt) == "zh" for s in chinese)


def test_noise_does_not_depend_on_the_batch():
    pipeline, samples = Pipeline(), held_out_samples(3)
    video = generate(pipeline, samples)
    together = pipeline.drawn
    assert video.shape == (3, 3, 3, 16, 16)
    generate(pipeline, samples[2:])
    assert pipeline.drawn == together[2:]


def test_share_right_counts_whole_clips_too():
    right = {name: labels[0] for name, labels in ATTRIBUTES.items()}
    half = share_right([right, right], [right, right | {"size": "large"}])
    assert half["size"] == 0.5
    assert half["all"] == 0.5
    assert half["shape"] == 1
    assert share_right([], []) == {}


def test_gates_read_the_same_clips_and_a_perfect_autoencoder_changes_nothing():
    torch.manual_seed(0)
    judge = Judge(dim=8).eval()
    perfect = SimpleNamespace(encode_video=lambda video: video, decode_latents=lambda latents, num_frames: latents)
    size = (3, 32, 32)
    real = real_accuracy(judge, 12, seed=1, size=size, batch_size=5)
    assert reconstruction_accuracy(perfect, judge, 12, seed=1, size=size, batch_size=5) == real
    assert set(real) == {*ATTRIBUTES, "all"}


def test_contact_sheet_is_a_grid_of_frames(tmp_path):
    from PIL import Image

    specs = sample_specs(2, 0)
    video, _ = render(specs, num_frames=17, height=32, width=48)
    path = tmp_path / "sheets" / "sheet.png"
    contact_sheet([(plain_caption(s), v) for s, v in zip(specs, video, strict=True)], path)
    image = Image.open(path)
    assert image.size == (9 * (96 + 2) + 2, 2 * (64 + 14 + 2) + 2)
    expected = ((video[1, :, 16, 31, 47] + 1) * 127.5).round().byte().tolist()
    assert list(image.getpixel((image.width - 3, image.height - 3))) == expected
    with pytest.raises(OpenSoraError, match="no clips"):
        contact_sheet([], path)


def test_an_interruption_leaves_the_old_contact_sheet(tmp_path, monkeypatch):
    from PIL import Image

    def half(self, path, **_):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    path = tmp_path / "sheet.png"
    path.write_bytes(b"old")
    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(KeyboardInterrupt):
        contact_sheet([("a clip", torch.zeros(3, 2, 8, 8))], path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["toybox-vae", "--autoencoder", "nowhere"], "no autoencoder in nowhere"),
        (["toybox-vae", "--autoencoder", ".", "--num-clips", "0"], "--num-clips is 0"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(args: list[str], message: str, capsys):
    assert main(["evaluate", *args]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_command_refuses_a_damaged_autoencoder(tmp_path, capsys):
    make_autoencoder().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({name: weight * torch.nan for name, weight in load_file(path).items()}, path)
    assert main(["evaluate", "toybox-vae", "--autoencoder", str(tmp_path), "--num-clips", "3"]) == 2
    error = capsys.readouterr().err
    assert "NaN or infinite values" in error and error.count("\n") == 1


def test_the_command_reads_through_an_autoencoder(tmp_path, capsys):
    make_autoencoder().save_pretrained(tmp_path)
    size = ["--num-frames", "5", "--height", "32", "--width", "32"]
    assert main(["evaluate", "toybox-vae", "--autoencoder", str(tmp_path), "--num-clips", "3", *size]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "autoencoder, 3 clips" in out and re.search(r"PSNR: \d+\.\d dB", out)
