"""Faults of published code in training, fine-tuning and resuming, each with a test that fails when it is put in; the list is in test_pitfalls.py."""
import contextlib, dataclasses, json, shutil, struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from talking_face.config import SYSTEMS, FineTuneConfig, LossConfig, MetaLearningConfig, preset
from talking_face.core import CheckpointError, TalkingFaceError, TrainingAlarm
from talking_face.data.photos import Photos
from talking_face.few_shot.fine_tuner import FineTuner, fine_tuning_step
from talking_face.few_shot.fine_tuning import fine_tune
from talking_face.few_shot.meta_learning import FewShotLearner, build_model, load_run, make_sampler, meta_learn
from talking_face.few_shot.person import feed_forward, load_person
from talking_face.networks.layers import SelfAttention
from talking_face.networks.training import checkpoints, load_tensors
from test_pitfalls import CLIPS, MODEL, POINTS, plain, shards, store      # noqa: F401, fixtures among them

pytestmark = pytest.mark.usefixtures('one_thread')

NOTHING = dict.fromkeys([item.name for item in dataclasses.fields(LossConfig) if not item.name.endswith('_path')], 0.0)
ADVERSARIAL = dict(adversarial=1.0, feature_matching=10.0, match=10.0)


def small(system: str = 'few_shot', mode: str = 'best', losses: dict | None = None, **changes) -> MetaLearningConfig:
    "A system of a few thousand weights that is trained with every loss it has; `losses`: these and nothing else."
    config = preset('tiny', system, mode)
    thesis, attention = mode == 'thesis', mode == 'thesis' and system == 'few_shot'      # which is slow, and the same in all
    model = config.model.replace(attention=attention, image_size=64 if attention else 32, embedding_size=16, embedder_width=4, generator_width=4,
                                 generator_downs=2 + (system == 'va'), generator_residuals=1, generator_last=4, discriminator_width=4,
                                 maximum_channels=32, sound_size=16 if thesis else 8, sound_width=4)
    weights = config.losses.replace(**ADVERSARIAL, pixel=1.0, face=0.0) if losses is None else LossConfig(**NOTHING | losses)
    fixed = dict(steps=4, clips=2, augment=0.0, support=(2,), warmup_steps=0, adversarial_start=0.0, sync_start=0.0, threads=1, precision='fp32',
                 device='cpu', sample_every=0, checkpoint_every=1, log_every=1)
    return config.replace(model=model, losses=weights, **fixed | changes)


def learner_of(config: MetaLearningConfig, shards: Path) -> FewShotLearner:
    return FewShotLearner(config, make_sampler(config, shards))


def trainable(learner: FewShotLearner) -> dict[str, nn.Parameter]:
    named = {f'{name}.{key}': parameter for name, module in learner.modules.items() for key, parameter in module.named_parameters()}
    return {name: parameter for name, parameter in named.items() if parameter.requires_grad}


def asleep(learner: FewShotLearner) -> set[str]:
    "Parameters inside an attention whose gamma starts at 0: no gradient reaches them in the first step."
    inside = [f'{name}.{key}.' for name, module in learner.modules.items() for key, part in module.named_modules() if isinstance(part, SelfAttention)]
    return {name for name in trainable(learner) if name.startswith(tuple(inside)) and not name.endswith('gamma')} if inside else set()


def dense(gradient: torch.Tensor | None) -> torch.Tensor | None: return None if gradient is None else gradient.detach().to_dense().clone()


@contextlib.contextmanager
def watched(learner: FewShotLearner) -> Iterator[list[tuple[set[str], dict, dict]]]:
    "Before every step of an optimiser in the block: the names it moves, all values, all gradients."
    seen, parameters = [], trainable(learner)
    names = {id(parameter): name for name, parameter in parameters.items()}
    def look(optimiser, *_):
        own = {names[id(parameter)] for group in optimiser.param_groups for parameter in group['params']}
        values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        seen.append((own, values, {name: dense(parameter.grad) for name, parameter in parameters.items()}))
    handle = register_optimizer_step_pre_hook(look)
    try: yield seen
    finally: handle.remove()


# ---- optimisers ----

@pytest.mark.parametrize('mode', ['best', 'thesis'])
@pytest.mark.parametrize('system', SYSTEMS)
def test_everything_that_can_learn_does(shards, system, mode):
    "AV 6, FS 1.4, 2.4, 3.2b: the sound embedder was in no optimiser; thousands of rows of P had no gradient; defaults named what no network makes."
    learner = learner_of(small(system, mode), shards)
    parameters = trainable(learner)
    owners = [id(parameter) for optimiser in learner.optimisers.values() for group in optimiser.param_groups for parameter in group['params']]
    assert len(owners) == len(set(owners)) and set(owners) == {id(parameter) for parameter in parameters.values()}, 'each in exactly one group'
    assert 'sound_embedder' in learner.modules or not learner.config.model.hears
    nn.init.constant_(learner.modules['discriminator'].b, 2.0)      # real pictures are beyond their hinge, else b would be pulled both ways alike
    before, gradients = {name: parameter.detach().clone() for name, parameter in parameters.items()}, {}
    with watched(learner) as seen: learner.step(learner.batch(0))
    for own, _, found in seen: gradients |= {name: found[name] for name in own if name not in gradients or gradients[name] is None}
    idle = {name for name in parameters if gradients.get(name) is None or not gradients[name].abs().max() > 0} - asleep(learner)
    still = {name for name, parameter in parameters.items() if torch.equal(parameter, before[name])} - asleep(learner)
    assert not idle | still, f'without gradient {idle}, not moved {still}'
    projection = next(gradient for name, gradient in gradients.items() if name.startswith('generator.projection'))
    columns = projection.abs().sum(0).split([learner.config.model.embedding_size, projection.shape[1] - learner.config.model.embedding_size])
    assert (projection.abs().sum(1) > 0).all(), 'every row of P'
    assert all((part > 0).any() for part in columns if len(part)), 'what is seen and what is heard'


def test_generator_and_discriminator_step_alone(shards):
    "FS 2.1, 1.31, 2.8, AV 38b: one backward for both, W moved by the match loss, gradients left over for the other side."
    learner = learner_of(small(losses=ADVERSARIAL | dict(match=80.0, pixel=1.0), discriminator_steps=2), shards)
    start = {name: parameter.detach().clone() for name, parameter in trainable(learner).items()}
    with watched(learner) as seen: learner.step(learner.batch(0))
    side = lambda names: {name.startswith('discriminator.') for name in names}
    assert [side(own) for own, *_ in seen][0] == {False} and all(len(side(own)) == 1 for own, *_ in seen)
    after = None
    for own, values, gradients in seen:
        if side(own) == {False}:
            for name in start:
                if not name.startswith('discriminator.'): continue
                assert torch.equal(values[name], start[name]) and (gradients[name] is None or not gradients[name].any()), f'{name} in the step of G'
            left = gradients
        else:
            after = after or values
            for name in start:
                if name.startswith('discriminator.'): continue
                assert torch.equal(values[name], after[name]), f'{name} moved in a step of D'
                assert gradients[name] is None or torch.equal(gradients[name], left[name]), f'{name} got a gradient in a step of D'
    assert any(not torch.equal(after[name], start[name]) for name in start)


def test_the_adversarial_gradient_is_there(shards):
    "FS 2.1, AV 38b: -r and 1 + r in one sum cancelled: G got exactly nothing while the hinge was active, and D's first step lost its fake half."
    learner = learner_of(small(losses=dict(adversarial=1.0)), shards)
    with watched(learner) as seen: figures = learner.step(learner.batch(0))
    assert -1 < figures['score_fake'] < 1 and figures['gradient_norm'] > 1e-6
    (own, _, gradients), *rest = seen
    assert all(gradients[name].abs().max() > 0 for name in own if name.endswith('output.weight'))
    judged = next(gradients for own, _, gradients in rest if 'discriminator.w0' in own)
    assert judged['discriminator.b'].abs().max() == 0 and judged['discriminator.w0'].abs().max() > 0, 'real and fake pull at b alike, at w0 not'


def test_feature_matching_is_counted(shards):
    "FS 2.7: the discriminator gave its maps, a weight was configured, and no loss was made of them."
    small_weight, large_weight = (learner_of(small(losses=dict(adversarial=1e-9, feature_matching=weight)), shards) for weight in (1.0, 10.0))
    one, ten = (learner.step(learner.batch(0)) for learner in (small_weight, large_weight))
    assert one['feature_matching'] > 0 and abs(ten['feature_matching'] / one['feature_matching'] - 10) < 1e-3 and one['gradient_norm'] > 1e-6
    from talking_face.networks.losses import feature_matching_loss
    maps = [torch.zeros(1, 2, 4, 4) for _ in range(5)]
    for level in range(5):
        changed = [m + (index == level) for index, m in enumerate(maps)]
        assert feature_matching_loss(maps, changed) == 1, 'of every block'


def test_match_pulls_the_embedding_only(shards):
    "FS 2.8: the loss also moved W_i towards the embedding, so that both could meet at nothing."
    learner = learner_of(small(losses=dict(adversarial=1e-12, match=80.0)), shards)
    with watched(learner) as seen: learner.step(learner.batch(0))
    _, _, gradients = seen[0]
    assert gradients['discriminator.table.rows.weight'] is None or not gradients['discriminator.table.rows.weight'].any()
    assert all(gradient.abs().max() > 1e-6 for name, gradient in gradients.items() if name.startswith('embedder.') and name.endswith('conv2.weight'))


def test_sample_of_a_single_clip(shards):
    "FS 1.21: the preview asked for the second sample of a batch and ended a training whose batch was one."
    learner = learner_of(small(clips=1, targets=1, support=(1,)), shards)
    with torch.no_grad(): assert learner.sample(learner.modules).shape == (4 * 32, 32, 3)


# ---- the table of video vectors ----

def table_of(learner: FewShotLearner) -> tuple[nn.Module, torch.optim.Optimizer]:
    "W and the optimiser that moves it."
    table = learner.modules['discriminator'].table
    owns = lambda optimiser: any(parameter is table.rows.weight for group in optimiser.param_groups for parameter in group['params'])
    return table, next(filter(owns, learner.optimisers.values()))


def test_only_rows_that_were_drawn_move(shards):
    "AV 36, FS 1.12: all videos went through one slot with one state of Adam, so that the moments of other people moved W_i."
    learner = learner_of(small(losses=ADVERSARIAL | dict(pixel=1.0), clips=1), shards)
    table, _ = table_of(learner)
    for step in range(6):
        before, batch = table.rows.weight.detach().clone(), learner.batch(step)
        learner.step(batch)
        moved = (table.rows.weight != before).any(1).nonzero().flatten().tolist()
        assert [table.keys[row] for row in moved] == batch.keys


def test_every_row_has_an_adam_of_its_own(shards):
    "AV 36, FS 1.12: a row that comes late must step as one that came first, and remember its own moments only."
    moves = []
    for waiting in (0, 200):
        table, optimiser = table_of(learner_of(small(), shards))
        def drawn(key: str, factor: float) -> torch.Tensor:
            before = table([key]).detach()
            optimiser.zero_grad(); (factor * table([key])).sum().backward(); optimiser.step()
            return (table([key]) - before).detach()
        for _ in range(waiting): drawn('another', 1000.0)
        moves.append(torch.cat([drawn('two', factor) for factor in (-1.0, -1.0, 2.0)]))
    assert torch.allclose(moves[0], moves[1], rtol=1e-3, atol=1e-8), (moves[0][:, 0] / moves[1][:, 0]).tolist()


def test_video_vectors_are_kept_as_they_are(shards, tmp_path):
    "AV 36, FS 1.11: an activation at every load crushed negative numbers to a hundredth, or to nothing."
    config = small(losses=ADVERSARIAL | dict(pixel=1.0), discriminator_learning_rate=0.05)
    run = meta_learn(config, shards, tmp_path/'run')
    stored, _ = load_tensors(checkpoints(run.path)[-1], 'discriminator.table.rows.')
    table = load_run(run.path).discriminator.table
    assert torch.equal(stored['weight'], table.rows.weight) and torch.equal(table(table.keys), table.rows.weight)
    assert (table.rows.weight < -0.03).any() and (table.rows.weight > 0.03).any(), 'moved, in both directions'


# ---- checkpoints ----

@pytest.fixture(scope='module')
def run(shards, tmp_path_factory) -> Path:
    "Four steps, a checkpoint of each; the last two are kept."
    return meta_learn(small(), shards, tmp_path_factory.mktemp('pitfalls')/'run').path


def content(run: Path) -> dict[str, bytes]: return {path.name: path.read_bytes() for path in sorted((run/'checkpoints').iterdir())}


def test_two_checkpoints_and_nothing_else_are_written(run):
    "AV 36, FS 1.19, 1.20: a file per video at every step, one checkpoint written over itself."
    assert [path.name for path in checkpoints(run)] == ['step-000003.safetensors', 'step-000004.safetensors'] and len(content(run)) == 4
    assert not [path for path in run.rglob('*') if path.suffix in ('.pt', '.pth', '.pkl', '.tar', '.npy')]


def last_byte(path: Path, name: str) -> int:
    "The place of the last byte of a tensor in a safetensors file."
    data = path.read_bytes()
    length, = struct.unpack('<Q', data[:8])
    return 8 + length + json.loads(data[8:8 + length])[name]['data_offsets'][1] - 1


@pytest.mark.parametrize('damage', ['cut', 'one bit of W'])
def test_a_damaged_checkpoint_is_said_and_the_one_before_goes_on(shards, run, tmp_path, damage):
    "AV 17, FS 1.19, 1.20: what could not be read was replaced by random numbers, without a word; a kill while saving lost everything."
    copy = Path(shutil.copytree(run, tmp_path/'run'))
    path = checkpoints(copy)[-1]
    data = bytearray(path.read_bytes())
    if damage == 'cut': del data[len(data) // 2:]
    else: data[last_byte(path, 'discriminator.table.rows.weight')] ^= 0x40      # the sign and the highest bit of an exponent
    path.write_bytes(data)
    for use in (lambda: load_run(copy), lambda: meta_learn(small(), shards, copy, resume=True)):
        with pytest.raises(CheckpointError, match='step-000004.safetensors.*damaged.*before'): use()
    path.unlink(); path.with_suffix('.state.safetensors').unlink()      # what the message says
    meta_learn(small(), shards, copy, resume=True)
    assert content(copy) == content(run)


def test_a_failed_save_leaves_the_checkpoints_before(shards, run, tmp_path, monkeypatch):
    "FS 1.20: the only checkpoint was overwritten in place."
    import safetensors.torch
    original = safetensors.torch.save_file
    def full(tensors, path, metadata=None):
        if 'step-000003' in str(path) and 'state' not in str(path): Path(path).write_bytes(b'half'); raise OSError(28, 'No space left on device')
        original(tensors, path, metadata)
    monkeypatch.setattr(safetensors.torch, 'save_file', full)
    with pytest.raises(TalkingFaceError, match='step-000003'): meta_learn(small(), shards, tmp_path/'run')
    assert [path.name for path in checkpoints(tmp_path/'run')] == ['step-000001.safetensors', 'step-000002.safetensors']
    assert not list((tmp_path/'run').rglob('*partial*'))
    monkeypatch.undo()
    meta_learn(small(), shards, tmp_path/'run', resume=True)
    assert content(tmp_path/'run') == content(run)


def test_a_state_goes_on_with_another_batch(shards, run):
    "AV 9, FS 1.18: W lay in the state as wide as the batch: resuming failed, or was made to work with noise."
    from talking_face.networks.training import Resumable
    from talking_face.runs import RunFolder
    tensors, header = load_tensors(checkpoints(run)[-1])
    state, _ = load_tensors(checkpoints(run)[-1].with_suffix('.state.safetensors'))
    for clips in (1, 3):
        config = small(clips=clips)
        learner = learner_of(config, shards)
        resumed = Resumable(learner, config, RunFolder(run))
        resumed.apply(tensors, state)
        table = learner.modules['discriminator'].table
        assert torch.equal(table.rows.weight, tensors['discriminator.table.rows.weight']) and table.keys == header['keys']
        assert np.isfinite(list(learner.step(learner.batch(9)).values())).all()


# ---- fine-tuning ----

def photos_of(count: int = 3, hears: bool = False) -> Photos:
    sounds = np.random.default_rng(0).random((count, 1, 32, 80), np.float32) if hears else None
    return Photos(images=np.stack([plain(1, number) for number in range(count)]), landmarks=POINTS[:count].astype(np.float32), sounds=sounds)


def tune(**changes) -> FineTuneConfig:
    return FineTuneConfig(**dict(epochs=1, views=1, batch=1, schedule='constant', augment=0.0, ema=0.0, threads=1, device='cpu') | changes)


@pytest.fixture(scope='module')
def models(): return {system: build_model(small(system, mouth_drop=0.0), sorted(CLIPS)) for system in ('few_shot', 'va_slim')}


@pytest.mark.parametrize('system', ['few_shot', 'va_slim'])
def test_fine_tuning_trains_what_makes_the_person(models, system):
    "AV 6, 7, 8, FS 1.4: psi' and w' replaced what the optimisers, built before, went on moving; the sound embedder was in none."
    model, config = models[system], tune()
    tuner = FineTuner(model, photos_of(hears=system != 'few_shot'), config)
    parameters = {**dict(tuner.modules.named_parameters()), **{f'person.{name}': value for name, value in tuner.person.items()}}
    before, chosen = {name: value.detach().clone() for name, value in parameters.items()}, tuner.schedule.chosen(0, config.seed)
    embedding = (before['person.w'] - model.discriminator.w0).detach()
    assert torch.allclose(model.generator.project(embedding[None]), before['person.psi'], atol=1e-5), "psi' = P e and w' = w0 + e at the start"
    nn.init.constant_(tuner.modules['discriminator'].b, 2.0)      # as above
    fine_tuning_step(tuner, tuner.views(chosen, 0), chosen, 0)
    owners = [id(parameter) for optimiser in tuner.optimisers for group in optimiser.param_groups for parameter in group['params']]
    replaced = {'discriminator.w0', 'discriminator.table.rows.weight'}
    assert len(owners) == len(set(owners)) and set(owners) == {id(parameter) for name, parameter in parameters.items() if name not in replaced}
    still = {name for name in parameters if torch.equal(parameters[name], before[name])}
    assert still == replaced
    assert (parameters['person.psi'] != before['person.psi']).float().mean() > 0.9
    assert any(name.startswith('sound.') for name in parameters) == (system != 'few_shot')


@pytest.mark.parametrize('system', ['few_shot', 'va_slim'])
def test_all_of_psi_prime_is_kept(models, system, tmp_path):
    "AV 8, FS 1.5: whoever loaded a fine-tuned person got P e again instead of what had been learned; with sound, at every frame."
    model, photos = models[system], photos_of(hears=system != 'few_shot')
    person, base = fine_tune(model, photos, tune(epochs=2)), feed_forward(model, photos)
    assert not torch.allclose(person.psi, base.psi, atol=1e-3)
    again, points, sounds = load_person(person.save(tmp_path/'person')), POINTS[:2] / 2, None if photos.sounds is None else photos.sounds[:2]
    assert torch.equal(again.psi, person.psi) and np.array_equal(again.animate(points, sounds), person.animate(points, sounds))
    further = fine_tune(model, photos, tune(epochs=0), start=again)
    assert torch.equal(further.psi, person.psi) and torch.equal(further.critic.w, person.critic.w), 'also to go on with'
    if sounds is None: return
    with torch.no_grad():
        heard, silent = (person.sound(torch.from_numpy(given)) for given in (sounds, 0 * sounds))
    assert (heard - silent).abs().max() > 1e-4 and (heard[0] - heard[1]).abs().max() > 1e-5, 'what is heard changes from frame to frame'
    assert np.array_equal(person.animate(points), person.animate(points, 0 * sounds)), 'FS 3.3: None is what the documentation says, silence'


@pytest.mark.parametrize('name', ['pixel', 'structure', 'random_features', 'parts', 'feature_matching', 'adversarial'])
def test_fine_tuning_honours_its_weights(name):
    "FS 1.9, AV 38: fine-tuning took content weights and used the training's."
    figures = []
    for factor in (1.0, 3.0):
        config = small()
        losses = config.losses.replace(**{name: factor * getattr(config.losses, name)})
        model = build_model(config.replace(losses=losses), sorted(CLIPS))
        fine_tune(model, photos_of(), tune(epochs=1, batch=3), log=lambda step, values: figures.append(values))
    assert abs(figures[1][name] / figures[0][name] - 3) < 1e-3 and 'match' not in figures[0]


def test_fine_tuning_decodes_and_detects_nothing(models, monkeypatch):
    "AV 45, FS 1.28: every step read the whole film again, and looked for the face again, to take one frame."
    import av, cv2
    def refused(*_, **__): raise AssertionError('decoded in fine-tuning')
    for module, name in ((cv2, 'imdecode'), (cv2, 'imread'), (av, 'open')): monkeypatch.setattr(module, name, refused)
    steps = []
    fine_tune(models['few_shot'], photos_of(), tune(epochs=4), log=lambda step, _: steps.append(step))
    assert steps == list(range(1, 13)), 'an epoch is a pass over the T photos'


def test_each_photo_is_seen_equally_often(models):
    "AV 14, 45: T said how many photos there were, and the steps saw others."
    tuner = FineTuner(models['few_shot'], photos_of(3), tune(epochs=4, batch=2))
    seen = np.bincount(np.concatenate([tuner.schedule.chosen(step, 0) for step in range(tuner.schedule.steps)]), minlength=3)
    assert seen.tolist() == [4, 4, 4]


def test_numbers_that_are_not_finite_are_an_error():
    "AV 37, FS 1.22: the process ended in a forward pass, with status 0 and without a message."
    model = build_model(small(), sorted(CLIPS))
    nn.init.constant_(model.generator.output.bias, float('nan'))
    with pytest.raises(TrainingAlarm, match='finite'): fine_tune(model, photos_of(), tune())
