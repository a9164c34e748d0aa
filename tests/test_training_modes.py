"""The same step in many ways: parts of a batch, memory saved, other orders and precisions; and what each term moves. Networks are tiny, steps few."""
import hashlib, json, os, shutil

import pytest
import torch

from talking_face.config import MetaLearningConfig, preset
from talking_face.core import ConfigError, TrainingAlarm
from talking_face.few_shot.episode_objectives import autocast, has_bf16, split_batch
from talking_face.few_shot.meta_learning import GENERATOR_SIDE, FewShotLearner, few_shot_optimisers, load_run, make_sampler, meta_learn
from talking_face.networks.training import Alarm, checkpoints, load_tensors, save_tensors

SHAPES = dict(image_size=32, generator_downs=2, generator_residuals=1, embedding_size=16, embedder_width=4, generator_width=4, generator_last=4, discriminator_width=4,
              sound_size=8, sound_width=4)
GAN = dict(adversarial=.5, feature_matching=5., match=1.)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def micro(system: str = 'few_shot', losses: dict = GAN, **changes: object) -> MetaLearningConfig:
    "A config whose step takes milliseconds, with every term but those of sound; spectral norm everywhere, so that power iterations count."
    config = preset('tiny', system)
    config = config.replace(model=config.model.replace(**SHAPES, spectral_norm=True), losses=config.losses.replace(**losses))
    return config.replace(**dict(precision='fp32', clips=4, support=(2,), targets=max(config.targets if config.losses.sync else 1, 2), log_every=1, sample_every=0, threads=1) | changes)


def make(config: MetaLearningConfig, workshop) -> FewShotLearner:
    return FewShotLearner(config, make_sampler(config, workshop.shards))


def state(learner: FewShotLearner) -> dict[str, torch.Tensor]:
    return {f'{name}.{key}': value.detach().clone() for name, module in learner.modules.items() for key, value in module.state_dict().items()}


def gradients(learner: FewShotLearner) -> dict[str, torch.Tensor]:
    "What is left in .grad after a step: the last descent of every group."
    return {f'{name}.{key}': parameter.grad.detach().to_dense().clone() for name, module in learner.modules.items()
            for key, parameter in module.named_parameters() if parameter.grad is not None}


def after_step(config: MetaLearningConfig, workshop, steps: int = 1) -> tuple[dict, dict, dict]:
    learner = make(config, workshop)
    for number in range(steps): figures = learner.step(learner.batch(number), number)
    return gradients(learner), {name: float(value) for name, value in figures.items()}, state(learner)


def assert_close(mine: dict, theirs: dict, tolerance: float) -> None:
    "Every tensor agrees to `tolerance` of the largest entry it has in `theirs`, and of 1e-3 where that is smaller."
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        if not torch.is_tensor(value): value, found = torch.tensor(value), torch.tensor(mine[name])
        else: found = mine[name]
        if value.dtype == torch.uint8: assert torch.equal(found, value); continue
        assert (found - value).abs().max() <= tolerance * max(value.abs().max().item(), 1e-3), name


PLAIN = {}    # the plain step of a system, computed once


def plain(workshop, system: str = 'few_shot', **changes: object) -> tuple[dict, dict, dict]:
    key = system, *changes
    if key not in PLAIN: PLAIN[key] = after_step(micro(system, **changes), workshop)
    return PLAIN[key]


# ---- the same step ----

PENALTY = GAN | dict(gradient_penalty=1.)


@pytest.mark.parametrize('parts', [2, 3])
@pytest.mark.parametrize('system', ['few_shot', 'va_sync'])
def test_parts_of_a_batch_make_the_step_of_the_whole(workshop, system, parts):
    "Uneven parts too; with spectral normalisation, feature matching, gradient penalty, tables, and the losses of sound."
    losses = PENALTY | (dict(sound_match=1.) if system != 'few_shot' else {})
    changes = dict(losses=losses, sync_start=0.)
    reference, figures, _ = plain(workshop, system, **changes)
    mine, seen, _ = after_step(micro(system, **changes, accumulate=parts), workshop)
    assert {'gradient_penalty', 'match'} <= seen.keys() and (system == 'few_shot' or {'sync', 'sound_match', 'scorer', 'sound_table'} <= seen.keys())
    assert_close(mine, reference, 1e-3)     # the discriminator's second descent starts from weights that Adam has moved
    assert_close({name: seen[name] for name in figures if name != 'adversarial_gradient'}, {name: value for name, value in figures.items() if name != 'adversarial_gradient'}, 1e-4)


def test_a_wrong_weight_of_parts_would_be_seen(workshop):
    "One third each, for parts of one, one and two episodes, is another gradient: the test above can fail."
    config = micro()
    learner, reference = make(config, workshop), plain(workshop)[0]
    parts = split_batch(learner.batch(0), 3)
    assert [len(part.keys) for part in parts] == [1, 1, 2]
    learner.weighted = lambda cut, *names, only=None: ((part, 1 / len(cut)) for part in cut)
    learner.update_generator(parts, 0)
    with pytest.raises(AssertionError): assert_close(gradients(learner), {name: value for name, value in reference.items() if name.startswith(GENERATOR_SIDE)}, 1e-3)


def test_more_parts_than_episodes_are_refused(workshop):
    with pytest.raises(ConfigError, match='accumulate = 5'): after_step(micro(accumulate=5), workshop)


def test_checkpointing_changes_no_bit(workshop):
    "Power iterations, frozen networks and two backward passes through one graph (the measured gradient, the penalty) included."
    changes = dict(losses=PENALTY, gradient_penalty_every=1)
    reference, figures, weights = plain(workshop, **changes)
    mine, seen, after = after_step(micro(**changes, checkpointing=True), workshop)
    assert_close(mine, reference, 1e-6)
    assert_close(after, weights, 1e-6)
    assert_close(seen, figures, 1e-6)


def test_memory_order_changes_rounding_only(workshop):
    mine, seen, _ = after_step(micro(channels_last=False), workshop)
    assert_close(mine, plain(workshop)[0], 1e-3)
    learner = make(micro(channels_last=False), workshop)
    assert all(parameter.is_contiguous() for module in learner.modules.values() for parameter in module.parameters())


@pytest.mark.skipif(not has_bf16('cpu'), reason='this processor has no bfloat16 arithmetic')
def test_bfloat16_is_close_and_keeps_what_must_be_float32(workshop):
    config = micro(precision='bf16')
    reference, figures, _ = plain(workshop)
    mine, seen, _ = after_step(config, workshop)
    assert all(value.dtype == torch.float32 for value in mine.values())
    for name in ('pixel', 'structure', 'parts', 'feature_matching', 'match', 'discriminator'): assert abs(seen[name] - figures[name]) < .03 * abs(figures[name]) + 1e-3, name
    side = [torch.cat([grads[name].flatten() for name in sorted(grads) if name.startswith('generator.')]) for grads in (mine, reference)]
    assert torch.cosine_similarity(*side, dim=0) > .97
    learner = make(config, workshop)
    with autocast(learner.device, 'bf16'):
        batch = learner.batch(0)
        output = learner.draw_episode(batch)
        scores = learner.modules['discriminator'](output.images, batch.target_drawings, learner.modules['discriminator'].video_vectors(batch.keys).repeat_interleave(batch.targets, 0)).scores
    assert {output.embedding.dtype, output.psi.dtype, output.images.dtype, scores.dtype} == {torch.float32}


# ---- who moves, and when ----

@pytest.mark.parametrize('system', ['va_match', 'va_sync', 'va'])
def test_every_parameter_of_a_system_that_hears_moves(workshop, system):
    "The sound embedder above all: in one published code no optimiser had it."
    learner = make(micro(system, sync_start=0.), workshop)
    before = state(learner)
    learner.step(learner.batch(0))
    after = state(learner)
    names = {f'{name}.{key}' for name, module in learner.modules.items() for key, _ in module.named_parameters()}
    still = {name for name in names if torch.equal(before[name], after[name])}
    assert not still - {'discriminator.b', 'scorer.sharpness'}, still
    assert any(name.startswith('sound_embedder.') for name in names)


def test_a_network_without_an_optimiser_is_an_error(workshop):
    config = micro('va_match')
    learner = make(config, workshop)
    learner.modules['another'] = torch.nn.Linear(2, 2)
    with pytest.raises(AssertionError, match='another.weight is in 0 optimisers'): few_shot_optimisers(learner.modules, config)


def test_the_discriminator_begins_when_it_should(workshop):
    config = micro(steps=10, adversarial_start=.3)
    learner = make(config, workshop)
    before = state(learner)
    seen = [learner.step(learner.batch(number), number).keys() for number in (0, 2)]
    assert all('adversarial' not in names and 'discriminator' not in names for names in seen)
    assert all(torch.equal(value, before[name]) for name, value in state(learner).items() if name.startswith('discriminator.'))
    assert {'adversarial', 'discriminator', 'match'} <= learner.step(learner.batch(3), 3).keys()


def test_the_sync_loss_begins_after_its_scorer(workshop):
    learner = make(micro('va_sync', steps=10, sync_start=.2), workshop)
    assert ['sync' in learner.step(learner.batch(number), number) for number in (0, 1, 2)] == [False, False, True]
    assert 'scorer' in learner.step(learner.batch(0), 0)


def test_lazy_penalty_comes_every_so_many_updates_and_weighs_as_many(workshop):
    config = micro(losses=PENALTY, gradient_penalty_every=3)
    learner = make(config, workshop)
    assert ['gradient_penalty' in learner.step(learner.batch(number), number) for number in range(4)] == [True, True, False, True]   # of updates 0 .. 7: 0, 3, 6
    once, thrice = (make(micro(losses=PENALTY, gradient_penalty_every=every), workshop) for every in (1, 3))
    values = [one._judge(torch.zeros_like(one.batch(0).target_images), one.batch(0), True)['gradient_penalty'].item() for one in (once, thrice)]
    assert values[0] > 0 and abs(values[1] - 3 * values[0]) < 1e-5 * values[1]


def test_discriminator_steps_and_clipping(workshop):
    few, many = (make(micro(discriminator_steps=count), workshop) for count in (1, 3))
    for learner in (few, many): learner.step(learner.batch(0), 0)
    count = lambda learner: int(next(iter(learner.optimisers['discriminator'].state.values()))['step'])
    assert (count(few), count(many)) == (1, 3)
    free, clipped = (make(micro(clip_norm=norm), workshop) for norm in (0., 1e-3))
    norms = [float(learner.update_generator([learner.batch(0)], 0)[1]['gradient_norm']) for learner in (free, clipped)]
    assert abs(norms[0] - norms[1]) < 1e-4 * norms[0] and norms[0] > 1e-3
    left = [torch.stack([parameter.grad.norm() for parameter in learner.parameters]).norm().item() for learner in (free, clipped)]
    assert abs(left[0] - norms[0]) < 1e-4 * norms[0] and abs(left[1] - 1e-3) < 1e-5


def test_support_size_varies_and_the_feed_forward_variant_has_no_match(workshop):
    learner = make(micro(support=(1, 2, 4)), workshop)
    assert {learner.batch(number).support for number in range(12)} == {1, 2, 4}
    paper = preset('paper', variant='ff')
    assert paper.losses.match == 0 and paper.losses.adversarial > 0 and paper.steps == 2 * preset('paper').steps
    learner = make(micro(losses=GAN | dict(match=0.)), workshop)
    figures = learner.step(learner.batch(0), 0)
    assert 'match' not in figures and {'adversarial', 'feature_matching'} <= figures.keys()


def test_compiled_networks_make_the_same_step(workshop):
    "Off by default: a compiler needs minutes here. TALKING_FACE_TEST_COMPILE=1 runs it."
    if not os.environ.get('TALKING_FACE_TEST_COMPILE'): pytest.skip('compiling takes minutes; set TALKING_FACE_TEST_COMPILE=1 to run it')
    if not any(map(shutil.which, ('g++', 'c++', 'clang++'))): pytest.skip('torch.compile needs a C++ compiler')
    changes = dict(clips=1, losses=PENALTY)
    mine, seen, _ = after_step(micro(**changes, compile=True), workshop)
    assert_close(mine, plain(workshop, **changes)[0], 1e-3)


# ---- the alarm on a real system ----

def test_the_alarm_is_silent_on_a_normal_run_and_says_what_is_wrong(workshop, tmp_path, monkeypatch):
    config = micro(steps=12, clips=2)
    monkeypatch.setattr(Alarm, 'signs', {name: (test, 3, words) for name, (test, _, words) in Alarm.signs.items()})     # three reports, not 200
    run = meta_learn(config, workshop.shards, tmp_path/'run', callback=lambda *_: None)
    rows = run.events('step')
    assert len(rows) == 12 and all(row['adversarial_gradient'] > 1e-9 and 1 <= row['video_rows'] <= 2 for row in rows)

    def dead_score(discriminator): discriminator.w0.data.zero_(); discriminator.table.rows.weight.data.zero_()
    def one_colour(generator): generator.output.bias.data[:] = torch.tensor([30., -30, -30])     # red
    cases = {'gives no gradient at the generator\'s pictures': lambda learner: dead_score(learner.modules['discriminator']),
             'of one colour': lambda learner: one_colour(learner.modules['generator'])}
    for words, spoil in cases.items():
        original = FewShotLearner.step
        def step(learner, batch, number): spoil(learner); return original(learner, batch, number)
        monkeypatch.setattr(FewShotLearner, 'step', step)
        with pytest.raises(TrainingAlarm, match=words): meta_learn(micro(steps=12, clips=2, losses=GAN), workshop.shards, tmp_path/words[:4], callback=lambda *_: None)
        monkeypatch.setattr(FewShotLearner, 'step', original)


# ---- runs of yesterday ----

OLD_TENSORS = '0b4e072b61278f11fca5f958d349b9884c106c0ef64da5837acefbe3cd7d4ea3'     # of a run made before there were systems: hash of names and shapes
OLD_OPTIONS = ('preset model losses steps seed clips targets support augment learning_rate discriminator_learning_rate discriminator_steps beta1 beta2 warmup_steps '
               'schedule clip_norm ema precision workers threads device log_every sample_every checkpoint_every keep_checkpoints').split()
OLD_MODEL = ('image_size palette embedding_size embedder_width pooling generator_width generator_downs generator_residuals generator_last landmark_pyramid '
             'discriminator_width spectral_norm attention maximum_channels').split()
OLD_LOSSES = 'pixel structure random_features parts face vgg19 vggface adversarial feature_matching match vgg19_path vggface_path'.split()


def old_names(tensors: dict[str, torch.Tensor]) -> str:
    "SHA-256 of names and shapes, without the table, which depends on the clips."
    rows = sorted((name, list(tensor.shape)) for name, tensor in tensors.items() if not name.startswith('discriminator.table'))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def test_a_run_from_before_the_systems_still_loads(workshop, tmp_path):
    "Its header knows nothing of systems, sound and parts; its tensors are those of the networks as they always were."
    run = shutil.copytree(workshop.micro, tmp_path/'run')
    path = checkpoints(run)[-1]
    tensors, header = load_tensors(path)
    assert old_names(tensors) == OLD_TENSORS
    config = {name: value for name, value in header['config'].items() if name in OLD_OPTIONS}
    config['model'] = {name: value for name, value in config['model'].items() if name in OLD_MODEL}
    config['losses'] = {name: value for name, value in config['losses'].items() if name in OLD_LOSSES}
    header = {name: value for name, value in header.items() if name not in ('format', 'version')} | dict(config=config)
    for old in (run/'checkpoints').iterdir(): old.unlink()
    save_tensors(path, tensors, header)
    model = load_run(run)
    assert model.sound_embedder is None and model.config.system == 'few_shot' and model.config.accumulate == 1
    assert torch.equal(model.generator.output.weight, tensors['average.generator.output.weight'])
