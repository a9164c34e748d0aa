"""Sound against mouth: made signals with a known lag at every frame rate, real clips cut by known amounts, sounds of other clips."""
from fractions import Fraction

import numpy as np
import pytest

from helpers import real
from talking_face.core import generator_for
from talking_face.signals.landmarks import INNER_LIP_PAIRS
from talking_face.signals.synchrony import estimate_lag, lag_of_curves

RATES = [Fraction(24), Fraction(25), Fraction(24000, 1001), Fraction(30000, 1001), Fraction(30), Fraction(50), Fraction(60)]
LONG = ['id07/lp_d20', 'id21/pc_00015']                                # 7 s; the sound of id07 is late by about 7 frames
SENTENCES = ['id28/grid_brbk7n', 'id30/grid_lbbc2a', 'id31/grid_lwbsza']   # 3 s


def envelope(counter: int, seconds: float = 8.0):
    "Loudness of syllables over time, as a function of seconds."
    heights = generator_for(11, counter).uniform(0, 1, int(seconds * 6) + 4) ** 2
    return lambda moments: np.interp(moments, np.arange(len(heights)) / 6, heights)


def talking_points(opening: np.ndarray, jitter: float = 0.0) -> np.ndarray:
    "Landmarks (T, 68, 2) of a face that drifts and whose inner lips are `opening` (T,) eye distances apart, with noise in pixels."
    random = generator_for(12)
    points = np.tile(random.uniform(60, 200, (68, 2)), (len(opening), 1, 1))
    points[:, [36, 45]] = [[80, 100], [170, 100]]
    for upper, lower in INNER_LIP_PAIRS:
        points[:, upper], points[:, lower] = [128, 170], [128, 170]
        points[:, lower, 1] += 90 * opening
    return points + np.linspace(0, 20, len(opening))[:, None, None] + random.normal(0, jitter, points.shape)


def voice(loudness, seconds: float = 8.0, late_s: float = 0.0) -> np.ndarray:
    moments = np.arange(int(seconds * 16000)) / 16000
    return (0.2 * loudness(moments - late_s) * generator_for(13).standard_normal(len(moments))).astype(np.float32)


@pytest.mark.parametrize('fps', RATES, ids=str)
@pytest.mark.parametrize('late_s', [-0.2, 0.0, 0.12, 0.4])
def test_the_lag_is_the_same_at_every_frame_rate(fps, late_s):
    loudness = envelope(int(100 * late_s) + 50)
    moments = (np.arange(int(8 * fps)) + 0.5) / float(fps)
    lag = estimate_lag(talking_points(0.3 * loudness(moments), 0.2), voice(loudness, late_s=late_s), fps)
    assert lag.reliable and abs(lag.seconds - late_s) < 0.02 and abs(lag.frames - late_s * fps) < 0.02 * fps


def test_less_mouth_is_less_synchrony():
    loudness = envelope(1)
    opening = 0.3 * loudness((np.arange(200) + 0.5) / 25)
    peaks = [estimate_lag(talking_points(0.05 + part * opening, 1.0), voice(loudness), 25).peak for part in (1, 0.75, 0.5, 0.25, 0)]
    assert all(before > after for before, after in zip(peaks, peaks[1:])) and peaks[0] > 0.6


def test_frames_without_a_face_are_bridged_and_too_many_are_not_believed():
    loudness = envelope(2)
    points, sound = talking_points(0.3 * loudness((np.arange(200) + 0.5) / 25)), voice(loudness, late_s=0.12)
    whole = estimate_lag(points, sound, 25)
    holes = points.copy(); holes[40:43] = holes[90:95] = holes[:4] = np.nan
    kept = np.isfinite(holes).all((1, 2))
    for lag in (estimate_lag(holes, sound, 25), estimate_lag(points[kept], sound, 25, np.flatnonzero(kept))): assert abs(lag.frames - whole.frames) < 0.5
    assert np.allclose(estimate_lag(holes, sound, 25).curve, estimate_lag(points[kept], sound, 25, np.flatnonzero(kept)).curve)
    rare = np.arange(0, 200, 3)
    assert not estimate_lag(points[rare], sound, 25, rare).reliable
    assert not estimate_lag(points[:20], sound, 25).reliable and not estimate_lag(points[:0], sound, 25).reliable and not estimate_lag(points, sound[:0], 25).reliable


def test_what_never_moves_or_never_sounds_has_no_lag():
    loudness = envelope(3)
    points, sound = talking_points(0.3 * loudness((np.arange(200) + 0.5) / 25)), voice(loudness)
    still, silent, tone = estimate_lag(points[:1].repeat(200, 0), sound, 25), estimate_lag(points, np.zeros_like(sound), 25), np.sin(np.arange(len(sound)) * 0.3).astype(np.float32)
    for lag in (still, silent, estimate_lag(points, tone, 25)): assert not lag.reliable and not np.isnan(lag.z)


def test_chance_is_rarely_believed():
    believed = [lag_of_curves(*(envelope(2 * trial + side, 12)((np.arange(count) + 0.5) / 25) for side in (0, 1)), 25).reliable for trial in range(150) for count in (75, 250)]
    assert np.mean(believed) < 0.06


# ---- real clips ----

@pytest.fixture(scope='module')
def talkers() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    "Landmarks by dlib and sound of some real clips."
    from talking_face.signals.detectors import make_detector
    from talking_face.signals.landmarks import track_face
    from talking_face.signals.media import iterate_video
    from talking_face.signals.sound import read_audio
    paths = {name: real(f'clips/{name}.mp4') for name in LONG + SENTENCES}
    with make_detector('dlib', '') as detector:
        return {name: (track_face((frame.image for frame in iterate_video(path)), detector).landmarks, read_audio(path)) for name, path in paths.items()}


def test_real_lags(talkers):
    lags = {name: estimate_lag(*clip, 25) for name, clip in talkers.items()}
    assert all(lag.reliable for lag in lags.values())
    assert abs(lags['id07/lp_d20'].frames - 7) < 1
    others = [lag.frames for name, lag in lags.items() if name != 'id07/lp_d20']
    assert abs(np.median(others)) < 1 and max(map(abs, others)) < 3.5                # what the notes of these clips say: -1 to 2


def test_cutting_the_sound_moves_the_lag(talkers):
    moved = []
    for name in LONG:
        points, sound = talkers[name]
        inner = points[8:-8]
        base = estimate_lag(inner, sound[8 * 640:], 25).curve.argmax()
        moved += [(d, estimate_lag(inner, sound[(8 - d) * 640:], 25).curve.argmax() - base) for d in (-8, -5, -3, -1, 0, 1, 3, 5, 8)]
    assert np.mean([abs(d - found) <= 1 for d, found in moved]) >= 0.95


def test_sound_of_another_clip_is_not_believed(talkers):
    from talking_face.signals.media import probe_video
    from talking_face.signals.sound import read_audio
    sounds = {path: read_audio(path) for path in sorted(real('clips').glob('*/*.mp4')) if probe_video(path).has_audio}
    true = [estimate_lag(*clip, 25).z for clip in talkers.values()]
    others = [estimate_lag(points, sound, 25) for name, (points, _) in talkers.items() for path, sound in sounds.items()
              if name.split('/')[0] != path.parent.name and len(sound) >= 0.95 * 640 * len(points)]
    area = np.mean(np.subtract.outer(true, [lag.z for lag in others]) > 0)
    assert len(others) > 70 and area > 0.95 and np.mean([lag.reliable for lag in others]) < 0.08     # area over all clips, the unreadable ones too: 0.87
