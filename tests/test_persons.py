"""Persons: what fine-tuning moves in every system and mode, what is stored, what comes back, and what is refused."""
import dataclasses, json, shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from talking_face.config import SYSTEMS, FineTuneConfig, LossConfig, MetaLearningConfig, fine_tune_preset, preset
from talking_face.core import CheckpointError, ConfigError, TrainingAlarm
from talking_face.data.photos import Photos
from talking_face.few_shot import fine_tuner, fine_tuning
from talking_face.few_shot.fine_tuner import FineTuner, fine_tuning_step, judge_views, photo_views
from talking_face.few_shot.fine_tuning import fine_tune
from talking_face.few_shot.meta_learning import FewShotModel, build_model
from talking_face.few_shot.person import COMPACT_BYTES, Person, compacted, feed_forward, likeness, load_person
from talking_face.networks.training import save_tensors
from talking_face.signals.drawing import draw_landmarks
from talking_face.signals.sound_inputs import sound_shape

ROOT = Path(__file__).resolve().parents[1]
POINTS = np.load(ROOT/'data/embedded/clips/syn01/syn01_c0.npz')['landmarks'][::9].astype(np.float32) / 2      # 9 faces, 128 pixels
NARROW = dict(embedding_size=16, embedder_width=4, generator_width=8, generator_downs=2, generator_residuals=1, generator_last=4, discriminator_width=4, sound_width=4, maximum_channels=32)
GAN = LossConfig(adversarial=0.5, feature_matching=1.0, match=1.0, random_features=0.0)
QUICK = FineTuneConfig(epochs=2, views=2, batch=4, threads=1)


pytestmark = pytest.mark.usefixtures('one_thread')


def config_of(system: str = 'few_shot', mode: str = 'best', **changes) -> MetaLearningConfig:
    "Narrow networks of a system, 64 pixels, with a discriminator."
    config = preset('tiny', system, mode, precision='fp32')
    model = config.model.replace(**{name: min(value, getattr(config.model, name)) for name, value in NARROW.items()})
    if config.model.sound == 'thesis_mel': model = model.replace(sound_size=16)
    losses = GAN.replace(sync=config.losses.sync, sound_match=config.losses.sound_match)
    return config.replace(**{'model': model, 'losses': losses, **changes})


def photos_of(config: MetaLearningConfig, count: int = 4, sounds: bool = True) -> Photos:
    "Faces that are their own drawings, each with its own noise to hear."
    points, random = POINTS[:count], np.random.default_rng(0)
    heard = random.random((count, *sound_shape(config.model))).astype(np.float32) if sounds and config.model.hears else None
    return Photos(draw_landmarks(points, 128, 'filled-v1'), points, heard)


def store_run(folder: Path, model: FewShotModel) -> FewShotModel:
    "Write a model as the only checkpoint of a run folder, unaveraged; returns it as a model of that run."
    networks = {name: getattr(model, name) for name in ('embedder', 'generator', 'discriminator', 'sound_embedder') if getattr(model, name) is not None}
    weights = {f'{name}.{key}': value for name, module in networks.items() for key, value in module.state_dict().items()}
    header = dict(stage='meta_learning', config=model.config.to_dict(), palette=model.config.model.palette, keys=['nobody'], margin=model.margin, averaged=[], step=1)
    save_tensors(folder/'checkpoints/step-000001.safetensors', weights, header)
    return model._replace(source=str(folder))


def shaken(person: Person, strength: float = 0.3) -> Person:
    "The person with every weight moved in all directions, in place."
    for value in person.state().values(): value += strength * value.abs().mean() * torch.randn_like(value)
    return person


# ---- what moves ----

@pytest.mark.parametrize('mode', ['best', 'thesis'])
@pytest.mark.parametrize('system', SYSTEMS)
def test_everything_that_should_learn_is_in_one_optimiser_and_learns(system, mode):
    config = config_of(system, mode, mouth_drop=0.0)
    model, options = build_model(config, ['a', 'b']), (fine_tune_preset(config) if mode == 'thesis' else QUICK).replace(threads=1)
    photos = photos_of(config)
    tuner = FineTuner(model, photos, options)
    named = {name: value for module in (tuner.modules, tuner.person) for name, value in module.named_parameters()}
    groups = [group for optimiser in tuner.optimisers for group in optimiser.param_groups]
    owned = [id(parameter) for group in groups for parameter in group['params']]
    expected = {name for name in named if name != 'discriminator.w0' and not name.startswith('discriminator.table')}
    assert len(owned) == len(set(owned)) and {name for name, value in named.items() if id(value) in owned} == expected
    assert {'psi', 'w', 'discriminator.b'} <= expected and any(name.startswith('sound.embedder') for name in expected) == config.model.hears
    assert ('sound.projection.weight' in expected) == config.model.hears and not any('projection' in name for name in expected if name.startswith('generator'))
    generator_rate = next(group['lr'] for group in groups if any(value is named['generator.output.weight'] or value is named.get('generator.output.parametrizations.weight.original') for value in group['params']))
    if config.model.hears: assert any(named['sound.projection.weight'] is value for group in groups if group['lr'] == generator_rate for value in group['params'])
    before = {name: value.clone() for name, value in named.items()}
    for step in range(2):      # psi' of an untrained model may be small: the second step reaches everything
        chosen = tuner.chosen(step)
        fine_tuning_step(tuner, tuner.views(chosen, step), chosen, step)
    gammas = {name for name in expected if name.endswith('gamma')}                                             # behind a closed gate nothing learns at first
    gated = {name for name in expected if '.attention.' in name or 'attention' in name} - gammas
    still = {name for name in expected if torch.equal(named[name], before[name])} - gated - {'discriminator.b'}
    assert not still and all(named[name].grad is not None for name in expected)
    assert all(torch.equal(named[name], before[name]) for name in named.keys() - expected)


@pytest.mark.parametrize('system', ['few_shot', 'va_slim'])
def test_start_is_exact(system):
    config = config_of(system)
    model, photos = build_model(config, ['a']), photos_of(config)
    tuner, person = FineTuner(model, photos, QUICK), feed_forward(model, photos)
    views = photo_views(photos, range(4), model, torch.device('cpu'))
    with torch.no_grad():
        embedding = model.embed(views.images, views.drawings)
        sound = model.sound_embedder(views.sounds) if config.model.hears else None
        wanted = model.generator(views.drawings, model.generator.project(embedding.expand(4, -1), sound))
        tuner.modules.eval()
        assert torch.allclose(tuner.draw(views, tuner.modules, tuner.person), wanted, atol=1e-5)
    drawn = person.animate(views.landmarks.numpy(), photos.sounds)
    assert np.abs(drawn - (wanted.permute(0, 2, 3, 1).numpy() + 1) * 127.5).max() < 2
    assert torch.allclose(tuner.person['w'], model.discriminator.w0 + embedding[0], atol=1e-5)


def test_sound_is_that_of_the_photo():
    "Each photo is drawn with its own sound, whichever photos a step has chosen; without sounds all hear silence."
    config = config_of('va_slim')
    model, photos = build_model(config, ['a']), photos_of(config)
    views = photo_views(photos, [3, 1], model, torch.device('cpu'))
    assert torch.equal(views.sounds, torch.from_numpy(photos.sounds[[3, 1]]))
    assert not photo_views(photos._replace(sounds=None), [3, 1], model, torch.device('cpu')).sounds.any()


def test_discriminator_steps_and_penalty_are_honoured(monkeypatch):
    taken, config = [], config_of(discriminator_steps=3, losses=GAN.replace(gradient_penalty=1.0), gradient_penalty_every=2)
    tuner = FineTuner(build_model(config, ['a']), photos_of(config), QUICK)
    step, penalty = tuner.optimisers[1].step, fine_tuner.gradient_penalty
    tuner.optimisers[1].step = lambda: (taken.append('step'), step())
    monkeypatch.setattr(fine_tuner, 'gradient_penalty', lambda *arguments: (taken.append('penalty'), penalty(*arguments))[1])
    for number in range(2):
        chosen = tuner.chosen(number)
        fine_tuning_step(tuner, tuner.views(chosen, number), chosen, number)
    assert taken == ['penalty', 'step', 'step', 'penalty', 'step', 'step', 'penalty', 'step', 'step']      # updates 0, 2 and 4 of six


def test_generator_loss_leaves_the_discriminator_alone_and_the_other_way_round():
    config = config_of()
    tuner = FineTuner(build_model(config, ['a']), photos_of(config), QUICK)
    views = tuner.views(range(4), 0)
    output = tuner.draw(views, tuner.modules, tuner.person)
    opinion = judge_views(tuner, output, views)
    for optimiser in tuner.optimisers: optimiser.zero_grad()
    calls = []
    for one, other in ((0, 1), (1, 0)):
        optimiser = tuner.optimisers[one]
        original = optimiser.step
        def step(one=one, other=other, original=original):
            theirs = [value.grad is None for group in tuner.optimisers[other].param_groups for value in group['params']]
            calls.append((one, all(theirs)))
            original()
        optimiser.step = step
    assert opinion.fake_scores.requires_grad
    chosen = tuner.chosen(0)
    fine_tuning_step(tuner, tuner.views(chosen, 0), chosen, 0)
    assert calls[0] == (0, True) and [one for one, _ in calls] == [0] + [1] * config.discriminator_steps      # no gradient at D when G steps


# ---- how long ----

def test_patience_keeps_the_best_and_stops():
    config = config_of()
    model, photos, told = build_model(config, ['a']), photos_of(config, 5), []
    ruin = QUICK.replace(epochs=40, patience=2, learning_rate=0.5, psi_learning_rate=0.5, ema=0.0, schedule='constant')
    try: person = fine_tune(model, photos, ruin, callback=lambda *_: None, log=lambda step, figures: told.append(figures['held_out']))
    except TrainingAlarm: pytest.fail('the step size should ruin the picture, not the numbers')
    held = person.header['held_out']
    assert held['epochs'] - held['epoch'] == 2 and held['epochs'] < 40 and held['best'] <= min(told) and held['photo'] == 2
    if held['epoch'] == 0:      # nothing was ever better than the start, which came back
        assert np.array_equal(person.animate(person.landmarks), feed_forward(model, photos.select([0, 1, 3, 4])).animate(person.landmarks))
    good = fine_tune(model, photos, QUICK.replace(epochs=6, patience=3), callback=lambda *_: None)
    assert good.header['held_out']['best'] < good.header['held_out']['first'] and len(good.landmarks) == 5


def test_held_out_photo_is_seen_by_nobody():
    config = config_of()
    model, photos = build_model(config, ['a']), photos_of(config, 5)
    other = photos._replace(images=photos.images.copy())
    other.images[2] = 255 - other.images[2]
    options = QUICK.replace(patience=50)
    one, two = (FineTuner(model, some, options) for some in (photos, other))
    assert torch.equal(one.person['psi'], two.person['psi']) and torch.equal(one.person['w'], two.person['w'])
    for step in range(4):
        chosen = one.chosen(step)
        assert torch.equal(one.views(chosen, step).images, two.views(chosen, step).images)
    with pytest.raises(ConfigError, match='at least 4 photos, 3 are given'): fine_tune(model, photos.select([0, 1, 2]), options)


def test_unit_step_is_one_photo_per_epoch():
    config, figures = config_of(), []
    person = fine_tune(build_model(config, ['a']), photos_of(config, 4), QUICK.replace(unit='step', epochs=7), callback=lambda *_: None, log=lambda *row: figures.append(row))
    assert person.header['steps'] == 7 == len(figures) and [step for step, _ in figures] == list(range(1, 8))


def test_margin_is_the_photos_own():
    config = config_of()
    model, photos = build_model(config, ['a']), photos_of(config)._replace(margin=2.75)
    assert feed_forward(model, photos).margin == fine_tune(model, photos, QUICK.replace(epochs=0), callback=lambda *_: None).margin == 2.75
    assert feed_forward(model, photos._replace(margin=None)).margin == model.margin


# ---- stored ----

@pytest.mark.parametrize('system, mode', [('few_shot', 'best'), ('va_sync', 'best'), ('va', 'thesis')])
def test_loaded_is_what_was_stored(tmp_path, system, mode):
    config = config_of(system, mode)
    model, photos = build_model(config, ['a', 'b']), photos_of(config)
    person = fine_tune(model, photos, QUICK.replace(epochs=1), callback=lambda *_: None)
    person.save(tmp_path/'person')
    again = load_person(tmp_path/'person')
    for sounds in (photos.sounds, None):
        assert np.array_equal(again.animate(person.landmarks, sounds), person.animate(person.landmarks, sounds))
    assert torch.equal(again.critic.w, person.critic.w) and again.critic.trunk.keys() == person.critic.trunk.keys()
    more = fine_tune(model, photos, QUICK.replace(epochs=0), callback=lambda *_: None, start=again)
    assert np.abs(more.animate(person.landmarks).astype(int) - person.animate(person.landmarks)).max() <= 1 and torch.equal(more.critic.w, person.critic.w)
    again.save(tmp_path/'person')      # over itself
    assert np.array_equal(load_person(tmp_path/'person').animate(person.landmarks), person.animate(person.landmarks))


def test_spectrally_normalised_person_keeps_its_blocks_scale(tmp_path):
    "A block with spectral norm weighs its branches differently; a person's weights are stored without it."
    config = config_of()
    model = build_model(config.replace(model=config.model.replace(spectral_norm=True)), ['a'])
    person = feed_forward(model, photos_of(config))
    person.save(tmp_path/'person')
    with torch.no_grad(): wanted = model.generator(photo_views(photos_of(config), range(4), model, torch.device('cpu')).drawings, person.psi.expand(4, -1))
    drawn = load_person(tmp_path/'person').animate(person.landmarks)
    assert np.abs(drawn - (wanted.permute(0, 2, 3, 1).numpy() + 1) * 127.5).max() < 2


def test_person_of_an_earlier_version_is_read(tmp_path):
    "Folders from before systems, sound and compact persons: fewer tensors, fewer options in the header."
    config = preset('tiny', precision='fp32')
    person = feed_forward(build_model(config, []), photos_of(config))
    person.save(tmp_path/'person')
    path = tmp_path/'person/person.safetensors'
    with safe_open(path, 'pt') as file: header, tensors = json.loads(file.metadata()['talking_face']), {name: file.get_tensor(name) for name in file.keys()}
    for name in ('system', 'mode', 'mouth_drop', 'adversarial_start', 'sync_start', 'gradient_penalty_every', 'accumulate', 'checkpointing', 'compile', 'channels_last'): header['config'].pop(name)
    for name in ('details', 'sound', 'sound_window', 'sound_size', 'sound_width'): header['config']['model'].pop(name)
    for name in ('sound_match', 'sync', 'gradient_penalty'): header['config']['losses'].pop(name)
    save_file(tensors, path, metadata={'talking_face': json.dumps(header)})
    old = load_person(tmp_path/'person')
    assert np.array_equal(old.animate(person.landmarks), person.animate(person.landmarks)) and old.sound is None and old.critic is None and old.margin == 1.5


# ---- compact ----

@pytest.mark.parametrize('system', ['few_shot', 'va_slim'])
def test_compact_at_small_fits(tmp_path, system):
    "Whatever moved, and however much: at most 2 MB in the file at `small`, and the loaded person draws what was told."
    config = preset('small', system)
    model = store_run(tmp_path/'run', build_model(config, ['nobody']))
    person = shaken(feed_forward(model, photos_of(config)))
    small = compacted(person, model, energy=1.0)
    small.save(tmp_path/'small')
    size = (tmp_path/'small/person.safetensors').stat().st_size
    assert COMPACT_BYTES * 0.9 < size <= COMPACT_BYTES <= 2_000_000 and small.header['compact']['kept'] > 0.2
    again = load_person(tmp_path/'small')
    assert np.array_equal(again.animate(person.landmarks[:2]), small.animate(person.landmarks[:2]))
    if config.model.hears: assert not all(torch.equal(value, again.sound.state_dict()[name]) for name, value in feed_forward(model, photos_of(config)).sound.state_dict().items())


@pytest.mark.parametrize('mended', [False, True])
def test_compact_fine_tuning_tells_what_it_cost(tmp_path, monkeypatch, mended):
    "`mended`: the factors are trained after cutting, which happens where cutting shows."
    monkeypatch.setattr(fine_tuning, 'ALIKE', 2.0 if mended else 0.0)
    config, told = config_of('va_slim', losses=LossConfig(random_features=0.0)), []
    model, photos = store_run(tmp_path/'run', build_model(config, ['nobody'])), photos_of(config)
    options = QUICK.replace(epochs=4)
    whole = fine_tune(model, photos, options, callback=lambda *_: None)
    small = fine_tune(model, photos, options.replace(compact=True), callback=lambda done, total, text: told.append((done, total, text)))
    compact = small.header['compact']
    points = np.array([(a + b) / 2 for a, b in zip(whole.landmarks, whole.landmarks[1:])], np.float32)
    assert abs(likeness(small, whole, points) - compact['likeness']) < 0.01 and compact['likeness'] > 0.9 and compact['bytes'] == small.difference.bytes
    assert told[-1][0] == told[-1][1] and 'likeness' in told[-1][2] and (compact['likeness'] != compact['cut_only']) == mended
    assert torch.equal(small.psi, whole.psi) != mended and len(small.difference.ranks) > 5
    small.save(tmp_path/'small'), whole.save(tmp_path/'whole')
    assert (tmp_path/'small/person.safetensors').stat().st_size < (tmp_path/'whole/person.safetensors').stat().st_size
    assert np.array_equal(load_person(tmp_path/'small').animate(points, photos.sounds[1:]), small.animate(points, photos.sounds[1:]))


def test_compact_person_wants_its_own_run(tmp_path):
    config = config_of(losses=LossConfig(random_features=0.0))
    model = store_run(tmp_path/'there/run', build_model(config, ['nobody']))
    store_run(tmp_path/'stranger', build_model(config.replace(seed=1), ['nobody']))
    person = compacted(shaken(feed_forward(model, photos_of(config))), model)
    person.save(tmp_path/'there/small')
    shutil.move(tmp_path/'there', tmp_path/'here')      # both together: found beside it
    assert np.array_equal(load_person(tmp_path/'here/small').animate(person.landmarks), person.animate(person.landmarks))
    shutil.move(tmp_path/'here/small', tmp_path/'small')
    with pytest.raises(CheckpointError, match='--run'): load_person(tmp_path/'small')
    with pytest.raises(CheckpointError, match='another checkpoint'): load_person(tmp_path/'small', tmp_path/'stranger')
    with pytest.raises(CheckpointError, match='nowhere'): load_person(tmp_path/'small', tmp_path/'nowhere')
    assert np.array_equal(load_person(tmp_path/'small', tmp_path/'here/run').animate(person.landmarks), person.animate(person.landmarks))
    with pytest.raises(ConfigError, match='none on disk'): compacted(dataclasses.replace(person, difference=None), model._replace(source='untrained'))
