"""Speech to text with connectionist temporal classification, after Deep Speech 2 (https://arxiv.org/abs/1512.02595).

Log-mel features, two-dimensional convolutions that make fewer frames of them, recurrent layers, and at each frame the
probability of each unit or of none. Layer norm stands where the paper has batch norm, so that an utterance's output
does not depend on the others in its batch; for the same reason what lies behind its end is zero to every layer.

Every parameter is used only inside the forward pass of the layer that owns it, which is where ZeRO-3 gathers it.

Shapes: B utterances of S samples, F frames of features, M mel bands, T frames of output, C channels, K units and none.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bigbatch.recipes.core.layers import Linear, draw
from bigbatch.recipes.core.models.config import ConvolutionSection, SpeechSection
from bigbatch.recipes.core.models.recurrent import recurrent

FULL_SCALE = 2**15  # samples are 16-bit numbers
QUIETEST = 1e-8
"""Power below which all is silence, 80 dB below a sine of full scale."""
HEAD_RANGE = 0.02


class SpeechModel(nn.Module):
    """From samples to the logarithm of each unit's probability at each frame; unit 0 is none (CTC's blank)."""

    def __init__(self, section: SpeechSection, sample_rate: int, num_units: int) -> None:
        super().__init__()
        self.features = LogMel(section, sample_rate)
        channels = [1, *(convolution.channels for convolution in section.convolutions)]
        bands, layers = section.num_mels, []
        for before, convolution in zip(channels, section.convolutions, strict=False):
            layers.append(Convolution(before, bands, convolution))
            bands = layers[-1].bands
        self.convolutions = nn.ModuleList(layers)
        width = section.hidden_size * (1 + section.bidirectional)
        widths = [section.recurrent_inputs, *(section.num_layers - 1) * [width]]
        self.recurrent = nn.ModuleList(Directions(section, size) for size in widths)
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(section.dropout)
        self.head = Linear(width, num_units + 1, True, HEAD_RANGE)

    def forward(
        self,
        samples: torch.Tensor,  # int16 [B, S]
        lengths: torch.Tensor,  # [B], each of one frame of output or more
        time_masks: torch.Tensor | None = None,  # [B, N, 2] first frame and the one behind the last
        band_masks: torch.Tensor | None = None,  # [B, N, 2]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probabilities float32 [B, T, K] and how many frames of them [B] count."""
        features, frames = self.features(samples, lengths)
        features = masked(masked(features, time_masks, 1), band_masks, 2)
        hidden = features.to(self.norm.weight.dtype).unsqueeze(1)  # [B, 1, F, M]
        for convolution in self.convolutions:
            hidden, frames = convolution(hidden, frames)
        states = hidden.transpose(1, 2).flatten(2)  # [B, T, C * bands]
        for layer in self.recurrent:
            states = self.dropout(layer(states, frames))
        return self.head(self.norm(states)).float().log_softmax(-1), frames


def ctc_loss(
    log_probabilities: torch.Tensor,  # [B, T, K]
    frames: torch.Tensor,  # [B]
    units: torch.Tensor,  # [B, L] from 1 on, 0 behind the end
    unit_lengths: torch.Tensor,  # [B]
) -> torch.Tensor:
    """Return the negative logarithm of the probability of the units, however they are aligned, summed over utterances.

    It is infinite where there are fewer frames than units, and one more for each unit that equals the one before.
    """
    return F.ctc_loss(log_probabilities.transpose(0, 1), units, frames, unit_lengths, reduction="sum")


class LogMel(nn.Module):
    """The logarithm of the power in mel bands, about from -2 (silence) to 2, the same whatever stands beside it.

    Frame i is a Hann window around the i-th hop. The Fourier transform is a product with sines and cosines, and the
    bands are triangles on the scale 2595 log10(1 + f / 700): nothing here but products, so that it can be exported.
    All in float32, whatever the model's dtype.
    """

    def __init__(self, section: SpeechSection, sample_rate: int) -> None:
        super().__init__()
        self.hop = round(section.hop_seconds * sample_rate)
        size = round(section.window_seconds * sample_rate)
        fft_size = 2 ** math.ceil(math.log2(size) + 1)  # twice as fine as it has to be, for the lowest bands
        window = np.hanning(size + 1)[:-1]
        angles = 2 * np.pi * np.outer(np.arange(size), np.arange(fft_size // 2 + 1)) / fft_size
        waves = np.concatenate([np.cos(angles), np.sin(angles)], 1) * (window * 2 / window.sum())[:, None]
        # Not buffers: those would be rounded to bfloat16 with the weights.
        self.waves = waves.astype(np.float32)  # [window, 2 * bins]
        self.bands = mel_bands(section.num_mels, fft_size, sample_rate, section.lowest_hertz).astype(np.float32)

    def forward(self, samples: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features [B, F, M] of samples int16 [B, S], zero behind the end, and the frames [B] that count."""
        waves, bands = (torch.from_numpy(array).to(samples.device) for array in (self.waves, self.bands))
        size, frames = len(waves), lengths // self.hop
        is_sample = torch.arange(samples.shape[1], device=samples.device) < lengths.unsqueeze(1)
        before = (size - self.hop) // 2
        padded = F.pad(samples.float() * is_sample / FULL_SCALE, (before, size))
        windows = padded.unfold(1, size, self.hop)[:, : int(samples.shape[1]) // self.hop]
        power = (windows @ waves).square().unflatten(-1, (2, -1)).sum(-2)
        features = ((power @ bands).clamp(min=QUIETEST).log10() + 4) / 2
        return features * is_within(frames, features.shape[1]).unsqueeze(-1), frames


def mel_bands(num_mels: int, fft_size: int, sample_rate: int, lowest_hertz: float) -> np.ndarray:
    """Return the weights [bins, M] of triangles, 1 in the middle, that begin and end in their neighbours' middles.

    Middles are equally far apart on the mel scale (S. S. Stevens's, by the formula of O'Shaughnessy 1987).
    """
    lowest, highest = (2595 * math.log10(1 + hertz / 700) for hertz in (lowest_hertz, sample_rate / 2))
    edges = 700 * (10 ** (np.linspace(lowest, highest, num_mels + 2) / 2595) - 1)
    frequencies = np.arange(fft_size // 2 + 1)[:, None] * sample_rate / fft_size
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling))


class Convolution(nn.Module):
    """A convolution over frames and bands, a rectifier that ends at 20 as in the paper, then a norm of each frame."""

    def __init__(self, channels: int, bands: int, section: ConvolutionSection) -> None:
        super().__init__()
        self.stride, self.bands = section.frame_stride, -(-bands // section.band_stride)
        self.layer = _Convolution2d(
            channels,
            section.channels,
            (section.frames, section.bands),
            (section.frame_stride, section.band_stride),
            (section.frames // 2, section.bands // 2),
        )
        self.norm = nn.LayerNorm([section.channels, self.bands])

    def forward(self, hidden: torch.Tensor, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map hidden [B, C, F, bands], of which so many frames [B] count, to the next; zero behind the end."""
        count = hidden.shape[2] // self.stride
        frames = frames // self.stride
        found = self.layer(hidden)[:, :, :count].clamp(0, 20).transpose(1, 2)  # [B, F, C, bands]
        found = self.norm(found) * is_within(frames, count)[:, :, None, None]
        return found.transpose(1, 2), frames


class Directions(nn.Module):
    """A recurrent layer that reads the frames from the first to the last, and one that reads them the other way."""

    def __init__(self, section: SpeechSection, inputs: int) -> None:
        super().__init__()
        self.onward = recurrent(section.cell, inputs, section.hidden_size)
        self.back = recurrent(section.cell, inputs, section.hidden_size) if section.bidirectional else None

    def forward(self, states: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        """Map states [B, T, D], of which so many frames [B] count, to those of both directions, side by side."""
        onward, _ = self.onward(states)
        if self.back is None:
            return onward
        # An utterance is turned round within its own length: on a CPU many times faster than a packed sequence.
        places = torch.arange(states.shape[1], device=states.device)
        turned = torch.where(places < frames.unsqueeze(1), frames.unsqueeze(1) - 1 - places, places).unsqueeze(-1)
        back, _ = self.back(states.take_along_dim(turned, 1))
        return torch.cat([onward, back.take_along_dim(turned, 1)], -1)


class _Convolution2d(nn.Conv2d):
    def reset_parameters(self) -> None:
        """Draw the weights for a rectifier (https://arxiv.org/abs/1502.01852)."""
        draw(self.weight, math.sqrt(2 / self.weight[0].numel()))
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]


def is_within(lengths: torch.Tensor, count: int) -> torch.Tensor:
    """Tell which of `count` places come before an end: [B, count]."""
    return torch.arange(count, device=lengths.device) < lengths.unsqueeze(1)


def masked(features: torch.Tensor, masks: torch.Tensor | None, dim: int) -> torch.Tensor:
    """Set features [B, F, M] to 0 between the ends of masks [B, N, 2] (SpecAugment, https://arxiv.org/abs/1904.08779)."""
    if masks is None:
        return features
    places = torch.arange(features.shape[dim], device=features.device)
    is_hidden = ((places >= masks[..., :1]) & (places < masks[..., 1:])).any(1)  # [B, F or M]
    return features.masked_fill(is_hidden.unsqueeze(3 - dim), 0.0)


def count_operations(model: SpeechModel, frames: float) -> float:
    """Count the operations, forward and backward, on an utterance of so many frames of features.

    6 for each weight and place where it is used (https://arxiv.org/abs/2001.08361, section 2.1).
    """
    total = 0.0
    layers: list[Any] = list(model.convolutions)
    for layer in layers:
        frames /= layer.stride
        total += layer.layer.weight.numel() * frames * layer.bands
    weights = sum(parameter.numel() for layer in (model.recurrent, model.head) for parameter in layer.parameters())
    return 6 * (total + weights * frames)
