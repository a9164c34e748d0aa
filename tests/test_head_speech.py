"Speech with known phonemes, rooms, visemes and the motion of heads: what does not fit their chapters."
import io
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import scipy.signal

from talking_face.core import DataError, WeightsUnavailable, generator_for
from talking_face.data import spoken_text
from talking_face.data.head_motion import FEELINGS, GAZE_LIMITS, POSE_LIMITS, UNITS, Performance, draw_blinks, draw_character, head_poses, perform
from talking_face.data.head_shape import EXPRESSION_UNITS, TONGUE_KEYS
from talking_face.data.spoken_text import (ACCENTS, FEMALE_VARIANTS, MALE_VARIANTS, SILENCE, TEMPLATES, WORDS, Phoneme, Recording, Voice, coloured_noise, draw_recording,
                                           draw_sentences, draw_voice, find_espeak, impulse_response, room, speak, speech_level)
from talking_face.data.visemes import MOUTH_UNITS, OPENING_UNITS, TRACK_HZ, VISEMES, VISEMES_OF, closure_gate, mouth_track, plan_gestures

PLAIN = Voice('en-us+m3', 165, 50, 50, 0, 1.0, 0.3, 0.0, 1)

def has_espeak() -> bool:
    try: return bool(find_espeak())
    except WeightsUnavailable: return False

needs_voice = pytest.mark.skipif(not has_espeak(), reason='espeakng-loader is not installed')


# The speaking machine

def test_without_the_library_there_is_a_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, 'espeakng_loader', None)
    with pytest.raises(WeightsUnavailable, match=r'pip install "talking_face\[synthetic\]"'): speak('Hello.', PLAIN, 1)

@needs_voice
def test_a_crash_of_the_library_is_an_error_and_not_the_end(monkeypatch):
    monkeypatch.setattr(spoken_text, 'find_espeak', lambda: ('no/such/library.so', 'no/such/data'))
    with pytest.raises(DataError, match='espeak-ng failed'): speak('Hello.', PLAIN, 1)
    monkeypatch.undo()
    with pytest.raises(DataError, match='no voice'): speak('Hello.', PLAIN._replace(name='nowhere'), 1)
    assert speak('Hello.', PLAIN, 1).samples.any()

@needs_voice
def test_the_same_bytes_whatever_is_said_before_or_meanwhile():
    jobs = [(draw_sentences(generator_for(1, k), 3), draw_voice(generator_for(2, k), k % 2, 0.5), 3.0) for k in range(6)]
    alone = [speak(*job) for job in jobs]
    time.sleep(1.1)                                                                       # the library would seed its noise by the clock
    with ThreadPoolExecutor(4) as pool: together = list(pool.map(lambda job: speak(*job), jobs[::-1]))[::-1]
    for a, b in zip(alone, together):
        assert np.array_equal(a.samples, b.samples) and np.array_equal(a.loudness, b.loudness) and a[1:6] == b[1:6]
    assert len({one.samples.tobytes() for one in alone}) == 6

@needs_voice
@pytest.mark.parametrize('text', ['', '...', ' , , ', 'naïve café', 'Yes', 'A. B? C!', 'Zürich 25, http://x.y!', 'so ' * 400])
@pytest.mark.parametrize('seconds', [0.02, 1.04])
def test_any_text_in_any_length(text, seconds):
    speech = speak(text, PLAIN, seconds)
    assert speech.samples.shape == (round(16000 * seconds),) and np.isfinite(speech.samples).all() and np.abs(speech.samples).max() <= 1
    assert speech.loudness.shape == (round(100 * seconds),) and np.isfinite(speech.loudness).all() and speech.loudness.min() >= 0
    assert speech.phonemes[0].start_s == 0 and speech.phonemes[-1].end_s == seconds and all(a.end_s == b.start_s and a.end_s > a.start_s for a, b in zip(speech.phonemes, speech.phonemes[1:]))
    assert all(0 <= word.start_s < word.end_s <= seconds for word in speech.words + speech.sentences)

def test_lengths_that_are_none():
    for seconds in (0, -1.0, float('nan')):
        with pytest.raises(ValueError): speak('Hello.', PLAIN, seconds)
        with pytest.raises(ValueError): draw_sentences(generator_for(0), seconds)

def pitch_hz(samples: np.ndarray) -> float:
    "Median pitch of the loud parts, by autocorrelation."
    values = []
    for start in range(0, len(samples) - 1024, 512):
        part = samples[start:start + 1024].astype(float)
        if part.std() < 0.5 * samples.std(): continue
        correlation = scipy.signal.correlate(part, part, method='fft')[1023:]
        lag = 32 + int(np.argmax(correlation[32:266]))                                    # 60 .. 500 Hz
        if correlation[lag] > 0.5 * correlation[0]: values.append(16000 / lag)
    return float(np.median(values))

@needs_voice
def test_every_variant_and_accent_speaks_and_women_speak_higher():
    text = 'We are going away in the morning, my mother said.'
    pitches, bytes_ = {}, set()
    for variant in FEMALE_VARIANTS + MALE_VARIANTS + ['grandma', 'grandpa']:
        speech = speak(text, PLAIN._replace(name=f'en-us+{variant}'), 4)
        assert 1.8 < speech.phonemes[-1].start_s < 3.9, variant
        pitches[variant] = pitch_hz(speech.samples); bytes_.add(speech.samples.tobytes())
    assert len(bytes_) == len(pitches)                                                    # no variant was ignored
    assert min(pitches[v] for v in FEMALE_VARIANTS) > 140 and max(pitches[v] for v in MALE_VARIANTS) < 140, pitches
    spoken = [speak('Father asked whether the bath water was warmer.', PLAIN._replace(name=f'{accent}+m3'), 4) for accent in ACCENTS]
    assert len({tuple(name for _, _, name in one.phonemes) for one in spoken}) >= 5

@needs_voice
def test_phoneme_times_are_true_in_the_sound():
    "In every voice: silences are silent, voiced sounds are loud, plosives p t k begin with a gap."
    quiet, loud, gaps = [], [], []
    for k in range(16):
        voice = draw_voice(generator_for(5, k), k % 2, 0.4)
        speech = speak('Stop it. A happy puppy, a taller actor, a quick copy, and papa took a cake.', voice, 7)
        power = np.convolve(speech.samples.astype(float) ** 2, np.ones(80) / 80, 'same')
        vowels = [np.median(power[round(16000 * a):round(16000 * b)]) for a, b, name in speech.phonemes if name.lstrip("',")[:1] in tuple('aAVEi0O')]
        for (a, b, name), previous in zip(speech.phonemes[1:], speech.phonemes):
            level = np.median(power[round(16000 * (a + 0.15 * (b - a))):round(16000 * (b - 0.15 * (b - a)))]) / np.median(vowels)
            if name == SILENCE and b - a > 0.12: quiet.append(level)
            if name.lstrip("',")[:1] in tuple('aAVEi0O'): loud.append(level)
            if name in ('p', 't', 'k') and previous.name.lstrip("',")[:1] in tuple('aVEiI0') and b - a > 0.05: gaps.append(power[round(16000 * (a + 0.005)):round(16000 * (a + 0.03))].mean() / np.median(vowels))
    assert len(quiet) > 25 and np.quantile(quiet, 0.9) < 0.01 and np.quantile(loud, 0.1) > 0.1
    assert len(gaps) > 40 and np.quantile(gaps, 0.85) < 0.1, np.quantile(gaps, (0.5, 0.85, 1))

@needs_voice
def test_the_loudness_belongs_to_the_samples():
    for k in range(4):
        speech = speak(draw_sentences(generator_for(6, k), 5), draw_voice(generator_for(7, k), k % 2, 0.2), 5)
        rms = np.sqrt((speech.samples.reshape(500, 160).astype(float) ** 2).mean(1))
        assert np.corrcoef(rms, speech.loudness)[0, 1] > 0.995 and 0.5 < np.quantile(speech.loudness, 0.95) < 2

@needs_voice
def test_words_come_in_the_order_of_the_text():
    for k in range(8):
        text = draw_sentences(generator_for(8, k), 6)
        speech = speak(text, draw_voice(generator_for(9, k), k % 2, 0.5), 40)
        asked = text
        for mark in ',:;.?!': asked = asked.replace(mark, '')
        assert ' '.join(word.text for word in speech.words).replace(',', '').replace(':', '').replace(';', '').split() == asked.split()
        assert ' '.join(sentence.text for sentence in speech.sentences) == text
        assert all(a.end_s <= b.start_s for a, b in zip(speech.words, speech.words[1:]))


# Rooms

def test_rooms_do_not_delay_and_are_what_was_asked_for():
    generator = np.random.default_rng(0)
    voice = scipy.signal.sosfilt(scipy.signal.butter(2, (200, 3000), 'bandpass', fs=16000, output='sos'), generator.standard_normal(32000))
    dry = 0.3 * voice / np.abs(voice).max() * np.repeat(np.arange(40) % 2, 800)           # bursts of 50 ms and pauses
    delays, louder = [], []
    for k in range(40):
        recording = draw_recording(generator_for(10, k))
        wet = room(dry, generator_for(11, k), recording)
        assert wet.shape == dry.shape and wet.dtype == np.float32 and np.abs(wet).max() < 1 and np.isfinite(wet).all()
        delays.append(int(np.argmax(scipy.signal.correlate(wet.astype(float), dry, method='fft'))) - len(dry) + 1)
        pauses = np.repeat(np.arange(40) % 2 == 0, 800)
        louder.append(20 * np.log10(wet[~pauses].std() / wet[pauses].std()))
    assert np.abs(delays).max() <= 5, delays                                              # a third of a millisecond
    assert min(louder) > 0 and np.ptp(louder) > 10

def test_room_is_a_function_of_its_seed_and_takes_anything():
    for samples in (np.zeros(1), np.zeros(16000), np.ones(100, np.float32), np.sin(np.arange(5000))):
        a, b, c = (room(samples, generator_for(seed)) for seed in (1, 1, 2))
        assert np.array_equal(a, b) and not np.array_equal(a, c) and np.isfinite(a).all() and np.abs(a).max() <= 1
    for wrong in (np.zeros(0), np.zeros((2, 100)), np.full(100, np.nan), np.zeros(100, np.int16)):
        with pytest.raises(ValueError): room(wrong, generator_for(0))
    assert speech_level(np.concatenate([np.zeros(16000), np.ones(16000)])) == pytest.approx(1)     # pauses do not count
    assert np.isfinite(coloured_noise(1, -6, generator_for(0))).all()

def test_reverberation_time_in_octaves():
    "T60 is the same in low and high octaves: Schroeder decay of the filtered response."
    recording = Recording(0.4, -3, 80, 7800, 0, 40, -3, -20)
    for low, high in ((250, 500), (1000, 2000), (3000, 6000)):
        band = scipy.signal.butter(3, (low, high), 'bandpass', fs=16000, output='sos')
        times = []
        for k in range(12):
            response = scipy.signal.sosfilt(band, impulse_response(recording, generator_for(12, k))[48:])
            decay = 10 * np.log10(np.cumsum(response[::-1] ** 2)[::-1] / np.sum(response ** 2))
            inside = np.flatnonzero((decay < -5) & (decay > -30))
            times.append(-60 / np.polyfit(inside / 16000, decay[inside], 1)[0])
        assert abs(np.mean(times) - 0.4) < 0.04, (low, times)


# Visemes

def test_tables_are_whole():
    assert {viseme for visemes in VISEMES_OF.values() for viseme in visemes} == set(VISEMES)
    assert {'p', 'b', 'm'} == {name for name, visemes in VISEMES_OF.items() if 'PBM' in visemes} - {'m-'}
    assert set(UNITS) <= set(EXPRESSION_UNITS) | set(TONGUE_KEYS) and set(MOUTH_UNITS) <= set(UNITS)
    assert all(0 < weight <= 1 for shape in FEELINGS.values() for weight in shape.values())

@needs_voice
def test_every_sentence_of_every_voice_has_visemes():
    "All templates with drawn words, in every accent: no phoneme without a viseme."
    text = ' '.join(draw_sentences(generator_for(13, k), 12) for k in range(8))
    for k, accent in enumerate(ACCENTS):
        speech = speak(text, draw_voice(generator_for(14, k), k % 2, 0.5)._replace(name=f'{accent}+{("m1", "f2")[k % 2]}'), 110)
        gestures = plan_gestures(speech.phonemes)
        assert len(gestures) >= len(speech.phonemes) > 600 and all(a.end_s == pytest.approx(b.start_s) for a, b in zip(gestures, gestures[1:]))

@needs_voice
def test_lips_touch_in_p_b_m_and_open_in_vowels():
    closed, opened = [], []
    for k in range(20):
        speech = speak('Maybe my puppy and a big baby monkey jumped up. Papa hopped, Bob bumped a map.', draw_voice(generator_for(15, k), k % 2, k / 20), 6)
        track = mouth_track(speech, draw_character(generator_for(16, k)).articulation)
        for start, end, viseme, stress in plan_gestures(speech.phonemes):
            part = track[round(start * TRACK_HZ):round(end * TRACK_HZ) + 1]
            if viseme == 'PBM' and 0.05 < start and end < 5.95: closed.append(part[:, OPENING_UNITS].max(1).min())
            if viseme in ('AA', 'AE', 'AH') and stress == 1 and end < 5.95: opened.append(part[:, 0].max())
    assert len(closed) > 250 and max(closed) < 0.005 and np.quantile(opened, 0.1) > 0.12 and np.median(opened) > 0.3

@needs_voice
def test_the_mouth_follows_the_sound_and_not_another():
    "Best lag between jaw and loudness of the recorded sound is 0 or 1 frame; the sound of another clip does not fit."
    tracks, sounds = [], []
    for k in range(16):
        speech = speak(draw_sentences(generator_for(17, k), 4), draw_voice(generator_for(18, k), k % 2, 0.4), 4)
        tracks.append(perform(speech, generator_for(19, k), 100, Fraction(25), draw_character(generator_for(20, k))).mouth)
        sounds.append(np.sqrt((room(speech.samples, generator_for(21, k)).reshape(100, 640).astype(float) ** 2).mean(1)))
    lags = range(-4, 5)
    curves = np.array([[np.corrcoef(track[max(0, -lag):100 - max(0, lag)], sound[max(0, lag):100 - max(0, -lag)])[0, 1] for lag in lags] for track, sound in zip(tracks, sounds)])
    assert curves[:, 4].mean() > 0.6 and lags[int(curves.mean(0).argmax())] in (0, 1)
    table = np.array([[np.corrcoef(track, sound)[0, 1] for sound in sounds] for track in tracks])
    assert (table.argmax(1) == np.arange(16)).mean() > 0.85 and abs(np.mean(table[~np.eye(16, dtype=bool)])) < 0.15


# Heads

@needs_voice
@pytest.mark.parametrize('fps', [Fraction(25), Fraction(24), Fraction(30000, 1001), Fraction(50)])
def test_frame_rates_show_the_same_performance(fps):
    "Every label is the one of the frame's middle, and every rate samples the same movement."
    speech = speak(draw_sentences(generator_for(22), 4), PLAIN, 4)
    shown = perform(speech, generator_for(23), int(4 * fps), fps, draw_character(generator_for(24)))
    dense = perform(speech, generator_for(23), 800, Fraction(200), draw_character(generator_for(24)))
    times = np.array([float((frame + Fraction(1, 2)) / fps) for frame in range(len(shown.visemes))])
    for time, name in zip(times, shown.phonemes): assert [phoneme for phoneme in speech.phonemes if phoneme.start_s <= time < phoneme.end_s][0].name == name
    assert np.abs(np.interp(times, (np.arange(800) + 0.5) / 200, dense.mouth) - shown.mouth).max() < 0.05
    assert np.abs(np.interp(times, (np.arange(800) + 0.5) / 200, dense.poses[:, 0]) - shown.poses[:, 0]).max() < np.radians(0.5)

@needs_voice
def test_delaying_the_sound_delays_the_face():
    speech = speak('A moment, papa. Why?', PLAIN, 3)
    late = speech._replace(samples=np.pad(speech.samples, (3200, 0)), loudness=np.pad(speech.loudness, (20, 0)), words=[], sentences=[],
                           phonemes=[Phoneme(0 if a == 0 else a + 0.2, b + 0.2, name) for a, b, name in speech.phonemes])
    calm = draw_character(generator_for(25))._replace(feelings_per_s=1e-6, expressiveness=0.0)
    one, two = (perform(x._replace(sentences=[]), generator_for(26), n, Fraction(25), calm) for x, n in ((speech, 75), (late, 80)))
    assert np.abs(two.mouth[7:78] - one.mouth[2:73]).max() < 0.01 and one.visemes[2:] == two.visemes[7:]
    assert np.abs(two.mouth[2:73] - one.mouth[2:73]).max() > 0.2

@needs_voice
def test_wild_characters_stay_within_limits():
    for k in range(12):
        person = draw_character(generator_for(27, k))
        if k % 3 == 0: person = person._replace(head=5.0, nods=1.0, brows=1.0, expressiveness=1.0, feelings_per_s=3.0, articulation=1.6, yaw=0.5, pitch=-0.4, roll=0.3, lopsided=0.3)
        speech = speak('No, never! Yes? Nothing. ' + draw_sentences(generator_for(28, k), 3), draw_voice(generator_for(29, k), k % 2, 0.4), 5)
        shown = perform(speech, generator_for(30, k), 125, Fraction(25), person)
        assert (np.abs(shown.poses) < POSE_LIMITS).all() and (np.abs(shown.gaze) <= GAZE_LIMITS).all() and 0 <= shown.weights.min() and shown.weights.max() <= 1
        assert set(shown.expressions) <= {''} | set(FEELINGS) and all(b - a >= 0.5 for a, b in zip(shown.blinks, shown.blinks[1:]))
        gate = np.interp((np.arange(125) + 0.5) / 25, (np.arange(1000) + 0.5) / TRACK_HZ, closure_gate(plan_gestures(speech.phonemes), 5, 'PBM'))
        sealed = [UNITS.index(unit) for unit in ('mouth-open', 'mouth-part-later', 'mouth-elevation', 'mouth-upward-retraction')]
        assert shown.weights[gate > 0.999][:, sealed].max(initial=0) < 0.005               # p, b, m close any face

@needs_voice
def test_listening_is_alive_and_silent():
    silence = speak('', PLAIN, 20)
    shown = perform(silence, generator_for(31), 500, Fraction(25), draw_character(generator_for(32))._replace(feelings_per_s=1e-6))
    assert shown.mouth.max() < 0.01 and set(shown.visemes) == {'sil'} and len(shown.blinks) >= 3 and np.degrees(np.ptp(shown.poses, axis=0)).min() > 1

@needs_voice
def test_yes_nods_no_shakes_and_questions_raise_the_brows():
    person, times = draw_character(generator_for(33))._replace(nods=0.0, head=1e-6, brows=0.0), (np.arange(100) + 0.5) / 25
    def swing(text: str, column: int) -> float:
        spread = []
        for k in range(8):
            speech = speak(text, PLAIN, 4)
            with_words, without = (head_poses(x, times, person, generator_for(34, k)) for x in (speech, speech._replace(words=[], sentences=[])))
            spread.append(np.ptp(with_words[:, column] - without[:, column]))
        return float(np.degrees(np.mean(spread)))
    assert swing('Yes.', 1) > 3 and swing('No.', 0) > 5 and swing('Maybe.', 0) < 1e-9
    brow = UNITS.index('eyebrows-left-up')
    calm = person._replace(expressiveness=0.0, feelings_per_s=1e-6)
    asked, told = (np.mean([perform(speak(text, PLAIN, 3), generator_for(35, k), 75, Fraction(25), calm).weights[:, brow].max() for k in range(6)]) for text in ('Is it my boat?', 'It is my boat.'))
    assert asked > 0.3 and told == 0

@needs_voice
def test_blinks_keep_to_the_interval_of_the_person():
    speech = speak('', PLAIN, 300)
    for interval in (3.0, 6.0):
        blinks = draw_blinks(speech, 300, draw_character(generator_for(36))._replace(blink_interval_s=interval), generator_for(37))
        assert abs(np.diff(blinks).mean() - interval) < 0.1 * interval and 0.25 * interval < np.diff(blinks).std() + 0.2 * interval

@needs_voice
def test_the_truth_goes_into_plain_arrays():
    speech = speak(draw_sentences(generator_for(38), 3), PLAIN, 3)
    shown = perform(speech, generator_for(39), 75, Fraction(25), draw_character(generator_for(40)))
    file = io.BytesIO()
    np.savez(file, visemes=np.array(shown.visemes), expressions=np.array(shown.expressions), phonemes=np.array([phoneme.name for phoneme in speech.phonemes]),
             times=np.array([phoneme[:2] for phoneme in speech.phonemes], np.float32), weights=shown.weights, voice=np.array(str(speech.voice)))
    file.seek(0)
    stored = np.load(file, allow_pickle=False)
    assert stored['visemes'].tolist() == shown.visemes and stored['times'].shape == (len(speech.phonemes), 2) and stored['weights'].shape == (75, len(UNITS))
    assert isinstance(shown, Performance) and all(unit in UNITS and 0 < weight <= 1 for state in shown.states for unit, weight in state.expression.items())

@needs_voice
def test_another_seed_is_another_performance_of_the_same_words():
    speech = speak('A happy boy was here.', PLAIN, 3)
    person = draw_character(generator_for(41))._replace(feelings_per_s=1e-6, expressiveness=0.0)
    one, same, other = (perform(speech, generator_for(seed), 75, Fraction(25), person) for seed in (1, 1, 2))
    assert np.array_equal(one.poses, same.poses) and not np.array_equal(one.poses, other.poses)
    assert np.array_equal(one.mouth, other.mouth) and one.visemes == other.visemes          # the words move the lips, chance does not

def test_sentences_use_the_whole_vocabulary():
    text = ' '.join(draw_sentences(generator_for(42, k), 20) for k in range(300)).lower()
    unused = [phrase for phrases in WORDS.values() for phrase in phrases if phrase.lower() not in text]
    assert not unused, unused
    assert len(TEMPLATES) == len(set(TEMPLATES))
