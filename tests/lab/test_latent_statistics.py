"""Statistics and spectra of latents, against latents whose figures are known."""

import math

import pytest
import torch

from opensora.errors import OpenSoraError
from opensora.lab.latents.spectrum import PowerSpectrum
from opensora.lab.latents.statistics import ChannelStatistics, Histogram

SIZE = (3, 8, 20, 24)  # channels, latent frames, rows, columns


def gaussian(num_clips: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_clips, *SIZE, generator=torch.Generator().manual_seed(seed))


def figures_of(latents: torch.Tensor):
    statistics = ChannelStatistics(latents.shape[1])
    statistics.add(latents)
    return statistics.figures()


def test_mean_deviation_and_kurtosis_of_known_noise():
    noise = gaussian(16)
    mean, std = torch.tensor([50.0, -3.0, 0.0]), torch.tensor([0.5, 2.0, 1.0])
    latents = noise * std[:, None, None, None] + mean[:, None, None, None]
    found = figures_of(latents)
    # 61,440 values a channel: a mean is good to 0.004 of the deviation, a deviation to 0.3 %, a kurtosis to 0.02
    torch.testing.assert_close(found.mean, mean.double(), rtol=0, atol=0.04)
    torch.testing.assert_close(found.std, std.double(), rtol=0.015, atol=0)
    torch.testing.assert_close(found.kurtosis, torch.full((3,), 3.0).double(), rtol=0, atol=0.1)
    torch.testing.assert_close(found.std, latents.double().transpose(0, 1).flatten(1).std(dim=1, correction=0))
    assert found.deviation == pytest.approx(float(latents.double().std(correction=0)), rel=1e-9)


def test_kurtosis_tells_other_distributions():
    uniform = torch.rand(8, *SIZE, generator=torch.Generator().manual_seed(1))
    laplace = (gaussian(8).abs() + 1e-9) * gaussian(8, 2).sign() * gaussian(8, 3).abs()  # a product of normals: 9
    assert float(figures_of(uniform).kurtosis.mean()) == pytest.approx(1.8, abs=0.05)
    assert float(figures_of(laplace).kurtosis.mean()) == pytest.approx(9.0, abs=1.0)


def test_kurtosis_is_about_the_mean_of_all_clips_and_not_of_the_first():
    skewed = gaussian(6).exp() + 3 * torch.arange(6)[:, None, None, None, None]
    values = skewed.double().transpose(0, 1).flatten(1)
    centred = values - values.mean(dim=1, keepdim=True)
    direct = centred.pow(4).mean(dim=1) / centred.square().mean(dim=1).square()
    torch.testing.assert_close(figures_of(skewed).kurtosis, direct, rtol=1e-8, atol=0)


def test_clips_one_by_one_are_the_same_as_all_at_once():
    latents = gaussian(5) * 3 + 100
    one_by_one = ChannelStatistics(3)
    for clip in latents:
        one_by_one.add(clip[None])
    together, apart = figures_of(latents), one_by_one.figures()
    for name in ("mean", "std", "kurtosis", "covariance", "mean_errors", "log_errors"):
        torch.testing.assert_close(getattr(apart, name), getattr(together, name), rtol=1e-9, atol=1e-9)
    assert apart.num_clips == 5 and apart.log_error == pytest.approx(together.log_error)


def test_principal_axes_and_how_many_channels_there_really_are():
    noise = gaussian(8)
    assert figures_of(noise).effective_channels == pytest.approx(3, abs=0.01)
    copied = noise.clone()
    copied[:, 1] = -copied[:, 0]
    found = figures_of(copied)
    torch.testing.assert_close(found.eigenvalues, torch.tensor([2.0, 1.0, 0.0]).double(), rtol=0.03, atol=1e-9)
    shares = (2 / 3, 1 / 3)
    assert found.effective_channels == pytest.approx(math.exp(-sum(s * math.log(s) for s in shares)), rel=0.01)


def test_figures_of_latents_that_are_scaled_and_shifted():
    latents, factor, offset = gaussian(4), torch.tensor([0.5, 2.0, -1.0]), torch.tensor([1.0, 0.0, 3.0])
    calculated = figures_of(latents).transformed(factor.double(), offset.double())
    measured = figures_of(latents * factor[:, None, None, None] + offset[:, None, None, None])
    for name in ("mean", "std", "kurtosis", "covariance", "mean_errors", "log_errors"):
        torch.testing.assert_close(getattr(calculated, name), getattr(measured, name), rtol=1e-5, atol=1e-5)
    assert calculated.deviation == pytest.approx(measured.deviation, rel=1e-5)


def test_intervals_hold_what_is_true_of_all_clips_nineteen_times_of_twenty():
    generator = torch.Generator().manual_seed(4)
    held = torch.zeros(3)
    for _ in range(200):
        loudness = 1 + 0.5 * torch.rand(30, 1, 1, 1, 1, generator=generator)  # clips differ, as real ones do
        offset = 0.3 * torch.randn(30, 1, 1, 1, 1, generator=generator)
        found = figures_of(torch.randn(30, 1, 1, 6, 6, generator=generator) * loudness + offset)
        true = math.sqrt(19 / 12 + 0.3**2)  # E((1 + u / 2)^2) = 1 + 1 / 2 + 1 / 12
        low, high = found.interval
        near = abs(math.log(float(found.std[0]) / true)) <= 1.96 * float(found.log_errors[0])
        held += torch.tensor([low <= true <= high, abs(found.mean[0]) <= 1.96 * found.mean_errors[0], near])
    assert ((held >= 178) & (held <= 199)).all(), held  # 190 are expected, give or take 3


def test_one_clip_says_nothing_of_others():
    found = figures_of(gaussian(1))
    assert found.interval == (0.0, math.inf) and found.to_dict()["interval"] == [0.0, None]


def test_a_channel_that_never_changes_has_no_kurtosis_and_json_says_none():
    latents = gaussian(2)
    latents[:, 1] = 7.0
    told = figures_of(latents).to_dict()
    assert told["std"][1] == pytest.approx(0, abs=1e-9) and told["kurtosis"][1] is None


def test_what_is_no_number_is_refused():
    latents = gaussian(1)
    latents[0, 0, 0, 0, 0] = math.nan
    with pytest.raises(OpenSoraError, match="NaN"):
        ChannelStatistics(3).add(latents)
    with pytest.raises(OpenSoraError, match="no latents"):
        ChannelStatistics(3).figures()


def test_a_histogram_grows_without_losing_a_value():
    histogram, values = Histogram(2, bins=16), torch.zeros(1, 2, 1, 1, 6)
    values[0, 0, 0, 0] = torch.tensor([-0.9, -0.1, 0.1, 0.2, 0.6, 0.9])
    histogram.add(values)
    assert histogram.reach == 1.0
    histogram.add(values * 10)
    assert histogram.reach == 16.0 and histogram.counts.sum(dim=1).tolist() == [12, 12]
    both = torch.cat([values[0, 0, 0, 0], values[0, 0, 0, 0] * 10])
    expected = torch.histc(both, bins=16, min=-16, max=16)
    assert histogram.counts[0].tolist() == expected.long().tolist()


# --- spectra ----------------------------------------------------------------------------------------------------------


def pink(num_clips: int, power: float) -> torch.Tensor:
    """Noise over space of power f^-`power`, the same at all times."""
    rows, columns = torch.fft.fftfreq(64)[:, None], torch.fft.rfftfreq(64)
    frequency = (rows.square() + columns.square()).sqrt().clamp_min(1 / 64)
    noise = torch.randn(num_clips, 2, 1, 64, 64, generator=torch.Generator().manual_seed(5))
    return torch.fft.irfft2(torch.fft.rfft2(noise) * frequency ** (-power / 2), s=(64, 64)).expand(-1, -1, 5, -1, -1)


def spectrum_of(latents: torch.Tensor) -> PowerSpectrum:
    spectrum = PowerSpectrum((latents.shape[2], latents.shape[3], latents.shape[4]), latents.shape[1])
    spectrum.add(latents)
    return spectrum


def test_white_noise_has_its_variance_at_every_frequency():
    spectrum = spectrum_of(3 * gaussian(16) + 40)
    frequencies, power = spectrum.space()
    assert frequencies[0] == pytest.approx(1 / 20) and frequencies[-1] == pytest.approx(0.5)
    torch.testing.assert_close(power.mean(dim=0)[1:], torch.full((9,), 9.0).double(), rtol=0.1, atol=0)
    frequencies, power = spectrum.time()
    assert frequencies.tolist() == pytest.approx([0, 1 / 8, 2 / 8, 3 / 8, 4 / 8])
    torch.testing.assert_close(power.mean(dim=0), torch.full((5,), 9.0).double(), rtol=0.05, atol=0)
    assert spectrum.slope() == pytest.approx(0, abs=0.1)
    assert spectrum.still() == pytest.approx(1 / 8, rel=0.1)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_pink_noise_has_its_slope(power):
    spectrum = spectrum_of(pink(12, power))
    assert spectrum.slope() == pytest.approx(-power, abs=0.2)


def test_what_does_not_move_is_still():
    assert spectrum_of(pink(4, 1.0)).still() == pytest.approx(1.0)


def test_small_latents_have_no_spectrum():
    spectrum = spectrum_of(torch.randn(2, 3, 1, 3, 9, generator=torch.Generator().manual_seed(6)))
    assert spectrum.slope() is None and spectrum.still() is None
    assert spectrum.to_dict()["space"]["frequencies"] == spectrum.to_dict()["time"]["frequencies"] == []
