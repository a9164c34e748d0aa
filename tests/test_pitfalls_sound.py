"""Faults of published code in what is heard, each with a test that fails when it is put in; the list is in test_pitfalls.py."""
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from talking_face.config import ModelConfig
from talking_face.core import DataError
from talking_face.data.episodes import EpisodeSampler
from talking_face.signals.sound_inputs import sound_inputs, sound_shape
from test_pitfalls import MODEL, number_of, store      # noqa: F401, a fixture among them

pytestmark = pytest.mark.usefixtures('one_thread')

HEARING = MODEL.replace(sound='logmel', sound_size=8, sound_width=4)
THESIS = HEARING.replace(sound='thesis_mel')
NTSC = Fraction(30000, 1001)
RATES = pytest.mark.parametrize('fps', [Fraction(25), NTSC, Fraction(24000, 1001), float(NTSC)], ids=str)


def noise(seconds: float) -> np.ndarray: return (0.1 * np.random.default_rng(0).standard_normal(round(16000 * seconds))).astype(np.float32)


def clicks(seconds: float, times_s: list[Fraction]) -> np.ndarray:
    "Silence with 2 ms of noise around every time."
    samples, burst = np.zeros(round(16000 * seconds), np.float32), noise(0.002) * 5
    for time_s in times_s: samples[(first := round(16000 * time_s) - 16):first + 32] = burst
    return samples


def middles(frames: list[int], fps: Fraction | float) -> list[Fraction]:
    return [(frame + Fraction(1, 2)) / Fraction(fps).limit_denominator(100_000) for frame in frames]


def test_loudness_is_kept():
    "AV 28: decibels counted from each piece's own maximum, so that a whisper and a shout looked alike, and silence like speech."
    times = middles(list(range(10, 40)), 25)
    loud, quiet, silent = (sound_inputs(factor * noise(2), times, HEARING, 25) for factor in (1, 0.1, 0))
    assert (loud > 0.3).mean() > 0.9 and abs(np.median(loud - quiet) - 20 / 80) < 0.002, '20 dB are a quarter of the range'
    assert silent.max() == 0 and np.array_equal(sound_inputs(None, times, HEARING, 25), silent)
    both = np.concatenate([noise(1), 0.1 * noise(1)])
    first, second = sound_inputs(both, middles([12, 37], 25), HEARING, 25)
    assert first.mean() - second.mean() > 0.2, 'also within a clip'


def test_sound_is_numbers_and_has_a_context():
    "AV 27, 29, 30: a picture of a plot with axes and a colour bar, of 40 ms, with bands that its sample rate cannot have."
    found = sound_inputs(noise(2), middles(list(range(50)), 25), HEARING, 25)
    assert found.shape == (50, 1, 32, 80) == (50, *sound_shape(HEARING)) and found.dtype == np.float32, '0.32 s, rows of 10 ms'
    assert (found[10:40].std((0, 1, 2)) > 0.01).all(), 'no empty band'
    thesis = sound_inputs(noise(2), middles([20], 25), THESIS, 25)
    assert thesis.shape == (1, 3, 32, 32) and thesis.min() >= 0 and thesis.max() <= 1
    assert np.array_equal(thesis[:, 0], thesis[:, 1]), 'one number per place, no colours'


@RATES
@pytest.mark.parametrize('model', [HEARING, THESIS], ids=['logmel', 'thesis_mel'])
def test_sound_does_not_drift(model, fps):
    "AV 31: 29.97 frames per second became 29, and the sound a third of a second late after ten."
    frames = [3, 299, 580]
    samples = clicks(25, middles(frames, fps))
    for frame in frames:
        near = [frame - 1, frame, frame + 1]
        found = sound_inputs(samples, middles(near, fps), model, fps)
        if model.sound == 'logmel':
            energy = found[1, 0].sum(1)
            assert abs((energy * np.arange(32)).sum() / energy.sum() - 15) <= 1, 'in the middle of the window'
        else: assert [picture.std() > 0.05 for picture in found] == [False, True, False], 'in its own frame and in no other'


def test_frames_left_out_do_not_move_the_sound(tmp_path):
    "AV 16, 33: pictures without a face were dropped, and sound and picture were of different moments from there on."
    places = [0, 1, 7, 8, 50, 299]
    folder = store(tmp_path/'shards', {'gaps': 6}, positions={'gaps': places}, fps=NTSC, sound=clicks(11, middles([299], NTSC)))
    sampler = EpisodeSampler(folder, HEARING, 1, 2, (2,), augment=0.0)
    heard = {}
    for step in range(20):
        batch = sampler.batch(step)
        heard |= dict(zip(number_of(batch.target_images), batch.target_sounds))
    assert set(heard) == set(range(6)) and [bool(heard[number].max() > 0) for number in range(6)] == [False] * 5 + [True]
    energy = heard[5][0].sum(1)
    assert abs((energy * torch.arange(32)).sum() / energy.sum() - 15) <= 1


def test_sound_is_of_the_picture_that_is_asked_for(tmp_path):
    "AV 14, 16: one spectrogram, found by a file's name, went with another frame's index."
    tones = [np.sin(2 * np.pi * (400 + 300 * number) * np.arange(640) / 16000) for number in range(12)]      # a higher one in every frame
    folder = store(tmp_path/'shards', {'tones': 12}, sound=np.concatenate(tones).astype(np.float32))
    sampler = EpisodeSampler(folder, HEARING.replace(sound_window=0.04), 1, 3, (2,), augment=1.0)
    sampler_plain = EpisodeSampler(folder, HEARING.replace(sound_window=0.04), 1, 3, (2,), augment=0.0)
    pitch = {}
    for step in range(30):
        batch = sampler_plain.batch(step)
        for number, sound in zip(number_of(batch.target_images), batch.target_sounds):
            pitch.setdefault(number, set()).add(int(sound[0].sum(0).argmax()))
        assert sampler.batch(step).target_sounds.shape == (3, 1, 4, 80)
    assert set(pitch) == set(range(12)) and all(len(found) == 1 for found in pitch.values())
    bands = [min(pitch[number]) for number in range(12)]
    assert all(low < high for low, high in zip(bands, bands[1:]))


def test_clips_without_sound_are_not_heard_as_silence(tmp_path):
    "AV 17, 18: a missing sound was retried for ever, or replaced without a word."
    folder = store(tmp_path/'shards', {'heard': 5, 'mute': 5}, mute={'mute'})
    assert EpisodeSampler(folder, HEARING, 1, 1, (1,)).keys == ['heard'] and EpisodeSampler(folder, MODEL, 1, 1, (1,)).keys == ['heard', 'mute']
    with pytest.raises(DataError, match='sound'): EpisodeSampler(folder, HEARING, 1, 1, (1,), keys=['mute'])
