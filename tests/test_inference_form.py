"The generator's form for inference: the same pictures as the trained form, everywhere, for everybody, in every style."

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from talking_face.config import ModelConfig, preset
from talking_face.core import ConfigError, frames_to_tensor
from talking_face.few_shot.generator import Generator
from talking_face.few_shot.generator_inference import (FoldedConvolution, InferenceGenerator, attention_in_blocks, can_pack, channel_statistics, compile_form,
                                                       enlarging_kernel, fused_adain, pooled_kernel)
from talking_face.networks.normalisation import InstanceNorm, adain, fold_spectral_norm
from talking_face.signals.drawing import draw_landmarks

from helpers import clip


def random_generator(config: ModelConfig, seed: int = 0) -> Generator:
    "Nothing at a neutral value: norms, biases and gamma are random."
    torch.manual_seed(seed)
    generator = Generator(config).eval()
    for part in generator.modules():
        if isinstance(part, InstanceNorm): nn.init.normal_(part.psi, std=.3)
        if isinstance(part, nn.Conv2d) and part.bias is not None: nn.init.normal_(part.bias, std=.2)
        if hasattr(part, 'gamma'): nn.init.uniform_(part.gamma, .2, .8)
    return generator


def random_psi(generator: Generator, count: int) -> Tensor:
    "Scales around 1 whatever the style."
    return torch.randn(count, generator.psi_size) * .3 + (1 - generator.style.neutral_scale)


def faces(config: ModelConfig, count: int) -> Tensor:
    "Drawings of a real track, mostly black, and one of noise, whose borders are not black at all."
    points = np.load(clip('syn01').with_suffix('.npz'))['landmarks'][:count] * (config.image_size / 256)
    drawings = frames_to_tensor(draw_landmarks(points.astype(np.float32), config.image_size, config.palette))
    drawings[-1] = torch.rand_like(drawings[-1]) * 2 - 1
    return drawings


def forms() -> dict[str, ModelConfig]:
    tiny, small, paper = (preset(name).model for name in ('tiny', 'small', 'paper'))
    thesis = preset('paper', mode='thesis').model
    return {'tiny': tiny, 'small': small, 'published tiny': preset('tiny', mode='thesis').model,
            'paper, a quarter as wide': paper.replace(generator_width=16, generator_last=8), 'published paper, a quarter as wide': thesis.replace(generator_width=16, generator_last=8),
            'pyramid in the published style': thesis.replace(image_size=64, generator_width=8, attention=False, landmark_pyramid=True)}


@pytest.mark.parametrize('name', list(forms()))
def test_same_pictures_as_the_trained_form(name):
    config = forms()[name]
    generator = random_generator(config)
    count = 5 if config.image_size <= 64 else 2
    drawings, psi = faces(config, count), random_psi(generator, count)
    anybody, somebody = InferenceGenerator(generator), InferenceGenerator(generator, psi[:1])
    with torch.no_grad():
        wanted, of_one = generator(drawings, psi), generator(drawings, psi[:1].expand(count, -1))
        assert wanted.std() > .02 and (wanted - of_one).abs().mean() > 1e-3                    # not grey, and persons differ
        made = anybody(drawings, psi)
        assert (made - wanted).abs().max() < 1e-4 and made.dtype == torch.float32
        assert (somebody(drawings) - of_one).abs().max() < 1e-4
        assert (anybody(drawings[:1], psi[:1]) - wanted[:1]).abs().max() < 1e-4                # alone as in a batch
        border = torch.ones_like(wanted, dtype=torch.bool); border[:, :, 2:-2, 2:-2] = False
        assert (made - wanted)[border].abs().max() < 1e-4


def test_full_paper_size_on_a_real_drawing():
    "Most of it is black: where a channel is one number, sums of 65,536 floats are wrong in the third digit, and the pictures were, in the second."
    config = preset('paper').model
    generator = fold_spectral_norm(random_generator(config))
    drawing, psi = faces(config, 2)[:1], random_psi(generator, 1)
    with torch.no_grad(): assert (InferenceGenerator(generator, psi)(drawing) - generator(drawing, psi)).abs().max() < 2e-4   # measured 9e-5; 4e-5 is the trained form's own rounding


@pytest.mark.parametrize('name', ['tiny', 'small'])
def test_half_precision_is_near(name):
    config = preset(name).model
    generator = random_generator(config)
    drawings, psi = faces(config, 3), random_psi(generator, 1)
    form = InferenceGenerator(generator, psi)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16): half = form(drawings)
    assert half.dtype == torch.float32 and 0 < (half - form(drawings)).abs().mean() / 2 < 1 / 255


def test_form_is_a_copy_and_changes_nothing():
    generator = random_generator(preset('tiny').model)
    drawings, psi = faces(generator.config, 2), random_psi(generator, 2)
    form, given, state = InferenceGenerator(generator, psi[:1]), drawings.clone(), copy.deepcopy(generator.state_dict())
    first = form(drawings)
    assert torch.equal(drawings, given) and all(torch.equal(value, state[name]) for name, value in generator.state_dict().items())
    with torch.no_grad():
        for parameter in generator.parameters(): parameter.add_(1)
    psi.add_(1)
    assert torch.equal(form(drawings), first) and torch.equal(copy.deepcopy(form)(drawings), first)
    assert not any(value.requires_grad for value in (*form.parameters(), *form.buffers())) and not first.requires_grad


def test_training_mode_and_live_spectral_norm_do_not_matter():
    config = preset('tiny').model.replace(spectral_norm=True)
    generator = random_generator(config)
    drawings, psi = faces(config, 2), random_psi(generator, 2)
    with torch.no_grad(): wanted = generator(drawings, psi)
    vectors = {name: value.clone() for name, value in generator.state_dict().items() if name.endswith(('_u', '_v'))}
    assert (InferenceGenerator(generator.train())(drawings, psi) - wanted).abs().max() < 1e-4 and generator.training
    assert vectors and all(torch.equal(generator.state_dict()[name], value) for name, value in vectors.items())


def test_a_psi_in_the_call_comes_before_the_folded_one():
    generator = random_generator(preset('tiny', 'va_slim').model)
    drawings, psi = faces(generator.config, 3), random_psi(generator, 3)
    folded, free = InferenceGenerator(generator, psi[:1]), InferenceGenerator(generator)
    assert torch.equal(folded(drawings, psi), free(drawings, psi))
    with pytest.raises(ValueError, match='psi'): free(drawings)
    with pytest.raises(ValueError, match='axis 0'): free(drawings, psi[:2])
    with pytest.raises(ValueError, match='axis 1'): InferenceGenerator(generator, psi[:1, :-1])


@pytest.mark.parametrize('packed', [True, False])
def test_kernels_where_the_library_cannot_be_prepared(packed, monkeypatch):
    "On other processors, and in other builds of torch, the plain convolutions give the same."
    if not packed: monkeypatch.setattr('talking_face.few_shot.generator_inference.can_pack', lambda dtype: False)
    generator = random_generator(preset('tiny').model.replace(attention=True, generator_downs=2))
    drawings, psi = faces(generator.config, 3), random_psi(generator, 3)
    with torch.no_grad(): assert (InferenceGenerator(generator)(drawings, psi) - generator(drawings, psi)).abs().max() < 1e-4
    assert isinstance(can_pack(torch.float32), bool) and not can_pack(torch.float64)


def test_statistics_of_what_is_mostly_one_number():
    x = torch.full((1, 8, 256, 256), .1); x[:, :, 100:110, 60:200] += torch.randn(1, 8, 10, 140)
    x = x.contiguous(memory_format=torch.channels_last)
    mean, variance = channel_statistics(x)
    wanted = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert torch.allclose(mean.double(), wanted[1], rtol=1e-5) and torch.allclose(variance.double(), wanted[0], rtol=1e-5)
    psi = torch.randn(1, 16); delta, shift = psi.chunk(2, 1)
    assert torch.allclose(fused_adain(x, 1 + delta, shift, 1.0), adain(x, psi), atol=2e-5)


def test_attention_with_large_scores_and_odd_blocks():
    query, key, value = 30 * torch.randn(300, 8), torch.randn(300, 8), torch.randn(300, 24)
    wanted = (query.double() @ key.double().T).softmax(-1) @ value.double()
    for block in (1, 77, 1000): assert torch.allclose(attention_in_blocks(query, key, value, block).double(), wanted, atol=1e-4)


def test_operations_are_those_of_the_layers():
    layer = FoldedConvolution(pooled_kernel(torch.ones(5, 3, 3, 3)), None, 16, stride=2, padding=1)
    assert layer.operations == 2 * 5 * 3 * 16 * 8 * 8
    layer = FoldedConvolution(enlarging_kernel(torch.ones(5, 3, 3, 3)), None, 16, stride=2, padding=1, transposed=True)
    assert layer.operations == 2 * 5 * 3 * 4 * 32 * 32                                          # four products for each of 32 x 32 places
    with torch.device('meta'): paper = InferenceGenerator(fold_spectral_norm(Generator(preset('paper').model.replace(spectral_norm=False))))
    assert 42e9 < paper.operations < 45e9                                                       # 60 as trained, 102 as published


def test_compiled_form():
    "One small form, compiled for real where there is a compiler, and refused in our words where there is none."
    config = preset('tiny').model.replace(image_size=32, generator_downs=1, generator_residuals=0, generator_width=8, generator_last=8)
    generator = random_generator(config)
    psi, drawings = random_psi(generator, 1), torch.rand(2, 3, 32, 32) * 2 - 1
    form = InferenceGenerator(generator, psi)
    wanted = form(drawings)
    try: compiled = compile_form(form, batch=2)
    except ConfigError as error:
        assert 'compiler' in str(error)
        pytest.skip('no compiler here')
    assert (compiled(drawings) - wanted).abs().max() < 1e-4
