"""Audio features: bad input, sound of other rates, windows of real clips."""
from fractions import Fraction
from pathlib import Path

import numpy as np, pytest

from talking_face.signals.audio import first_rows, frame_windows, log_mel_spectrogram, mfcc, window_at
from talking_face.signals.media import probe_video
from talking_face.signals.sound import read_audio

SHARED = Path('../shared/data')


@pytest.mark.parametrize('samples', [np.zeros(0), np.zeros((2, 100)), np.zeros(100, np.int16), np.array([0.0, np.nan]), np.array([np.inf])])
def test_bad_samples(samples):
    for feature in (log_mel_spectrogram, mfcc):
        with pytest.raises(ValueError, match='samples must be finite'): feature(samples)


def test_bad_windows():
    features = np.zeros((50, 80), np.float32)
    for arguments in ((0, 5), (-25, 5), (25, -1)):
        with pytest.raises(ValueError): frame_windows(features, *arguments)
    with pytest.raises(ValueError, match='rows, bins'): frame_windows(features[0], 25, 5)
    with pytest.raises(ValueError, match='row_count'): frame_windows(features, 25, 5, window_s=0.001)
    with pytest.raises(ValueError, match='count'): mfcc(np.zeros(1600), count=81)


@pytest.mark.parametrize('length', [1, 159, 160, 399, 400, 16001])
def test_row_count_and_finite_values(length):
    rows = log_mel_spectrogram(np.full(length, 0.1, np.float32))
    assert rows.shape == (1 + length // 160, 80) and np.isfinite(rows).all() and rows.min() >= 0


@pytest.mark.parametrize('rate', [8000, 16000, 22050, 44100])
@pytest.mark.parametrize('hertz', [300, 700, 2500])
def test_a_tone_lights_its_own_bin_at_every_rate(rate, hertz):
    import librosa
    centres = librosa.mel_frequencies(82, fmin=55, fmax=min(7600, rate / 2))[1:-1]
    rows = log_mel_spectrogram((0.5 * np.sin(2 * np.pi * hertz * np.arange(rate) / rate)).astype(np.float32), rate)
    assert rows.shape == (101, 80) and abs(int(rows[50].argmax()) - int(np.abs(centres - hertz).argmin())) <= 1


def test_features_are_local():
    "A row depends on 12.5 ms to either side, nothing else: features of a clip are those of its parts."
    rng = np.random.default_rng(0)
    sound = (0.1 * rng.standard_normal(16000)).astype(np.float32)
    changed = sound.copy(); changed[8000] += 0.5
    rows = np.flatnonzero(np.abs(log_mel_spectrogram(sound) - log_mel_spectrogram(changed)).max(1) > 1e-6)
    assert rows.min() >= 49 and rows.max() <= 51
    assert np.allclose(log_mel_spectrogram(sound)[20:40], log_mel_spectrogram(sound[1600:])[10:30], atol=1e-5)


def test_windows_against_a_slow_search():
    "The row whose window middle lies nearest to the frame's middle, found by trying all of them."
    for fps in (Fraction(24), Fraction(30000, 1001), Fraction(1350, 61), Fraction(60), Fraction(7)):
        for row_count in (1, 2, 19, 20):
            first = first_rows(fps, 60, row_count)
            for t in (0, 1, 31, 59):
                moment = (t + Fraction(1, 2)) / fps
                distances = {i: abs((i + Fraction(row_count - 1, 2)) / 100 - moment) for i in range(int(first[t]) - 3, int(first[t]) + 4)}
                assert distances[int(first[t])] == min(distances.values())


def test_no_drift_over_an_hour():
    rows = first_rows(Fraction(30000, 1001), 107_893, 20)
    assert abs((rows[-1] + 9.5) / 100 - (107_892.5 * 1001 / 30000)) <= 0.005 + 1e-9


def test_single_windows_of_odd_times():
    features = np.arange(1, 101, dtype=np.float32)[:, None]
    for moment in (-5.0, -0.01, 0, 0.004, 0.5, 0.99, 1.2, 50, Fraction(1, 3)):
        window = window_at(features, moment)[:, 0]
        first = int(np.floor(float(moment) * 100 - 9 + 1e-9))
        assert window.tolist() == [i + 1 if 0 <= i < 100 else 0 for i in range(first, first + 20)]


@pytest.mark.skipif(not SHARED.is_dir(), reason='the shared development clips are not here')
def test_real_speech_has_a_window_for_every_frame():
    for name in ('raw/vr_face1.mp4', 'grid/bbaf2n.mpg'):
        info, rows = probe_video(SHARED/name), log_mel_spectrogram(read_audio(SHARED/name))
        windows = frame_windows(rows, info.fps, info.frame_count)
        assert windows.shape == (info.frame_count, 20, 80) and 0.2 < windows.max() < 1.1
        assert abs(len(rows) / 100 - info.duration_s) < 0.1
