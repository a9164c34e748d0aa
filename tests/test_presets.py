"The larger presets make a real training step: every parameter moves, and what they need beside data is asked for by name."
import copy
from pathlib import Path

import pytest
import torch

from talking_face.config import PRESETS, PreprocessConfig, preset
from talking_face.core import WeightsUnavailable
from talking_face.data.preprocessing import preprocess
from talking_face.few_shot.meta_learning import FewShotLearner, make_sampler, meta_learn

CLIPS = Path(__file__).parent.parent/'data/embedded/clips'

@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp('presets')/'shards'
    preprocess([CLIPS/'syn01'], folder, PreprocessConfig(size=256, detector='dlib'))
    return folder

def one_step(config, shards):
    torch.set_num_threads(1)
    learner = FewShotLearner(config, make_sampler(config.replace(clips=1, support=(1,), augment=0.0, targets=config.targets if config.losses.sync else 1), shards))
    before = {name: copy.deepcopy(module.state_dict()) for name, module in learner.modules.items()}
    figures = learner.step(learner.batch(0))
    still = {f'{name}.{key}' for name, module in learner.modules.items() for key, parameter in module.named_parameters()
             if torch.equal(parameter, before[name][key])}
    return figures, still

def against_a_discriminator(config):
    "The same training with the losses that need a discriminator, gently weighted."
    return config.replace(losses=config.losses.replace(adversarial=0.03, feature_matching=0.3, match=0.03))

def test_small_makes_a_step(shards):
    figures, still = one_step(PRESETS['small'].replace(warmup_steps=0), shards)
    assert {'pixel', 'structure', 'parts', 'face', 'random_features'} <= figures.keys() and 'discriminator' not in figures and not still, still

def test_small_makes_a_step_against_a_discriminator(shards):
    figures, still = one_step(against_a_discriminator(PRESETS['small'].replace(warmup_steps=0)), shards)
    assert {'pixel', 'structure', 'parts', 'face', 'adversarial', 'feature_matching', 'match', 'discriminator'} <= figures.keys()
    assert still <= {'discriminator.b'}, still  # while both hinges are active its two gradients cancel

def test_paper_makes_a_step_at_256_pixels(shards):
    paper = PRESETS['paper']
    figures, still = one_step(paper.replace(losses=paper.losses.replace(vgg19=0.0, vggface=0.0, pixel=1.0)), shards)
    assert {'adversarial', 'feature_matching', 'match', 'score_real', 'discriminator'} <= figures.keys()
    # behind an attention whose gamma starts at 0 nothing can move in the first step
    assert {name for name in still if 'attention' not in name and name != 'discriminator.b'} == set(), still
    assert {name for name in still if name.endswith('gamma')} == set()

@pytest.mark.parametrize('system', ['va', 'va_match', 'va_sync'])
def test_small_systems_that_hear_make_a_step(shards, system):
    figures, still = one_step(against_a_discriminator(preset('small', system, warmup_steps=0, sync_start=0.0)), shards)
    assert {'face', 'adversarial', 'match'} <= figures.keys() and still <= {'discriminator.b', 'scorer.sharpness'}, still
    assert {'va_match': {'sound_match', 'sound_table'}, 'va_sync': {'sync', 'scorer'}}.get(system, set()) <= figures.keys()

@pytest.mark.parametrize('system', ['few_shot', 'va_match'])
def test_the_published_mode_makes_a_step(shards, system):
    "At the tiny size, with the offline face network for the VGG networks."
    figures, still = one_step(preset('tiny', system, 'thesis'), shards)
    assert {'face', 'adversarial', 'feature_matching', 'match', 'discriminator'} <= figures.keys()
    assert {name for name in still if 'attention' not in name and name != 'discriminator.b'} == set(), still

def test_paper_asks_for_its_weights_before_it_makes_a_folder(shards, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'empty'))
    with pytest.raises(WeightsUnavailable, match='vgg19'): meta_learn(PRESETS['paper'], shards, tmp_path/'run')
    assert not (tmp_path/'run').exists()
