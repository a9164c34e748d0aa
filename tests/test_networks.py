"""Layers, embedder, generator and discriminator: what does not fit in their notebooks (fuzzing, whole-network properties, the paper's sizes)."""
import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize

from talking_face.config import PRESETS, ModelConfig, preset
from talking_face.core import ConfigError, DataError
from talking_face.few_shot.discriminator import Discriminator, VideoTable
from talking_face.few_shot.embedders import Embedder, Trunk
from talking_face.few_shot.generator import Generator
from talking_face.networks.layers import AdaptiveUpBlock, DownBlock, SelfAttention, convolution, run_block, set_checkpointing
from talking_face.networks.normalisation import adain, fold_spectral_norm, frozen, settle_spectral_norm, with_spectral_norm

MICRO = ModelConfig(image_size=32, embedding_size=16, embedder_width=4, generator_width=4, generator_downs=2, generator_residuals=1, generator_last=4,
                    discriminator_width=4)
FULL = MICRO.replace(image_size=64, spectral_norm=True, attention=True)  # every option of the architecture on
LAYOUTS = (torch.contiguous_format, torch.channels_last)


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def paper():
    "The three networks in the paper's size."
    model = PRESETS['paper'].model
    return Embedder(model), Generator(model), Discriminator(model, ['a', 'b'])


def textbook(x, psi):
    "AdaIN word for word, differentiated by autograd."
    delta, shift = psi[:, :, None, None].chunk(2, 1)
    return (1 + delta) * (x - x.mean((2, 3), keepdim=True)) / torch.sqrt(x.var((2, 3), correction=0, keepdim=True) + 1e-5) + shift


def count(module): return sum(parameter.numel() for parameter in module.parameters())


def pictures(config, rows):
    return [torch.randn(rows, 3, config.image_size, config.image_size) for _ in range(2)]


def open_attention(module):
    "Set every gamma to 0.5: at its start of zero the rest of an attention layer has no gradient."
    for part in module.modules():
        if isinstance(part, SelfAttention): nn.init.constant_(part.gamma, 0.5)
    return module


def without_gradient(module):
    return [name for name, parameter in module.named_parameters() if parameter.grad is None or not parameter.grad.to_dense().abs().max() > 0]


def normalised_layers(module):
    return [layer for layer in module.modules() if parametrize.is_parametrized(layer, 'weight')]


def sigma(layer):
    "Largest singular value of the weight as it is used, without making a power iteration."
    layer.parametrizations.weight.eval()
    matrix = layer.weight.detach().flatten(1).double()
    if matrix.shape[0] > matrix.shape[1]: matrix = matrix.T
    value = torch.linalg.eigvalsh(matrix @ matrix.T)[-1].sqrt().item()  # a full decomposition takes 20 s for the paper's layers
    layer.parametrizations.weight.train()
    return value


# ---- AdaIN ----

@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('shape', [(1, 1, 1, 2), (2, 1, 3, 4), (3, 5, 1, 7), (1, 7, 4, 1), (4, 2, 1, 1), (2, 6, 5, 3)])
def test_adain_equals_the_textbook_and_its_gradient(shape, layout):
    x = (torch.randn(shape, dtype=torch.float64) * 3 + 5).contiguous(memory_format=layout).requires_grad_()
    psi = torch.randn(shape[0], 2 * shape[1], dtype=torch.float64, requires_grad=True)
    ours, wanted = adain(x, psi), textbook(x, psi)
    assert torch.allclose(ours, wanted, atol=1e-10) and ours.stride() == x.stride()
    direction = torch.randn(shape, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(ours, (x, psi), direction), torch.autograd.grad(wanted, (x, psi), direction)):
        assert torch.allclose(a, b, atol=1e-7, rtol=1e-7)
    assert torch.autograd.gradcheck(adain, (x, psi), atol=1e-5)


@pytest.mark.parametrize('make', [lambda x: x[:, ::2], lambda x: x[..., 1:-1, ::2], lambda x: x.transpose(2, 3), lambda x: x[:1].expand(3, -1, -1, -1),
                                  lambda x: x.flip(3), lambda x: x.permute(1, 0, 3, 2)])
def test_adain_takes_any_strides(make):
    base = torch.randn(4, 4, 6, 6, dtype=torch.float64)
    for layout in LAYOUTS:
        x = make(base.contiguous(memory_format=layout)).requires_grad_()
        psi = torch.randn(x.shape[0], 2 * x.shape[1], dtype=torch.float64, requires_grad=True)
        direction = make(torch.randn_like(base))  # a gradient with strides of its own
        assert torch.allclose(adain(x, psi), textbook(x, psi), atol=1e-10)
        for a, b in zip(torch.autograd.grad(adain(x, psi), (x, psi), direction), torch.autograd.grad(textbook(x, psi), (x, psi), direction)):
            assert torch.allclose(a, b, atol=1e-9)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('offset', [0, 10.3, 200.45])  # the last: its rounded mean is off by almost half a step
def test_adain_in_half_precision(layout, offset):
    x = (torch.randn(4, 16, 16, 16) + offset).bfloat16().contiguous(memory_format=layout).requires_grad_()
    exact = x.detach().double().requires_grad_()
    psi = (0.3 * torch.randn(4, 32)).requires_grad_()
    wide = psi.detach().double().requires_grad_()
    direction = torch.randn(4, 16, 16, 16).bfloat16()
    ours, wanted = adain(x, psi), textbook(exact, wide)
    assert ours.dtype == torch.bfloat16 and ours.is_contiguous(memory_format=layout)
    assert (ours - wanted).abs().max() < 0.05 and (ours - wanted).abs().mean() < 4e-3  # bf16 keeps 8 bits: 2^-8 of values up to about 5
    for a, b in zip(torch.autograd.grad(ours, (x, psi), direction), torch.autograd.grad(wanted, (exact, wide), direction.double())):
        assert (a - b).norm() / b.norm() < 0.01
    assert psi.dtype == torch.float32


def test_adain_of_a_flat_channel_is_its_shift():
    for value in (0.0, 1.0, 37.7, -1e4):
        for kind in (torch.float32, torch.bfloat16):
            x = torch.full((1, 2, 8, 8), value, dtype=kind, requires_grad=True)
            psi = torch.tensor([[0.5, -0.5, 2.0, -3.0]], requires_grad=True)
            out = adain(x, psi)
            assert torch.allclose(out[0, :, 0, 0].float(), torch.tensor([2.0, -3.0]), atol=2e-2 if abs(value) > 100 else 1e-3), (value, kind)
            out.sum().backward()
            assert torch.isfinite(x.grad).all() and torch.isfinite(psi.grad).all()


def test_adain_is_differentiable_once_and_says_so():
    x, psi = torch.randn(1, 2, 4, 4, requires_grad=True), torch.randn(1, 4, requires_grad=True)
    gradient, = torch.autograd.grad(adain(x, psi).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable|differentiate twice'): gradient.sum().backward()


# ---- spectral normalisation ----

@pytest.mark.parametrize('layer', [lambda: nn.Conv2d(6, 64, 3), lambda: nn.Conv2d(128, 16, 1), lambda: nn.Conv2d(32, 3, 3), lambda: nn.Linear(32, 400), lambda: nn.Linear(1, 5)])
def test_spectral_norm_is_exact_from_the_start(layer):
    layer = layer()
    wanted = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), ord=2)
    plain = layer.weight.detach().clone()
    with_spectral_norm(layer)
    assert abs(sigma(layer) - 1) < 1e-4 and torch.allclose(layer.eval().weight, plain / wanted, atol=1e-5)


def test_every_convolution_and_linear_map_of_the_paper_is_normalised(paper):
    for network in paper:
        layers = [layer for layer in network.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
        assert layers and all(parametrize.is_parametrized(layer, 'weight') for layer in layers)
        assert all(abs(sigma(layer) - 1) < 1e-3 for layer in layers)
    assert paper[1].projection in normalised_layers(paper[1]) and paper[1].output in normalised_layers(paper[1])
    assert not normalised_layers(Embedder(MICRO)) and not normalised_layers(Generator(MICRO)), 'E and G only where the config says so'
    assert normalised_layers(Discriminator(MICRO, ['a'])), 'D always'


def test_sigma_follows_training():
    "One power iteration per step lags behind moving weights a little; on weights that rest it closes the gap."
    embedder = Embedder(MICRO.replace(spectral_norm=True))
    optimiser = torch.optim.Adam(embedder.parameters(), lr=1e-3)
    for _ in range(10):
        optimiser.zero_grad(); embedder(*pictures(MICRO, 4)).square().sum().neg().backward(); optimiser.step()
    lag = max(abs(sigma(layer) - 1) for layer in normalised_layers(embedder))
    assert 1e-3 < lag < 0.15
    with torch.no_grad():
        images, drawings = pictures(MICRO, 1)
        embedder.eval()
        for _ in range(30): embedder(images, drawings)
        assert max(abs(sigma(layer) - 1) for layer in normalised_layers(embedder)) == lag, 'nothing moves in eval mode'
        embedder.train()
        for _ in range(200): embedder(images, drawings)
    assert max(abs(sigma(layer) - 1) for layer in normalised_layers(embedder)) < 0.1 * lag


@pytest.mark.parametrize('config', [FULL, FULL.replace(landmark_pyramid=False, pooling='sum')])
def test_folding_keeps_the_output_and_can_be_stored(config):
    embedder, generator = open_attention(Embedder(config)), open_attention(Generator(config))
    images, drawings = pictures(config, 2)
    for _ in range(3): generator(drawings, generator.project(embedder(images, drawings)))   # the stored vectors have moved
    with torch.no_grad():
        for parameter in (*embedder.parameters(), *generator.parameters()): parameter.add_(0.01 * torch.randn_like(parameter))
        e = embedder.eval()(images, drawings); psi = generator.eval().project(e); image = generator(drawings, psi)
        embedder.train(), generator.train()
        assert fold_spectral_norm(embedder) is embedder and fold_spectral_norm(generator) is generator
        assert torch.equal(embedder(images, drawings), e) and torch.equal(generator.project(e), psi) and torch.equal(generator(drawings, psi), image)
        loaded = fold_spectral_norm(Generator(config)); loaded.load_state_dict(generator.state_dict())
        assert torch.equal(loaded(drawings, psi), image)
    assert not normalised_layers(embedder) and not normalised_layers(generator) and all(p.requires_grad for p in generator.parameters())


def test_moving_average_needs_settling():
    layer = with_spectral_norm(nn.Conv2d(8, 8, 3))
    average = copy.deepcopy(layer)
    with torch.no_grad(): average.parametrizations.weight.original.lerp_(torch.randn(8, 8, 3, 3), 0.9)
    assert sigma(average) > 1.2
    assert settle_spectral_norm(average) is average and abs(sigma(average) - 1) < 1e-4 and abs(sigma(layer) - 1) < 1e-4


def test_frozen_restores_after_an_exception():
    discriminator = Discriminator(MICRO, ['a'])
    discriminator.b.requires_grad_(False); discriminator.trunk.blocks[0].eval()
    with pytest.raises(KeyError):
        with frozen(discriminator):
            assert not any(p.requires_grad for p in discriminator.parameters()) and not any(m.training for m in discriminator.modules())
            raise KeyError
    assert [name for name, p in discriminator.named_parameters() if not p.requires_grad] == ['b']
    assert discriminator.training and not discriminator.trunk.blocks[0].conv1.training and discriminator.trunk.blocks[1].conv1.training


# ---- sizes ----

def test_parameter_counts_of_the_paper(paper):
    embedder, generator, discriminator = paper
    for measured, published in ((count(embedder), 14.9e6), (count(generator), 38.2e6), (count(discriminator.trunk), 19.6e6)): assert abs(measured / published - 1) < 0.02
    assert generator.psi_size == 13184 and generator.projection.weight.numel() == 13184 * 512
    for network in paper:
        assert all(layer.kernel_size[0] in (1, 3) for layer in network.modules() if isinstance(layer, nn.Conv2d))


def test_parameter_counts_of_tiny():
    model = PRESETS['tiny'].model
    generator = Generator(model)
    assert abs(count(Embedder(model)) / 0.83e6 - 1) < 0.01 and abs(count(generator) / 1.95e6 - 1) < 0.01
    assert generator.psi_size == 2304 and generator.projection.weight.shape == (2304, 256)


def test_attention_sits_at_32_and_64(paper):
    embedder, generator, discriminator = paper
    assert [embedder.trunk.attention_after, discriminator.trunk.attention_after, list(generator.attention)] == [2, 2, ['downs_2', 'ups_1']]
    trace = Generator(FULL).trace(pictures(FULL, 1)[0], torch.zeros(1, Generator(FULL).psi_size))
    assert {name: x.shape[-1] for name, x in trace.maps.items() if 'attention' in name} == {'downs.0.attention': 32, 'ups.1.attention': 64}


@pytest.mark.parametrize('size', [32, 64, 128, 256])
def test_all_image_sizes(size):
    config = MICRO.replace(image_size=size, attention=size >= 64, generator_downs={32: 1, 64: 2, 128: 3, 256: 4}[size])
    embedder, generator, discriminator = Embedder(config), Generator(config), Discriminator(config, ['a'])
    with torch.no_grad():
        images, drawings = pictures(config, 1)
        out = generator(drawings, generator.project(embedder(images, drawings)))
        judged = discriminator(out, drawings, discriminator.video_vectors(['a']))
    assert out.shape == images.shape and judged.scores.shape == (1,) and judged.maps[-1].shape == (1, 16, 4, 4)


def test_impossible_configurations_are_refused():
    for config in (MICRO.replace(attention=True), MICRO.replace(image_size=128, attention=True, generator_downs=1), MICRO.replace(generator_downs=4)):
        with pytest.raises(ConfigError): Generator(config)
    with pytest.raises(ConfigError): Embedder(MICRO.replace(attention=True))


# ---- every parameter counts ----

@pytest.mark.parametrize('config', [MICRO, FULL, MICRO.replace(pooling='sum', landmark_pyramid=False), MICRO.replace(generator_residuals=0)])
def test_every_parameter_and_every_row_of_p_gets_a_gradient(config):
    embedder, generator = open_attention(Embedder(config)), open_attention(Generator(config))
    discriminator = open_attention(Discriminator(config, ['a', 'b', 'c']))
    images, drawings = pictures(config, 4)
    out = generator(drawings, generator.project(embedder(images, drawings)))
    (out - images).abs().mean().backward()
    assert not without_gradient(embedder) and not without_gradient(generator)
    weight = generator.projection.parametrizations.weight.original if config.spectral_norm else generator.projection.weight
    assert (weight.grad.abs().sum(1) > 0).all(), 'a row of P without gradient'
    discriminator(images, drawings, discriminator.video_vectors(['c', 'a', 'c', 'a'])).scores.square().sum().backward()
    assert not without_gradient(discriminator)
    rows = discriminator.table.rows.weight.grad.coalesce()
    assert rows.indices().tolist() == [[0, 2]] and (rows.values().abs().sum(1) > 0).all()


def test_the_generator_has_no_bias_that_a_norm_would_remove():
    for config in (MICRO, FULL):
        biased = [name for name, layer in Generator(config).named_modules() if getattr(layer, 'bias', None) is not None]
        assert biased == ['output']


def test_gradient_of_a_removed_bias_is_rounding_noise():
    "The reason for the rule above: the bias of an up block, followed by a skip path and AdaIN, changes nothing."
    first, second = AdaptiveUpBlock(4, 4), AdaptiveUpBlock(4, 4)
    bias = nn.Parameter(torch.zeros(1, 4, 1, 1))
    out = adain(second(first(torch.randn(2, 4, 4, 4), *torch.randn(2, 2, 8)) + bias, *torch.randn(2, 2, 8)), torch.zeros(2, 8))
    gradient, = torch.autograd.grad((out * torch.randn_like(out)).sum(), bias)
    assert gradient.abs().max() < 1e-3


# ---- memory order, precision, independence ----

@pytest.mark.parametrize('config', [MICRO, FULL])
def test_memory_order_and_half_precision(config):
    networks = [open_attention(Embedder(config)).eval(), open_attention(Generator(config)).eval(), open_attention(Discriminator(config, ['a'])).eval()]
    images, drawings = pictures(config, 3)

    def run(networks, images, drawings):
        e = networks[0](images, drawings)
        out = networks[1](drawings, networks[1].project(e))
        return e, out, networks[2].features(images, drawings)[0]
    with torch.no_grad():
        wanted = run(networks, images, drawings)
        last = [copy.deepcopy(network).to(memory_format=torch.channels_last) for network in networks]
        for ours in (run(last, *(t.contiguous(memory_format=torch.channels_last) for t in (images, drawings))), run(last, images, drawings),
                     run(networks, images.contiguous(memory_format=torch.channels_last), drawings)):
            assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, wanted))
        with torch.autocast('cpu', torch.bfloat16): half = run(last, *(t.contiguous(memory_format=torch.channels_last) for t in (images, drawings)))
    for a, b in zip(half, wanted):
        assert a.dtype == torch.float32 and (a - b).abs().mean() < 0.05 * b.abs().mean()


def test_rows_are_independent():
    embedder, generator = Embedder(MICRO), Generator(MICRO)
    images, drawings = pictures(MICRO, 3)
    e = embedder(images, drawings)
    psi = 0.3 * torch.randn(3, generator.psi_size)
    whole = generator(drawings, psi)
    for row in range(3):
        assert torch.allclose(embedder(images[[row]], drawings[[row]]), e[[row]], atol=1e-5)
        assert torch.allclose(generator(drawings[[row]], psi[[row]]), whole[[row]], atol=1e-5)
    assert not torch.allclose(generator(drawings[:1], psi[1:2]), whole[:1], atol=1e-3), 'the person matters'
    assert not torch.allclose(generator(drawings[1:2], psi[:1]), whole[:1], atol=1e-3), 'the drawing matters'


def test_generator_reduces_to_instance_norm_for_the_neutral_person():
    generator = Generator(MICRO)
    up, x, drawing = generator.ups[0], torch.randn(1, 8, 8, 8), torch.randn(1, 3, 16, 16)
    main = up.conv1(torch.cat([F.interpolate(F.relu(F.instance_norm(x)), scale_factor=2), drawing], 1))
    wanted = up.conv2(F.relu(F.instance_norm(main))) + up.skip(F.interpolate(x, scale_factor=2))
    assert torch.allclose(up(x, torch.zeros(1, 16), torch.zeros(1, 2 * main.shape[1]), drawing), wanted, atol=1e-5)


def test_pyramid_is_the_drawing_by_area():
    generator = Generator(MICRO.replace(image_size=64, generator_downs=3))
    drawings = pictures(generator.config, 2)[0]
    for level, side in zip(generator._pyramid(drawings), (16, 32, 64)):
        assert torch.allclose(level, F.interpolate(drawings, size=(side, side), mode='area'), atol=1e-6)


def test_blocks_do_not_change_their_input():
    x = torch.randn(2, 4, 8, 8)
    before = x.clone()
    for block in (DownBlock(4, 6), DownBlock(4, 6, first=True), DownBlock(4, 6, norm=True), SelfAttention(4), convolution(4, 4)): block(x)
    AdaptiveUpBlock(4, 4)(x, torch.zeros(2, 8), torch.zeros(2, 8))
    generator = Generator(MICRO)
    images, drawings = pictures(MICRO, 2)
    kept = drawings.clone()
    generator(drawings, torch.zeros(2, generator.psi_size)); Discriminator(MICRO, ['a']).features(images, drawings)
    assert torch.equal(x, before) and torch.equal(drawings, kept)


# ---- the table and the state ----

def d_step(discriminator, optimisers, keys, seed):
    generator = torch.Generator().manual_seed(seed)
    images, drawings = (torch.randn(len(keys), 3, 32, 32, generator=generator) for _ in range(2))
    loss = F.relu(1 - discriminator(images, drawings, discriminator.video_vectors(keys)).scores).mean()
    for optimiser in optimisers: optimiser.zero_grad()
    loss.backward()
    for optimiser in optimisers: optimiser.step()


def make_d(keys):
    torch.manual_seed(0)
    discriminator = Discriminator(MICRO, keys)
    return discriminator, [torch.optim.Adam(discriminator.dense_parameters(), lr=1e-3), torch.optim.SparseAdam(discriminator.table.parameters(), lr=1e-2)]


def test_rows_that_were_not_drawn_do_not_move():
    discriminator, optimisers = make_d(['a', 'b', 'c', 'd'])
    for seed, keys in enumerate((['a', 'c'], ['c', 'c'], ['b', 'c'])):
        before = discriminator.table.rows.weight.detach().clone()
        d_step(discriminator, optimisers, keys, seed)
        moved = {discriminator.table.keys[row] for row in (discriminator.table.rows.weight != before).any(1).nonzero().flatten()}
        assert moved == set(keys)


def test_resume_is_bit_exact(tmp_path):
    keys, plan = ['a', 'b', 'c'], [['a', 'b'], ['b', 'c'], ['a', 'a'], ['c', 'b']]
    straight, optimisers = make_d(keys)
    for seed, drawn in enumerate(plan):
        d_step(straight, optimisers, drawn, seed)
        if seed == 1:
            save_file(straight.state_dict(), tmp_path/'d.safetensors')
            stored = [copy.deepcopy(optimiser.state_dict()) for optimiser in optimisers]
    resumed, optimisers = make_d(keys)
    torch.nn.init.zeros_(resumed.w0)
    resumed.load_state_dict(load_file(tmp_path/'d.safetensors'))
    for optimiser, state in zip(optimisers, stored): optimiser.load_state_dict(state)
    for seed, drawn in list(enumerate(plan))[2:]: d_step(resumed, optimisers, drawn, seed)
    a, b = straight.state_dict(), resumed.state_dict()
    assert set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_rows_stay_with_their_clips(tmp_path):
    keys = ['person one/clip "1".mp4', 'zwölf/3', '']
    table = VideoTable(keys, 4)
    save_file(table.state_dict(), tmp_path/'w.safetensors')
    other = VideoTable(['x', 'y', 'z'], 4)
    other.load_state_dict(load_file(tmp_path/'w.safetensors'))
    assert other.keys == keys and torch.equal(other(keys[::-1]), table(keys[::-1]))
    with pytest.raises(DataError, match="'x'"): other(['x'])


def test_damaged_or_foreign_tables_are_refused():
    table, other = VideoTable(['a', 'b'], 4), VideoTable(['a', 'b', 'c'], 4)
    with pytest.raises((DataError, RuntimeError)): other.load_state_dict(table.state_dict())
    with pytest.raises(DataError, match='2 clips'): other.set_extra_state(table.get_extra_state())
    with pytest.raises(DataError, match='damaged'): table.set_extra_state(torch.tensor([123, 34, 255], dtype=torch.uint8))
    assert table.keys == ['a', 'b'] and torch.equal(table(['b']), table.rows.weight[[1]]), 'a refused state changes nothing'


def test_fine_tuning_replaces_the_direction():
    discriminator = Discriminator(MICRO, ['a']).eval()
    images, drawings = pictures(MICRO, 3)
    judged = discriminator(images, drawings, discriminator.video_vectors(['a'] * 3))
    features, maps = discriminator.features(images, drawings)
    free = nn.Parameter((discriminator.w0 + discriminator.video_vectors(['a'])[0]).detach())
    assert torch.allclose(discriminator.score(features, free), judged.scores, atol=1e-6)
    discriminator.score(features, free).sum().backward()
    assert free.grad.abs().sum() > 0 and discriminator.w0.grad is None, 'w0 is not added twice'
    with pytest.raises(ValueError, match='axis 1 \\(N\\)'): discriminator.score(features, torch.zeros(3, 7))
    assert len(maps) == len(discriminator.trunk.blocks) == 4


def test_trunk_maps_are_block_outputs():
    trunk = open_attention(Trunk(FULL, 4, spectral=True, extra=True)).eval()
    seen = []
    hooks = [block.register_forward_hook(lambda module, inputs, output: seen.append(output)) for block in trunk.blocks]
    maps = trunk(*pictures(FULL, 1))
    for hook in hooks: hook.remove()
    assert len(maps) == len(seen) == 5 and all(torch.equal(a, b) for a, b in zip(maps, seen)), 'nothing has overwritten a map in place'


def test_folding_a_copy_leaves_the_original_alone():
    "torch's removal edits the class of a parametrised layer, and deep copies share it."
    from talking_face.networks.layers import DownBlock
    from talking_face.networks.normalisation import fold_spectral_norm
    block = DownBlock(6, 8, spectral=True).eval()
    x = torch.randn(2, 6, 8, 8)
    before = block(x)
    folded = fold_spectral_norm(copy.deepcopy(block))
    assert torch.equal(block(x), before) and torch.allclose(folded(x), before, atol=1e-5)
    assert 'conv1.weight' in folded.state_dict() and 'conv1.parametrizations.weight.original' in block.state_dict()
    assert torch.allclose(fold_spectral_norm(block)(x), before, atol=1e-5)


# ---- the published details ----

PUBLISHED_TINY = FULL.replace(details='published', pooling='max', landmark_pyramid=False)


@pytest.mark.parametrize('system, sound, g, p, psi, smallest', [('few_shot', 0, 31_396_645, 6_750_208, 13_184, 16), ('va', 14_905_345, 124_469_541, 27_131_904, 26_496, 8),
                                                                ('va_slim', 14_905_345, 31_396_645, 13_500_416, 13_184, 16)])
def test_published_parameter_counts(system, sound, g, p, psi, smallest):
    model = preset('paper', system, 'thesis').model
    with torch.device('meta'):
        embedder, generator, discriminator = Embedder(model), Generator(model), Discriminator(model, ['a'])
        heard = Trunk(model, model.sound_width, True, channels=3) if sound else nn.Identity()
    assert count(embedder) == 14_907_265 and count(heard) == sound and count(discriminator.trunk) == 19_626_881 and count(discriminator) == 19_627_394 + 512
    assert count(generator) == g + p and generator.projection.weight.numel() == p and generator.psi_size == psi
    assert [block.conv1.kernel_size for block in generator.downs] == [(9, 9)] + [(3, 3)] * (len(generator.downs) - 1) and generator.downs[0].conv2.kernel_size == (9, 9)
    assert 256 >> len(generator.downs) == smallest and [block.conv2.out_channels for block in generator.ups][-4:] == [256, 128, 64, 32]
    with torch.no_grad(): maps = discriminator.trunk(torch.empty(1, 3, 256, 256, device='meta'), torch.empty(1, 3, 256, 256, device='meta'))
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 128, 128), (128, 64, 64), (256, 32, 32), (512, 16, 16), (512, 8, 8), (512, 4, 4), (512, 4, 4)]


def test_published_spectral_norm_leaves_out_the_ends():
    generator = Generator(PUBLISHED_TINY)
    plain = {name for name, layer in generator.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear)) and not parametrize.is_parametrized(layer, 'weight')}
    assert plain == {'output', 'projection'}


def published_generator(g, y, psi):
    "The published generator written a second time, from its description: every convolution at full size, torch's own interpolation and norms."
    slices, act = iter(g.split_psi(psi).values()), lambda x: F.leaky_relu(x, 0.01)

    def adaptive(x):
        scale, shift = next(slices)[:, :, None, None].chunk(2, 1)
        return (x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), keepdim=True, correction=0) + 1e-5) * scale + shift

    def attend(layer, x):
        f, g, h = (conv(x).flatten(2) for conv in (layer.key, layer.query, layer.value))
        return x + layer.gamma * (h @ torch.softmax(g.transpose(1, 2) @ f, -1).transpose(1, 2)).view_as(x)

    def twice(x): return F.interpolate(x, scale_factor=2, mode='bilinear', align_corners=False)
    x = y
    for index, block in enumerate(g.downs):
        main = block.conv2(act(block.conv1(act(x) if index else x)))
        x = F.avg_pool2d(main, 2) + F.avg_pool2d(block.skip(x), 2)
        scale, shift = block.norm_behind.psi[0].chunk(2)
        x = F.instance_norm(x, weight=1 + scale, bias=shift)
        if f'downs_{index}' in g.attention: x = attend(g.attention[f'downs_{index}'], x)
    for block in g.residuals: x = x + block.conv2(act(adaptive(block.conv1(act(adaptive(x))))))
    for index, block in enumerate(g.ups):
        main = block.conv2(act(adaptive(block.conv1(twice(act(adaptive(x)))))))
        x = main + block.skip(twice(x))
        if f'ups_{index}' in g.attention: x = attend(g.attention[f'ups_{index}'], x)
    return 2 * torch.sigmoid(g.output(act(adaptive(x)))) - 1


def test_published_networks_equal_a_second_implementation():
    embedder, generator, discriminator = (open_attention(network).eval().double()
                                          for network in (Embedder(PUBLISHED_TINY), Generator(PUBLISHED_TINY), Discriminator(PUBLISHED_TINY, ['a'])))
    with torch.no_grad():
        for network in (embedder, generator, discriminator):
            for parameter in network.parameters(): parameter.add_(0.1 * torch.randn_like(parameter))
        images, drawings = (t.double() for t in pictures(PUBLISHED_TINY, 2))
        psi = torch.randn(2, generator.psi_size, dtype=torch.float64)
        generator.output.float()  # the last convolution is single precision whatever comes in
        x = generator(drawings, psi)
        assert (x - published_generator(generator.double(), drawings, psi)).abs().max() < 1e-3 and x.std() > 0.1
        act = lambda x: F.leaky_relu(x, 0.01)
        for network, pool in ((embedder, lambda x: x.amax((2, 3))), (discriminator, lambda x: x.mean((2, 3)))):
            x = torch.cat([images, drawings], 1)
            for index, block in enumerate(network.trunk.blocks):
                main = block.conv2(act(block.conv1(act(x) if index else x)))
                x = main + x if index == 4 else F.avg_pool2d(main, 2) + F.avg_pool2d(block.skip(x), 2)
                if index == network.trunk.attention_after: x = network.trunk.attention(x)
            found = network(images, drawings) if network is embedder else network.features(images, drawings)[0]
            assert torch.allclose(found.double(), act(pool(x)), rtol=1e-5, atol=1e-6) and (found != 0).all()


def test_published_parameters_get_a_gradient_except_biases_before_a_norm():
    embedder, generator = open_attention(Embedder(PUBLISHED_TINY)), open_attention(Generator(PUBLISHED_TINY))
    images, drawings = pictures(PUBLISHED_TINY, 4)
    (generator(drawings, generator.project(embedder(images, drawings))) - images).abs().mean().backward()
    assert not without_gradient(embedder) and not [name for name in without_gradient(generator) if not name.endswith('bias')]
    assert (generator.projection.weight.grad.abs().sum(1) > 0).all()


def test_details_change_nothing_but_the_inside():
    "Maps, slices and embeddings have the same shapes in both styles."
    generators = [Generator(config) for config in (FULL.replace(landmark_pyramid=False), PUBLISHED_TINY)]
    shapes = [{name: x.shape for name, x in generator.trace(pictures(FULL, 1)[0], torch.zeros(1, generator.psi_size)).maps.items()} for generator in generators]
    assert shapes[0] == shapes[1] and generators[0].psi_layout == generators[1].psi_layout


# ---- sound beside the person ----

@pytest.mark.parametrize('config', [FULL, PUBLISHED_TINY])
def test_sound_adds_its_own_columns(config):
    generator = Generator(config.replace(sound='logmel', sound_size=8)).eval()
    e, a = torch.randn(3, 16), torch.randn(3, 8)
    weight = generator.projection.weight
    assert weight.shape == (generator.psi_size, 24)
    assert torch.allclose(generator.project(e, a), e @ weight[:, :16].T + a @ weight[:, 16:].T, atol=1e-5)
    assert torch.allclose(generator.project(e), e @ weight[:, :16].T, atol=1e-6) and torch.allclose(generator.project_sound(a), a @ weight[:, 16:].T, atol=1e-6)
    with torch.autocast('cpu', torch.bfloat16): assert generator.project(e, a.bfloat16()).dtype == torch.float32
    generator.train()
    vectors = {name: buffer.clone() for name, buffer in generator.named_buffers()}
    columns = generator.sound_projection()
    assert all(torch.equal(buffer, vectors[name]) for name, buffer in generator.named_buffers()), 'copying makes no power iteration'
    assert torch.equal(columns.weight, generator.eval().projection.weight[:, 16:]) and columns.weight.data_ptr() != generator.projection.weight.data_ptr()
    with pytest.raises(ValueError, match='N_a'): generator.project(e, a[:, :5])
    with pytest.raises(ValueError, match='N_a'): Generator(MICRO).project(e, a)
    with pytest.raises(ConfigError, match='sound = none'): Generator(MICRO).sound_projection()


def test_trunk_of_other_pictures():
    trunk = Trunk(FULL, 4, spectral=True, channels=3)
    maps = trunk.maps(torch.randn(2, 3, 64, 64))
    assert [tuple(m.shape[1:]) for m in maps] == [(4, 32, 32), (8, 16, 16), (16, 8, 8), (16, 4, 4)]
    with pytest.raises(ValueError, match=r'axis 1 \(channels\) must be 3'): trunk.maps(torch.randn(2, 6, 64, 64))


# ---- checkpointing ----

def gan_step(config, on, half=False):
    "Everything that a generator step leaves behind: outputs, gradients, singular vectors; D is frozen while it measures, and used once more after."
    torch.manual_seed(0)
    networks = [open_attention(network) for network in (Embedder(config), Generator(config), Discriminator(config, ['a', 'b']))]
    embedder, generator, discriminator = (set_checkpointing(network, on) for network in networks)
    images, drawings = pictures(config, 2)
    with torch.autocast('cpu', torch.bfloat16, enabled=half):
        e = embedder(images, drawings)
        x = generator(drawings, generator.project(e))
        with frozen(discriminator): judged = discriminator(x, drawings, discriminator.video_vectors(['a', 'b']).detach())
        again = embedder(x, drawings)  # the embedder's vectors move on before the backward pass
    (judged.scores.mean() + sum(m.float().abs().mean() for m in judged.maps) + (x - images).abs().mean() + again.mean()).backward()
    loss = F.relu(1 - discriminator(images, drawings, discriminator.video_vectors(['b', 'a'])).scores).mean()
    assert all(p.grad is None for p in discriminator.parameters()), 'the second pass through a frozen network leaves no gradient'
    loss.backward()
    gradients = [p.grad.to_dense() for network in networks for p in network.parameters() if p.grad is not None]
    return [e, x, judged.scores, loss, *gradients, *(b for network in networks for b in network.buffers())]


@pytest.mark.parametrize('half', [False, True])
@pytest.mark.parametrize('config', [MICRO, FULL, PUBLISHED_TINY], ids=['plain', 'ours', 'published'])
def test_checkpointing_is_the_same_step(config, half):
    plain, twice = gan_step(config, False, half), gan_step(config, True, half)
    assert len(plain) == len(twice) > 60 and all(torch.equal(a, b) for a, b in zip(plain, twice))


def test_checkpointing_computes_twice_and_stops_when_switched_off():
    generator, runs = set_checkpointing(Generator(FULL), True), []
    for block in generator.ups: block.register_forward_pre_hook(lambda *_: runs.append(1))
    drawings = pictures(FULL, 1)[0]
    for on, wanted in ((True, 4), (False, 2)):  # two up blocks, forward and again in the backward pass
        runs.clear()
        set_checkpointing(generator, on)(drawings, torch.zeros(1, generator.psi_size)).sum().backward()
        assert len(runs) == wanted
    set_checkpointing(generator, True); runs.clear()
    with torch.no_grad(): generator(drawings, torch.zeros(1, generator.psi_size))
    assert len(runs) == 2


def test_checkpointing_twice_backward_and_second_derivatives():
    "R1 differentiates D's gradient; a retained graph is walked twice."
    found = []
    for on in (False, True):
        torch.manual_seed(0)
        discriminator = set_checkpointing(open_attention(Discriminator(FULL, ['a'])), on)
        images, drawings = pictures(FULL, 2)
        images.requires_grad_()
        scores = discriminator(images, drawings, discriminator.video_vectors(['a', 'a']).detach()).scores
        gradient, = torch.autograd.grad(scores.sum(), images, create_graph=True)
        (gradient.square().sum((1, 2, 3)).mean() + scores.mean()).backward(retain_graph=True)
        scores.sum().backward()
        found.append([gradient, *(p.grad for p in discriminator.dense_parameters()), *discriminator.buffers()])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(*found))


@pytest.mark.parametrize('spectral', [False, True])
def test_checkpointing_under_the_compiler(spectral):
    torch.manual_seed(0)
    blocks = nn.ModuleList([DownBlock(3, 4, spectral, norm=True, first=True), AdaptiveUpBlock(4, 4, spectral)])
    other, x, psi = copy.deepcopy(blocks), torch.randn(2, 3, 8, 8), torch.randn(2, 2, 8)

    def through(blocks): return run_block(blocks[1], run_block(blocks[0], x), psi[0], psi[1])
    set_checkpointing(blocks, True)
    torch._dynamo.reset()
    wanted, found = through(other), torch.compile(lambda: through(blocks), backend='aot_eager')()
    wanted.square().mean().backward(); found.square().mean().backward()
    torch._dynamo.reset()
    assert torch.allclose(found, wanted, atol=1e-6) and all(torch.allclose(p.grad, q.grad, atol=1e-6) for p, q in zip(blocks.parameters(), other.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(blocks.buffers(), other.buffers()))


def test_single_precision_where_it_matters_under_autocast():
    "Statistics, softmax and scores: the values, not only their types, are those of single precision for the half-precision maps they get."
    attention = open_attention(SelfAttention(8, reduction=1))
    with torch.no_grad(): attention.query.weight.mul_(4); attention.key.weight.mul_(4)
    x = torch.randn(1, 8, 8, 8)
    discriminator = Discriminator(FULL, ['a']).eval()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        weights = attention.attention_map(x)
        query, key = (layer(x).flatten(2).double() for layer in (attention.query, attention.key))
        features, vector = torch.rand(4, 16) * 30, torch.randn(4, 16) * 30
        scores = discriminator.score(features, vector)
    assert weights.dtype == torch.float32 and (weights - torch.softmax(query.transpose(1, 2) @ key, -1)).abs().max() < 1e-5
    assert scores.dtype == torch.float32 and torch.allclose(scores.double(), (features.double() * vector.double()).sum(1), atol=1e-2)
