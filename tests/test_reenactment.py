"Reenactment where it is easy to get wrong: frames without a face, odd rates, the moment at which a face hears something, threads and their end."

from __future__ import annotations

import os, threading, time
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from talking_face.config import ReenactConfig, preset
from talking_face.core import MediaError, NoFaceError
from talking_face.data.photos import Photos
from talking_face.few_shot.meta_learning import build_model
from talking_face.few_shot.person import Person, feed_forward
from talking_face.few_shot.reenactment import animate_driver, frame_middles, in_background, read_driver, reenact, sounds_around
from talking_face.signals.landmarks import DlibDetector, track_face
from talking_face.signals.media import probe_video
from talking_face.signals.recording import VideoWriter
from talking_face.signals.sound import read_audio
from talking_face.signals.sound_inputs import sound_inputs

from helpers import clip, frames_of, lag_and_likeness, make_film, speech, watch

CONFIG, QUIET = ReenactConfig(detector='dlib', device='cpu'), lambda *_: None
NTSC = Fraction(30000, 1001)


def person_of(system: str) -> Person:
    "An untrained face; its ear, where it has one, is made keen."
    torch.manual_seed(0)
    points = np.load(clip('syn11').with_suffix('.npz'))['landmarks'][:2] / 2
    person = feed_forward(build_model(preset('tiny', system), []), Photos(frames_of(clip('syn11'), 2, size=128), points.astype(np.float32)))
    if person.sound is not None: person.sound.projection.weight.data.mul_(20)
    return person


@pytest.fixture(scope='module')
def driver(tmp_path_factory):
    "40 frames at 30000/1001 per second with sound; in 12 of them nobody is there."
    images = list(frames_of(clip('syn01'), 40))
    images[14:26] = [np.full_like(images[0], 90)] * 12
    folder = tmp_path_factory.mktemp('driver')
    silent = make_film(folder/'sound.mp4', images[:2], sound=speech(40 / NTSC + .1))
    with VideoWriter(folder/'driver.mp4', NTSC, silent) as writer:
        for image in images: writer.write(image)
    return folder/'driver.mp4'


class Listener(Person):
    "Remembers what it was given."
    def animate(self, landmarks, sounds=None, mouth=True):
        self.__dict__.setdefault('heard', []).append(sounds); self.__dict__.setdefault('shown', []).append(landmarks)
        return super().animate(landmarks, sounds, mouth)


def listening(person: Person) -> Listener:
    import dataclasses
    return Listener(**{item.name: getattr(person, item.name) for item in dataclasses.fields(person)})


def test_frames_without_a_face_keep_their_place_and_their_sound(driver, tmp_path):
    "A published tool dropped them and truncated 29.97 to 29: picture and sound drifted apart."
    person = listening(person_of('va_slim'))
    made = reenact(person, driver, tmp_path/'out.mp4', CONFIG, QUIET)
    film, source = watch(tmp_path/'out.mp4'), watch(driver)
    assert made.frames == len(film.times_s) == len(source.times_s) == 40 and made.filled == 12 and film.rate == NTSC
    assert np.allclose(np.float64(film.times_s), np.arange(40) / float(NTSC), atol=1e-4)
    lag, likeness = lag_and_likeness(source.sound, film.sound)
    assert lag == 0 and likeness > .99
    heard, shown = np.concatenate(person.heard), np.concatenate(person.shown)
    wanted = sound_inputs(read_audio(driver), [(t + Fraction(1, 2)) / NTSC for t in range(40)], person.config.model, NTSC)
    assert len(heard) == len(shown) == 40 and np.isfinite(shown).all() and np.allclose(heard, wanted, atol=1e-5)
    late = sound_inputs(read_audio(driver), [(t + Fraction(1, 2)) / 29 for t in range(40)], person.config.model, NTSC)
    assert np.abs(heard - late).mean() > 10 * np.abs(heard - wanted).mean() + 1e-3         # the fault would be seen


def test_a_film_without_sound_is_heard_as_silence(tmp_path):
    person = listening(person_of('va_slim'))
    film = make_film(tmp_path/'silent.mp4', frames_of(clip('syn01'), 6))
    reenact(person, film, tmp_path/'out.mp4', CONFIG, QUIET)
    assert not np.concatenate(person.heard).any()
    deaf = listening(person_of('few_shot'))
    reenact(deaf, film, tmp_path/'out.mp4', CONFIG, QUIET)
    assert deaf.heard == [None]


def test_sound_shorter_and_longer_than_the_film():
    model, samples = preset('tiny', 'va_slim').model, speech(1.5)
    middles = frame_middles([Fraction(t, 25) for t in range(100)], Fraction(25))
    pieces = np.concatenate([sounds_around(samples, middles[start:start + 8], model, Fraction(25)) for start in range(0, 100, 8)])
    assert np.allclose(pieces, sound_inputs(samples, middles, model, 25), atol=1e-5) and not pieces[60:].any() and pieces[:30].any()


def test_uneven_times_are_heard_in_the_middle():
    times = [Fraction(0), Fraction(1, 10), Fraction(1, 2), Fraction(3, 5)]
    assert frame_middles(times, Fraction(20, 3)) == [Fraction(1, 20), Fraction(3, 10), Fraction(11, 20), Fraction(27, 40)]


def test_the_same_film_every_time(driver, tmp_path):
    "To the byte with as many threads; arithmetic in another order (threads, batches) moves a level here and there."
    person, threads = person_of('va_slim'), torch.get_num_threads()
    try: films = [reenact(person, driver, tmp_path/f'{number}.mp4', CONFIG.replace(threads=2), QUIET).path.read_bytes() for number in range(2)]
    finally: torch.set_num_threads(threads)
    assert films[0] == films[1]
    found, samples = read_driver(driver, 64, person.margin, CONFIG, QUIET), read_audio(driver)
    whole, pieces = (np.stack(list(animate_driver(person, found, CONFIG.replace(batch=batch), samples))) for batch in (40, 7))
    assert np.abs(whole.astype(int) - pieces).max() <= 2


def test_points_in_threads_are_those_without():
    images = frames_of(clip('syn12'), 30)
    with DlibDetector() as detector:
        tracks = [track_face(iter(images), detector, threads=threads) for threads in (1, 2, 5)]
        assert all(np.array_equal(track.landmarks, tracks[0].landmarks) and np.array_equal(track.scores, tracks[0].scores) for track in tracks)
        def breaking():
            yield from images[:10]
            raise MediaError('the film ends here')
        with pytest.raises(MediaError, match='ends here'): track_face(breaking(), detector, threads=2)


def alive() -> int: return sum(thread.name == 'in_background' or 'ThreadPoolExecutor' in thread.name for thread in threading.enumerate())


@pytest.mark.parametrize('fault', ['in the generator', 'at the writer', 'Ctrl-C', 'while the face is sought'])
def test_nothing_is_left_after_a_fault(fault, driver, tmp_path, monkeypatch):
    "No file, no half file, no thread; and the error is the one that happened."
    person, expected, before = person_of('few_shot'), OSError, alive()
    calls = SimpleNamespace(count=0)
    def failing(*arguments, **more):
        calls.count += 1
        if calls.count > 2: raise OSError('broken')
        return genuine(*arguments, **more)
    def callback(done, total, text):
        if fault == 'Ctrl-C' and text.startswith('generating') and done >= 9 or fault == 'while the face is sought' and done >= 9: raise KeyboardInterrupt
    if fault == 'in the generator': genuine = Person.animate; monkeypatch.setattr(Person, 'animate', failing)
    elif fault == 'at the writer': genuine = VideoWriter.write; monkeypatch.setattr(VideoWriter, 'write', failing)
    else: expected = KeyboardInterrupt
    monkeypatch.setattr('talking_face.runs.Progress.__init__.__defaults__', (None, 0.0), raising=False)
    with pytest.raises(expected): reenact(person, driver, tmp_path/'out.mp4', CONFIG.replace(batch=4), callback)
    assert os.listdir(tmp_path) == [] and alive() == before


def test_no_face_at_all(tmp_path):
    film = make_film(tmp_path/'nobody.mp4', [np.full((64, 64, 3), 90, np.uint8)] * 3)
    with pytest.raises(NoFaceError, match='nobody.mp4: no face'): reenact(person_of('few_shot'), film, tmp_path/'out.mp4', CONFIG, QUIET)


def test_background_is_never_far_ahead():
    made, before = [], alive()
    def items():
        for number in range(100): made.append(number); yield number
    reader = in_background(items(), depth=4)
    assert next(reader) == 0
    time.sleep(.3)
    assert len(made) <= 1 + 4 + 1                       # taken, waiting, in hand
    reader.close()
    assert alive() <= before and probe_video(clip('syn01')).frame_count == 75
