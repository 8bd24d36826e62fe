"""Features against transformers' own, the loss against all alignments spelt out, and utterances in batches."""

import itertools
import math

import numpy as np
import pytest
import torch
from transformers import audio_utils

from bigbatch.launcher.predict import count_speech_parameters
from bigbatch.recipes.core.models.config import ConvolutionSection, SpeechSection
from bigbatch.recipes.core.models.speech import LogMel, SpeechModel, count_operations, ctc_loss, mel_bands

CONVOLUTIONS = (
    ConvolutionSection(channels=3, frame_stride=2, band_stride=2),
    ConvolutionSection(channels=2, frames=3, bands=3, frame_stride=3),
)
TINY = SpeechSection(num_mels=10, convolutions=CONVOLUTIONS, cell="gru", num_layers=2, hidden_size=6)


def waves(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return utterances int16 [B, S] of noise, and noise behind their ends."""
    generator = np.random.default_rng(1)
    samples = generator.integers(-(2**14), 2**14, (len(lengths), max(lengths) + 50)).astype(np.int16)
    return torch.from_numpy(samples), torch.tensor(lengths)


@pytest.mark.parametrize("rate", [8000, 16000])
def test_the_features_are_those_of_transformers(rate):
    section = SpeechSection(num_mels=40)
    samples, lengths = waves(rate // 2)
    found, frames = LogMel(section, rate)(samples[:, : rate // 2], lengths)
    window, hop = rate // 40, rate // 100
    fft_size = 2 ** math.ceil(math.log2(window) + 1)
    bands = audio_utils.mel_filter_bank(fft_size // 2 + 1, 40, 20.0, rate / 2, rate, mel_scale="htk")
    np.testing.assert_allclose(mel_bands(40, fft_size, rate, 20.0), bands, atol=1e-9)
    hann = audio_utils.window_function(window, "hann")
    before = (window - hop) // 2
    wave = np.pad(samples[0, : rate // 2].numpy() / 2**15, (before, window))
    power = audio_utils.spectrogram(wave, hann, window, hop, fft_size, 2.0, False, mel_filters=bands).T
    expected = (np.log10(np.maximum(power[:50] / (hann.sum() / 2) ** 2, 1e-8)) + 4) / 2
    assert frames.tolist() == [50]
    np.testing.assert_allclose(found[0], expected, atol=2e-4)


def test_a_sine_of_full_scale_is_at_zero_decibels_and_silence_at_the_bottom():
    times = np.arange(8000) / 8000
    loud = np.round(32767 * np.sin(2 * np.pi * 1000 * times)).astype(np.int16)
    samples = torch.from_numpy(np.stack([loud, 0 * loud]))
    found, _ = LogMel(SpeechSection(), 8000)(samples, torch.tensor([8000, 8000]))
    assert found[0, 50].max().item() == pytest.approx(2.0, abs=0.3)  # (0 + 4) / 2, but in several bins
    assert torch.equal(found[1], torch.full_like(found[1], -2.0))


@pytest.mark.parametrize("lengths", [(800, 4321, 1999), (4321,), (480, 4000, 4000, 4321)])
def test_an_utterance_comes_out_the_same_whatever_stands_beside_it(lengths):
    torch.manual_seed(0)
    model = SpeechModel(TINY, 8000, 5).eval()
    samples, counts = waves(*lengths)
    with torch.no_grad():
        found, frames = model(samples, counts)
        assert frames.tolist() == [length // (80 * 6) for length in lengths]
        for row, length in enumerate(lengths):
            alone, (count,) = model(samples[row : row + 1, :length], counts[row : row + 1])
            torch.testing.assert_close(found[row, :count], alone[0], atol=1e-6, rtol=1e-5)


def test_the_loss_is_the_sum_over_all_alignments():
    torch.manual_seed(0)
    logarithms = torch.randn(2, 5, 3).log_softmax(-1)
    texts, frames = [(1, 1, 2), (2,)], [5, 3]
    expected = 0.0
    for row, text, count in zip(logarithms, texts, frames, strict=True):
        total = 0.0
        for path in itertools.product(range(3), repeat=count):
            units = [unit for unit, _ in itertools.groupby(path) if unit]
            total += math.exp(sum(row[t, unit].item() for t, unit in enumerate(path))) if units == list(text) else 0
        expected -= math.log(total)
    units = torch.tensor([(1, 1, 2), (2, 0, 0)])
    found = ctc_loss(logarithms, torch.tensor(frames), units, torch.tensor([3, 1]))
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_masks_hide_their_stretches_and_nothing_else():
    torch.manual_seed(0)
    flat = SpeechSection(num_mels=10, convolutions=(), num_layers=1, hidden_size=4)
    model = SpeechModel(flat, 8000, 5).eval()
    samples, lengths = waves(4000)
    kept = []
    model.recurrent[0].register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0][0]))
    with torch.no_grad():
        model(samples, lengths)
        model(samples, lengths, torch.tensor([[[3, 7], [20, 20]]]), torch.tensor([[[8, 10]]]))
    plain, masked = kept
    expected = plain.clone()
    expected[3:7] = 0
    expected[:, 8:] = 0
    assert torch.equal(masked, expected)


@pytest.mark.parametrize("change", [{}, {"cell": "lstm", "bidirectional": False}, {"convolutions": ()}])
def test_the_launcher_counts_the_parameters(change):
    section = TINY.model_copy(update=change)
    model = SpeechModel(section, 8000, 5)
    assert count_speech_parameters(section, 5) == sum(parameter.numel() for parameter in model.parameters())


def test_operations_are_counted_by_weight_and_place():
    model = SpeechModel(TINY, 8000, 5)
    first, second = 3 * 25 * 30 * 5, 2 * 3 * 9 * 10 * 5  # weights x frames left of 60 x bands left of 10
    layers = sum(p.numel() for p in (*model.recurrent.parameters(), *model.head.parameters()))
    assert count_operations(model, 60) == 6 * (first + second + layers * 10)
