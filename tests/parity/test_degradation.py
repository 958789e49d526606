"""Clips made worse against Open-Sora 1.3."""

from torch.testing import assert_close

from opensora.data.degradation import mix_noise, without_detail, without_frames


def test_clips_made_worse(golden):
    fixture = golden("augment_v1_3")
    video, ratios = fixture["in.x"], fixture.meta["ratios"]
    ours = {"noise0.25": mix_noise(video, fixture["in.noise"], 0.25)}
    ours |= {f"spatial{ratio}": without_detail(video, ratio) for ratio in ratios}
    ours |= {f"temporal{ratio}": without_frames(video, ratio) for ratio in ratios}
    expected = fixture.under("out")
    assert set(ours) == set(expected)
    for name, worse in expected.items():
        assert_close(ours[name], worse, rtol=0, atol=1e-6)
