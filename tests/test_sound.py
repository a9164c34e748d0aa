"What a frame hears, what an episode brings along, and the scorer of mouth and sound: files and clips that a chapter cannot hold."
import os, subprocess, sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import clip
from made_clips import SHARED, click_track, needs_shared
from talking_face.config import ModelConfig, PreprocessConfig, preset
from talking_face.core import ConfigError, DataError, generator_for
from talking_face.data.episodes import EpisodeSampler, choose_stretch, shifted_places, stream_batches, stretch_starts
from talking_face.data.preprocessing import preprocess
from talking_face.data.shard_writing import ShardWriter, encode_clip, encode_frame, encode_sound, pack_sample
from talking_face.data.shards import ClipRecord, open_clip, read_manifest
from talking_face.data.sources import landmarks_beside
from talking_face.few_shot.sound_embedder import SoundEmbedder
from talking_face.networks.lip_sync import SyncScorer, lip_sync_accuracy, lip_sync_loss
from talking_face.signals.audio import log_mel_spectrogram, window_at
from talking_face.signals.drawing import draw_landmarks
from talking_face.signals.sound import read_audio
from talking_face.signals.sound_inputs import logmel_windows, sound_inputs, sound_shape, thesis_mel

EARS = {kind: ModelConfig(image_size=32, sound=kind) for kind in ('logmel', 'thesis_mel')}
DEAF = ModelConfig(image_size=32)
RATES = (Fraction(24), Fraction(25), Fraction(30_000, 1001), Fraction(30), Fraction(60))


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    "Sound no two pieces of which are alike."
    rng = np.random.default_rng(seed)
    level = np.interp(np.arange(round(16_000 * seconds)) / 16_000, np.arange(0, seconds + 0.1, 0.05), rng.uniform(0.01, 0.5, len(np.arange(0, seconds + 0.1, 0.05))))
    return (level * rng.uniform(-1, 1, len(level))).astype(np.float32)


def stored(folder: Path, clips: dict[str, dict]):
    "A folder of shards with hand-made clips: key to fps, positions, sound (or None) and length in frames."
    rng = np.random.default_rng(1)
    with ShardWriter(folder) as writer:
        for key, facts in clips.items():
            fps, positions, sound = facts['fps'], facts['positions'], facts['sound']
            count, seconds = len(positions), float(facts['length'] / fps)
            faces = rng.uniform(8, 24, (68, 2)) + rng.normal(0, 0.2, (count, 68, 2))
            row = dict(key=key, identity=key, source=f'{key}.mp4', source_sha256='0' * 64, split='', fps=f'{fps.numerator}/{fps.denominator}', size=32, frames=count,
                       seconds=seconds, has_audio=sound is not None)
            pictures = [encode_frame(rng.integers(0, 256, (32, 32, 3), np.uint8)) for _ in positions]
            members = encode_clip(row | dict(positions=[int(place) for place in positions]), faces, np.ones(count), pictures, b'' if sound is None else encode_sound(sound))
            writer.add(row, pack_sample(key, members))
            writer.commit(f'{key}.mp4', identity=key, clips=1)
    return read_manifest(folder)


@pytest.fixture(scope='module')
def gaps(tmp_path_factory):
    "Clips at four rates; some frames were dropped, one clip has no sound, one consists of stills with a recording beside them."
    clips = {}
    for number, fps in enumerate(RATES[:4]):
        positions = np.array([place for place in range(50) if place not in (3, 20, 21, 40)])
        clips[f'talk{number}'] = dict(fps=fps, positions=positions, sound=noise(float(50 / fps), number), length=50)
    clips['mute'] = dict(fps=Fraction(25), positions=range(30), sound=None, length=30)
    clips['stills'] = dict(fps=Fraction(1), positions=range(12), sound=noise(5, 9), length=12)
    clips['ragged'] = dict(fps=Fraction(25), positions=range(0, 40, 2), sound=noise(1.6, 10), length=40)      # no two frames in a row
    return stored(tmp_path_factory.mktemp('sound')/'shards', clips)


def tensors(batch):
    return {name: value for name, value in batch._asdict().items() if torch.is_tensor(value)}


def equal(one, other) -> bool:
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) and (one.keys, one.support, one.targets) == (other.keys, other.support, other.targets)


# ---- what a frame hears

@pytest.mark.parametrize('fps', RATES, ids=str)
@pytest.mark.parametrize('second', [1, 33])
def test_a_clap_is_heard_by_the_frame_that_owns_it(fps, second):
    sound = click_track(second + 1, second + 0.0005, 16_000)[0].astype(np.float32)        # a clap that ends with its frame would be cut by whole milliseconds
    owner = int(Fraction(2 * second * 1000 + 1, 2000) * fps)
    numbers = range(owner - 8, owner + 9)
    middles = [Fraction(2 * t + 1, 2) / fps for t in numbers]
    windows = sound_inputs(sound, middles[6:11], EARS['logmel'], fps)[:, 0].sum(2)              # two frames before and behind: all hear it
    place = np.array([(row @ np.arange(32)) / row.sum() for row in windows])
    assert np.abs(place[2] - 15) * 0.01 <= float(1 / fps) / 2 + 0.0051, 'the clap lies within half a frame of the middle of its window'
    assert (np.abs(np.diff(place) * 0.01 + float(1 / fps)) < 0.0101).all(), 'and wanders by one frame from window to window'
    touched = [t for t, picture in zip(numbers, thesis_mel(sound, middles, fps, 32)) if not (picture[0, 8:] == 1).all()]
    assert owner in touched and len(touched) <= 2 and max(abs(t - owner) for t in touched) <= 1


def test_rates_given_as_floats_are_the_same_rates():
    sound, times = noise(2), [0.51718, 1.2]
    for model in EARS.values():
        assert np.allclose(sound_inputs(sound, times, model, 29.97002997002997), sound_inputs(sound, times, model, Fraction(30_000, 1001)), atol=1e-6)
    whole = thesis_mel(sound, [Fraction(59, 58)], 29, 32)
    assert not np.allclose(thesis_mel(sound, [Fraction(59, 2) * Fraction(1001, 30_000)], Fraction(30_000, 1001), 32), whole, atol=0.01)   # 29.97 is not 29


def test_silence_looks_like_speech_in_the_thesis_picture_only():
    speech = read_audio(clip('syn02'))
    middle = [Fraction(33, 50)]
    for gain in (0.1, 0.02):
        thesis, ours = ({name: sound_inputs(sound, middle, EARS[kind], 25) for name, sound in (('full', speech), ('soft', gain * speech))} for kind in ('thesis_mel', 'logmel'))
        assert np.allclose(thesis['full'], thesis['soft'], atol=1e-4) and ours['soft'].mean() < 0.85 * ours['full'].mean()
    nothing = {kind: sound_inputs(np.zeros(16_000, np.float32), middle, EARS[kind], 25) for kind in EARS}
    assert (nothing['thesis_mel'] == 1).all() and not nothing['logmel'].any()
    for kind, model in EARS.items():
        assert np.array_equal(sound_inputs(None, middle, model, 25), nothing[kind]) and nothing[kind].shape == (1, *sound_shape(model))
        assert np.array_equal(sound_inputs(speech, [-5, 1000], model, 25), np.repeat(nothing[kind], 2, 0)), 'beyond the clip is silence'


@needs_shared
def test_real_speech_fills_both_inputs():
    sound = read_audio(sorted((SHARED/'speech').glob('*.wav'))[0])
    for model in EARS.values():
        heard = sound_inputs(sound, [Fraction(2 * t + 1, 50) for t in range(100)], model, 25)
        assert np.isfinite(heard).all() and 0 <= heard.min() and heard.max() < 1.2 and heard.std(0).max() > 0.05


# ---- episodes with sound

@pytest.mark.parametrize('kind', EARS)
def test_each_target_hears_its_place_in_the_film(gaps, kind):
    "Rates of 24 to 30 per second, frames dropped in between: the sound is that of the film, not of the row of stored frames."
    sampler = EpisodeSampler(gaps, EARS[kind], clips=4, targets=3, support=(2,), augment=0.0)
    assert sampler.keys == ['ragged', 'talk0', 'talk1', 'talk2', 'talk3']
    for step in range(4):
        batch = sampler.batch(step)
        for slot, key in enumerate(batch.keys):
            record, content = gaps[key], open_clip(gaps[key])
            frames = np.rint(127.5 * (batch.target_images[3 * slot:3 * slot + 3].permute(0, 2, 3, 1).numpy() + 1))
            places = [int(content.positions[int((content.frames() == frame).all((1, 2, 3)).argmax())]) for frame in frames]
            expected = sound_inputs(content.audio(), [Fraction(2 * place + 1, 2) / record.fps for place in places], EARS[kind], record.fps)
            assert np.array_equal(batch.target_sounds[3 * slot:3 * slot + 3], expected)


def test_parts_of_clips_cut_from_one_film_keep_their_sound(tmp_path):
    "A film of 3 s is stored as three clips; the sound of the second is that of the film's second second."
    (tmp_path/'in').mkdir()
    for suffix in ('.mp4', '.npz'): (tmp_path/'in'/f'film{suffix}').write_bytes(clip('syn03').with_suffix(suffix).read_bytes())
    preprocess([tmp_path/'in'], tmp_path/'shards', PreprocessConfig(size=32, maximum_seconds=1.0), landmarks=landmarks_beside)
    manifest = read_manifest(tmp_path/'shards')
    assert len(manifest) == 3
    film = log_mel_spectrogram(read_audio(clip('syn03')))
    sampler = EpisodeSampler(manifest, EARS['logmel'].replace(sound_window=0.1), clips=3, targets=25, support=(1,), augment=0.0, consecutive=False)
    starts = {record.key: number for number, record in enumerate(sorted(manifest, key=lambda record: record.key))}
    for key, second in starts.items():
        record, content = manifest[key], open_clip(manifest[key])
        heard = sound_inputs(content.audio(), [Fraction(2 * int(p) + 1, 50) for p in content.positions], EARS['logmel'].replace(sound_window=0.1), record.fps)
        truth = logmel_windows(film, [second + Fraction(2 * int(p) + 1, 50) for p in content.positions], 0.1)
        assert np.abs(heard - truth)[3:-3].max() < 0.02, key                                     # 16 bits; at the ends other sound was cut away
        assert np.abs(heard[4:-3] - truth[3:-4]).max() > 0.2                                     # one frame beside it would be seen
    assert sampler.batch(0).target_sounds.shape == (75, 1, 10, 80)


def test_stretches_are_neighbours_and_wrong_sound_is_elsewhere(gaps):
    options = dict(clips=3, targets=5, support=(1, 2), augment=0.0, consecutive=True, shifts=8)
    sampler = EpisodeSampler(gaps, EARS['logmel'], **options)
    for step in range(6):
        batch = sampler.batch(step)
        assert 'ragged' not in batch.keys and batch.sync_sounds.shape == (3, 9, 1, 40, 80)
        for slot, key in enumerate(batch.keys):
            record, content = gaps[key], open_clip(gaps[key])
            rows, own = log_mel_spectrogram(content.audio()), batch.sync_sounds[slot, :, 0].numpy()
            frames = np.rint(127.5 * (batch.target_images[5 * slot:5 * slot + 5].permute(0, 2, 3, 1).numpy() + 1))
            places = [int(content.positions[int((content.frames() == frame).all((1, 2, 3)).argmax())]) for frame in frames]
            assert (np.diff(places) == 1).all()
            at = lambda shift: window_at(rows, Fraction(2 * (places[2] + shift) + 1, 2) / record.fps, 0.4)
            assert np.array_equal(own[0], at(0))
            near = 6 if record.fps > 25 else 5
            shifts = [next(s for s in (*range(-3 * near, 1 - near), *range(near, 3 * near + 1)) if np.array_equal(window, at(s))) for window in own[1:7]]
            assert len(set(shifts)) == 6 and all(0 <= places[0] + s <= 45 for s in shifts)
            assert not any(np.array_equal(window, at(s)) for window in own[7:] for s in range(-50, 50)), 'strangers come from other clips'


def test_short_clips_offer_their_farthest_sound_never_the_right_one():
    for length in range(6, 14):
        for place in range(length - 4):
            shifts = shifted_places(generator_for(0, length, place), place, Fraction(25), length, 15)
            assert len(shifts) == 15 and 0 not in shifts and (place + shifts >= 0).all() and (place + shifts + 5 <= length).all()
            far = max(place, length - 5 - place)
            assert set(np.abs(shifts)) <= {*range(5, 16), far} and (far >= 5 or set(np.abs(shifts)) == {far})
    with pytest.raises(ValueError, match='only one stretch'): shifted_places(generator_for(0), 0, Fraction(25), 5, 1)
    with pytest.raises(ValueError, match='in a row'): choose_stretch(generator_for(0), np.arange(0, 20, 2), 1, 2)
    assert not len(stretch_starts(np.arange(3), 3)) and stretch_starts(np.arange(4), 3).tolist() == [0, 1]


def test_pictures_do_not_depend_on_ears_lips_or_wrong_sound(gaps):
    base = dict(clips=3, targets=5, support=(1, 4), consecutive=True, seed=3)
    heard = gaps.select(keys=[key for key in gaps.keys if key.startswith('talk')])
    plain, rich = EpisodeSampler(heard, DEAF, **base), EpisodeSampler(heard, EARS['logmel'], mouth_drop=0.5, shifts=8, **base)
    lips = set()
    for step in range(5):
        one, other = plain.batch(step), rich.batch(step)
        same = [name for name in tensors(one) if torch.equal(getattr(one, name), getattr(other, name))]
        assert set(same) >= {'support_images', 'support_drawings', 'target_images', 'target_landmarks'} and one.mouth is one.target_sounds is one.sync_sounds is None
        for slot in range(3):
            drawn = draw_landmarks(other.target_landmarks[5 * slot:5 * slot + 5].numpy(), 32, 'filled-v1', bool(other.mouth[slot]))
            assert np.array_equal(np.rint(127.5 * (other.target_drawings[5 * slot:5 * slot + 5].permute(0, 2, 3, 1).numpy() + 1)), drawn)
        lips |= {*other.mouth.tolist()}
    assert lips == {True, False}
    share = np.mean([EpisodeSampler(heard, DEAF, mouth_drop=0.25, clips=4, targets=1, support=(1,)).batch(step).mouth.float().mean() for step in range(60)])
    assert abs(share - 0.75) < 0.13                                                          # 4.6 standard deviations


@pytest.mark.parametrize('kind', EARS)
def test_slots_and_workers_give_the_same_bits(gaps, kind):
    sampler = EpisodeSampler(gaps, EARS[kind], clips=4, targets=5, support=(1, 2), consecutive=True, shifts=4, mouth_drop=0.5)
    whole = [sampler.batch(step) for step in range(3)]
    for batch, step in zip(whole, range(3)):
        parts = [sampler.batch(step, slots) for slots in (range(0, 1), range(1, 4))]
        for name, value in tensors(batch).items(): assert torch.equal(torch.cat([getattr(part, name) for part in parts]), value), name
        assert sum((part.keys for part in parts), []) == batch.keys
        tight = EpisodeSampler(gaps, EARS[kind], clips=4, targets=5, support=(1, 2), consecutive=True, shifts=4, mouth_drop=0.5, cache_bytes=50_000)
        assert equal(tight.batch(step), batch)
    for slots in (range(0), range(3, 5), range(-1, 2)):
        with pytest.raises(ValueError, match='slots of a batch of 4'): sampler.batch(0, slots)
    if kind == 'logmel':
        assert all(map(equal, [sampler.batch(step, range(1, 3)) for step in range(3)], stream_batches(sampler, 0, 3, 2, range(1, 3))))


def test_what_cannot_be_heard_is_said(gaps):
    mute = gaps.select(keys=['mute'])
    with pytest.raises(DataError, match='sound'): EpisodeSampler(mute, EARS['logmel'], 1, 1, (1,))
    with pytest.raises(DataError, match='sound'): EpisodeSampler(gaps.select(keys=['stills']), EARS['thesis_mel'], 1, 1, (1,))
    assert EpisodeSampler(mute, DEAF, 1, 1, (1,)).batch(0).target_sounds is None
    with pytest.raises(DataError, match='frames in a row'): EpisodeSampler(gaps.select(keys=['ragged']), DEAF, 1, 5, (1,), consecutive=True).batch(0)
    with pytest.raises(ConfigError, match='consecutive'): EpisodeSampler(gaps, DEAF, 1, 4, (1,), consecutive=True, shifts=3)
    with pytest.raises(ConfigError, match='does not hear'): sound_inputs(noise(1), [0.5], DEAF, 25)


# ---- the networks

@pytest.mark.parametrize('size, system, mode', [('tiny', 'va_slim', 'best'), ('small', 'va', 'best'), ('tiny', 'va', 'thesis'), ('small', 'va_match', 'thesis')])
def test_every_parameter_of_the_sound_embedder_learns(size, system, mode):
    torch.manual_seed(0)
    model = preset(size, system, mode).model
    embedder = SoundEmbedder(model)
    for name, parameter in embedder.named_parameters():
        if name.endswith('gamma'): parameter.data.fill_(0.5)                       # attention starts at nothing
    sounds = torch.rand(3, *sound_shape(model))
    embedded = embedder(sounds)
    assert embedded.shape == (3, model.sound_size) and embedded.dtype == torch.float32
    (embedded * torch.randn_like(embedded)).sum().backward()
    idle = [name for name, parameter in embedder.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert all(name.endswith('key.bias') for name in idle), idle                   # it moves all scores of a softmax alike
    embedder.eval()
    with torch.no_grad(): assert torch.allclose(embedder(sounds)[1:], embedder(sounds[1:]), rtol=1e-3, atol=1e-4)


def test_published_sound_embedder_has_its_parameters():
    with torch.device('meta'): embedder = SoundEmbedder(preset('paper', 'va', 'thesis').model.replace(spectral_norm=False))
    assert sum(parameter.numel() for parameter in embedder.parameters()) == 14_905_345


def scene(count: int, size: int, seed: int = 0):
    "Pictures, plausible faces and sounds of `count` stretches with 6 wrong sounds each."
    generator = torch.Generator().manual_seed(seed)
    with np.load(clip('syn03').with_suffix('.npz')) as truth: face = torch.from_numpy(truth['landmarks'][:5 * count]) * (size / 256)
    return torch.rand(5 * count, 3, size, size, generator=generator) * 2 - 1, face, torch.rand(count, 7, 1, 40, 80, generator=generator)


@pytest.mark.parametrize('size', [32, 64, 128, 256])
def test_the_scorer_reads_pictures_of_every_size(size):
    torch.manual_seed(0)
    scorer, (images, faces, sounds) = SyncScorer(size), scene(2, size)
    images.requires_grad_()
    loss = lip_sync_loss(scorer, images, faces, sounds)
    loss.backward()
    assert torch.isfinite(loss) and (images.grad.flatten(1).norm(dim=1) > 0).all() and torch.isfinite(images.grad).all()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in scorer.parameters())
    with torch.autocast('cpu', torch.bfloat16): rough = lip_sync_loss(scorer, images, faces, sounds)
    assert rough.dtype == torch.float32 and abs(rough.detach() - loss.detach()) < 0.1


def test_the_loss_is_a_mean_over_episodes_and_ignores_equal_sounds():
    torch.manual_seed(0)
    scorer, (images, faces, sounds) = SyncScorer(64), scene(4, 64)
    whole = lip_sync_loss(scorer, images, faces, sounds)
    parts = [lip_sync_loss(scorer, images[5 * i:5 * i + 5], faces[5 * i:5 * i + 5], sounds[i:i + 1]) for i in range(4)]
    assert torch.allclose(whole, torch.stack(parts).mean(), atol=1e-5)
    doubled = torch.cat([sounds, sounds[:, :1]], 1)                                # the right sound once more is no wrong one
    assert torch.allclose(lip_sync_loss(scorer, images, faces, doubled), whole, atol=1e-5)
    mute = torch.zeros_like(sounds)
    assert lip_sync_loss(scorer, images, faces, mute) == 0 and abs(lip_sync_accuracy(scorer, images, faces, mute) - 1 / 7) < 1e-6
    black = torch.zeros_like(images)
    assert torch.isfinite(lip_sync_loss(scorer, black, faces, sounds))             # a generator's first pictures are flat


def test_a_scorer_learns_what_belongs_together():
    "A mouth that opens with the loudness of invented sounds: found among wrong ones after a few steps, not before, and not when pictures are swapped."
    torch.manual_seed(0)
    def stretches(seed):
        rng = np.random.default_rng(seed)
        _, face, _ = scene(1, 64)
        loudness = rng.uniform(0, 1, (16, 5, 5))                                   # episode, sound, moment
        sounds = torch.from_numpy(np.repeat(loudness, 8, 2)).float()[..., None, :, None].expand(16, 5, 1, 40, 80) * 0.6
        y = torch.arange(64.)[:, None]
        middle = face[0, 48:, 1].mean()
        dark = torch.sigmoid((torch.from_numpy(loudness[:, 0]).float() * 6)[..., None, None] - (y - middle).abs())
        return (0.5 - dark.expand(16, 5, 64, 64)).flatten(0, 1)[:, None].expand(-1, 3, -1, -1), face[:1].expand(80, -1, -1), sounds
    scorer, judged = SyncScorer(64), stretches(999)
    before = lip_sync_accuracy(scorer, *judged)
    optimiser = torch.optim.Adam(scorer.parameters(), 2e-3)
    for step in range(60):
        loss = lip_sync_loss(scorer, *stretches(step))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    images, faces, sounds = judged
    assert before < 0.5 < lip_sync_accuracy(scorer, *judged) and lip_sync_accuracy(scorer, images.roll(5, 0), faces, sounds) < 0.5


def test_sound_inputs_do_not_depend_on_the_number_of_threads():
    "numpy's products round differently on one thread and on two, and a training that is resumed on another number would drift."
    program = ('import hashlib, numpy as np\nfrom talking_face.signals.audio import log_mel_spectrogram\nfrom talking_face.signals.sound_inputs import thesis_mel\n'
               'samples = np.random.default_rng(0).normal(0, .1, 48_000).astype(np.float32)\n'
               'for each in (log_mel_spectrogram(samples), thesis_mel(samples, np.arange(75) / 25, 25, 16)): print(hashlib.sha256(each.tobytes()).hexdigest())')
    said = [subprocess.run([sys.executable, '-c', program], env={**os.environ, 'OPENBLAS_NUM_THREADS': threads, 'OMP_NUM_THREADS': threads}, text=True,
                           capture_output=True, check=True).stdout for threads in ('1', '2')]
    assert said[0] == said[1] and len(said[0].split()) == 2
