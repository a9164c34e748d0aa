"""Faults of published code that this workbench must never have, each with a test that fails when it is put in.

Published code for few-shot talking heads (FS: 1 the implementation that most others grew from, 2 a second one, 3 the inventors' next method) and for
the audio-visual systems built on it (AV) was read line by line and run. What was wrong there, by number, and the tests that keep it away:

data (this file)
    FS 1.1, 2.12, AV 14, 15: the target is one of the K; clips that are too short loop for ever
        test_the_answer_is_never_among_the_questions, test_the_answer_is_not_in_the_batch_either
    FS 1.2, AV 24: height and width exchanged: sideways faces for every network
        test_pictures_stay_upright_all_the_way, test_embedder_sees_the_picture_upright_and_first
    FS 1.3, 2.9, 3.5, AV 25: content networks get another scale, order or mean than they know
        test_content_networks_get_what_they_were_trained_on
    FS 1.8, AV 20, 22: at the border of the picture pixels are stretched and points are not
        test_crop_at_the_border_moves_pixels_and_points_alike
    FS 1.23, AV 18, 19: no face: an attempt for ever, or an index error far away
        test_a_film_without_a_face_ends_with_one_error
    FS 1.26, AV 12: clips that are never visited, or under two names
        test_every_clip_is_visited_equally_often, test_no_clip_is_in_a_batch_twice
    AV 13: names by the order of a folder's listing
        test_order_on_disk_means_nothing
    FS 2.13, 2.14, AV 16: all frames in memory, failed reads passed on, files left open
        test_only_what_is_needed_is_decoded, test_files_are_closed, test_a_frame_that_cannot_be_read_is_an_error

networks (this file)
    FS 1.6, 1.7: secret padding; used at another size than trained at
        test_no_network_pads_or_rescales_in_secret
    FS 2.2: scores squeezed into 0..1 before the hinge
        test_scores_are_linear_and_without_bounds
    FS 1.11: first scores far outside the hinge's reach
        test_fresh_scores_lie_within_the_hinge
    FS 2.3: a norm on the finished picture
        test_brightness_and_contrast_can_be_expressed
    FS 2.4, 2.5, 3.6: rows of P without effect; a plain norm or bias over the person's
        test_every_number_of_a_person_reaches_the_picture
    FS 2.6: landmarks lost at 4 x 4
        test_the_drawing_survives_the_bottleneck
    FS 1.18, 1.25, AV 9: W as wide as the batch
        test_a_state_does_not_depend_on_the_batch, test_a_state_goes_on_with_another_batch

training, checkpoints, fine-tuning (test_pitfalls_training.py)
    FS 2.4, 3.2b, AV 6: parameters in no optimiser; defaults that name what nobody makes
        test_everything_that_can_learn_does
    FS 2.1, 2.8, AV 38b: one backward for both players; their gradients cancel or leak
        test_generator_and_discriminator_step_alone, test_the_adversarial_gradient_is_there
    FS 2.7, 2.8: no feature matching; the match loss moves W
        test_feature_matching_is_counted, test_match_pulls_the_embedding_only
    FS 1.21: a preview that needs two samples
        test_sample_of_a_single_clip
    FS 1.12, AV 36: one Adam for all videos; an activation on what is stored
        test_only_rows_that_were_drawn_move, test_every_row_has_an_adam_of_its_own, test_video_vectors_are_kept_as_they_are
    FS 1.19, 1.20, 2.11: damaged or half-written state goes on as noise; resume forgets
        test_two_checkpoints_and_nothing_else_are_written, test_a_damaged_checkpoint_is_said_and_the_one_before_goes_on,
        test_a_failed_save_leaves_the_checkpoints_before, and all of test_resume.py
    FS 1.4, AV 6, 7: psi' and w' replaced after the optimiser was built
        test_fine_tuning_trains_what_makes_the_person
    FS 1.5, 3.3, AV 8: a person's psi' made anew from P; a documented None that crashes
        test_all_of_psi_prime_is_kept
    FS 1.9, 1.28, AV 45: fine-tuning ignores its weights, decodes at every step, sees other photos
        test_fine_tuning_honours_its_weights, test_fine_tuning_decodes_and_detects_nothing, test_each_photo_is_seen_equally_often
    FS 1.22, AV 37: NaN ends the process in silence
        test_numbers_that_are_not_finite_are_an_error, and in test_resume.py

sound (test_pitfalls_sound.py)
    AV 28: loudness lost
        test_loudness_is_kept
    AV 27, 29, 30: a picture of a plot, 40 ms of sound, empty bands
        test_sound_is_numbers_and_has_a_context
    AV 31: a frame rate cut to a whole number
        test_sound_does_not_drift
    AV 14, 16, 17, 33: sound of another frame, or none taken for silence
        test_frames_left_out_do_not_move_the_sound, test_sound_is_of_the_picture_that_is_asked_for,
        test_clips_without_sound_are_not_heard_as_silence

as it is written (test_pitfalls_code.py)
    FS 1.22 to 1.25, 1.36, 2.10, 2.14, AV 17, 18, 37, 43: silent catches, exits, prompts, pickles, figures read back, one device
        test_the_package_is_free_of_what_must_not_be_written
    FS 3.1, 3.2, 3.4, AV 2 to 5: names nobody defines, packages nobody declares
        test_every_name_is_known, test_every_package_is_declared

Cannot exist here: a file per video (FS 1.19: W is one table in the checkpoint) and weights as pickled modules (FS 1.24: safetensors or bare tensors).
"""
from collections import Counter
from collections.abc import Callable, Collection
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from helpers import make_film
from talking_face.config import LossConfig, MetaLearningConfig, ModelConfig, ReenactConfig, preset
from talking_face.core import DataError, NoFaceError, frames_to_tensor, tensor_to_frames
from talking_face.data import photos
from talking_face.data.episodes import EpisodeSampler, choose_frames, choose_stretch
from talking_face.data.shard_writing import ShardWriter, encode_clip, encode_frame, encode_sound, pack_sample
from talking_face.data.shards import StoredClip
from talking_face.few_shot.discriminator import Discriminator
from talking_face.few_shot.embedders import Embedder
from talking_face.few_shot.generator import Generator
from talking_face.networks import losses, perceptual
from talking_face.signals.landmarks import Face, LandmarkDetector

ROOT = Path(__file__).resolve().parents[1]
POINTS = np.load(ROOT/'data/embedded/clips/syn01/syn01_c0.npz')['landmarks'][::5] / 4      # (15, 68, 2), a face that speaks, 64 pixels
CLIPS = {'two': 2, 'five': 5, 'a_dozen': 12, 'another': 12}                                # frames of the made clips
MODEL = ModelConfig(image_size=32, embedding_size=16, embedder_width=4, generator_width=4, generator_downs=2, generator_residuals=1, generator_last=4,
                    discriminator_width=4)
PUBLISHED = MODEL.replace(details='published', pooling='max', palette='lines-v1', landmark_pyramid=False, spectral_norm=True)
BOTH = pytest.mark.parametrize('model', [MODEL, PUBLISHED], ids=['ours', 'published'])


# ---- made data: every frame says which it is ----

def plain(clip: int, number: int, size: int = 64) -> np.ndarray:
    "A picture of one colour: red says the number of the frame, green the clip."
    return np.full((size, size, 3), (40 + 12 * number, 40 + 40 * clip, 128), np.uint8)


def number_of(images: torch.Tensor) -> list[int]:
    "The numbers of the frames in a batch of pictures made of them."
    return ((tensor_to_frames(images)[..., 0].mean((1, 2)) - 40) / 12).round().astype(int).tolist()


CORNERS = np.array([[[200, 30, 10], [20, 180, 40]], [[30, 60, 220], [90, 90, 90]]], np.uint8)      # no turn or mirror of it is itself


def corners(*_: int) -> np.ndarray: return CORNERS.repeat(32, 0).repeat(32, 1)


def store(folder: Path, clips: dict[str, int], make: Callable = plain, positions: dict = {}, fps: Fraction = Fraction(25),
          sound: np.ndarray | None = None, mute: Collection[str] = ()) -> Path:
    """A folder of shards with clips of so many frames, 64 pixels, in this order in the manifest.

    `positions`: where the frames are in the film, if some are missing; `sound`: of every clip, else noise; `mute`: the clips without any.
    """
    random = np.random.default_rng(0)
    with ShardWriter(folder) as writer:
        for key, frames in clips.items():
            places = list(positions.get(key, range(frames)))
            seconds = (places[-1] + 1) / fps
            heard = sound if sound is not None else (0.1 * random.standard_normal(round(16000 * seconds))).astype(np.float32)
            pictures = [encode_frame(make(sorted(clips).index(key), number)) for number in range(frames)]
            info, flac = dict(size=64, margin=1.5, positions=places), b'' if key in mute else encode_sound(heard)
            members = encode_clip(info, POINTS[:frames], np.ones(frames), pictures, flac)
            row = dict(key=key, identity=key, source=f'{key}.mp4', source_sha256='0' * 64, split='', fps=f'{fps.numerator}/{fps.denominator}',
                       size=64, frames=frames, seconds=float(seconds), has_audio=key not in mute)
            writer.add(row, pack_sample(key, members))
            writer.commit(key)
    return folder


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def shards(tmp_path_factory) -> Path: return store(tmp_path_factory.mktemp('pitfalls')/'shards', CLIPS)


def sampler_of(shards: Path, clips: int = 2, targets: int = 2, support: tuple[int, ...] = (1, 3), **options) -> EpisodeSampler:
    return EpisodeSampler(shards, MODEL, clips, targets, support, **dict(augment=0.0) | options)


# ---- data ----

@pytest.mark.parametrize('frames, support, targets', [(2, 8, 1), (2, 1, 4), (3, 8, 4), (9, 8, 1), (12, 4, 5), (75, 8, 1)])
def test_the_answer_is_never_among_the_questions(frames, support, targets):
    "AV 14, 15, FS 1.1, 2.12: the target was one of the K frames shown; short clips looped for ever or repeated what they need not."
    asked = Counter()
    for seed in range(1000):
        choice = choose_frames(np.random.default_rng(seed), frames, support, targets)
        assert len(choice.support) == support and len(choice.targets) == targets and not {*choice.support} & {*choice.targets}
        assert len({*choice.support, *choice.targets}) == min(frames, support + targets)
        asked.update({*choice.targets})
    assert set(asked) == set(range(frames)), 'every frame is asked for sooner or later'
    if targets < frames:
        for seed in range(300):
            choice = choose_stretch(np.random.default_rng(seed), np.arange(frames), support, targets)
            assert len(choice.support) == support and not {*choice.support} & {*choice.targets} and (np.diff(choice.targets) == 1).all()


@pytest.mark.parametrize('options', [dict(), dict(augment=1.0), dict(consecutive=True)], ids=['plain', 'augmented', 'consecutive'])
def test_the_answer_is_not_in_the_batch_either(shards, options, monkeypatch):
    "AV 14, FS 1.1, on what the networks are given: a dozen frames, five, or two with K = 3."
    monkeypatch.setattr('talking_face.data.episodes.apply_colour', lambda images, colour: images)      # the colour is the frame's number
    sampler = sampler_of(shards, clips=3 if options.get('consecutive') else 4, **options)
    for step in range(40):
        batch = sampler.batch(step)
        shown, asked = number_of(batch.support_images), number_of(batch.target_images)
        for row in range(len(batch.keys)):
            mine = shown[row * batch.support:(row + 1) * batch.support]
            assert not {*mine} & {*asked[2 * row:2 * row + 2]} and max(mine) < CLIPS[batch.keys[row]]


def test_pictures_stay_upright_all_the_way(tmp_path):
    "AV 24, FS 1.2: swapped axes turned every face on its side, consistently, so that nobody saw it."
    image = corners()
    assert np.array_equal(tensor_to_frames(frames_to_tensor(image))[0], image)
    batch = sampler_of(store(tmp_path/'shards', {'corners': 5}, corners), clips=1).batch(0)
    for pictures in (batch.support_images, batch.target_images):
        for row, column in np.ndindex(2, 2):
            seen = tensor_to_frames(pictures)[:, 4 + 16 * row:12 + 16 * row, 4 + 16 * column:12 + 16 * column]
            assert np.abs(seen.astype(int) - CORNERS[row, column]).max() <= 4, (row, column)
    x, y = batch.target_landmarks[0, 8].round().int().tolist()      # the chin: a white line there, and nothing at the mirrored place
    assert y > 20 and batch.target_drawings[0, :, y, x].min() > 0 and batch.target_drawings[0, :, x, y].max() == -1


def test_embedder_sees_the_picture_upright_and_first(tmp_path):
    "AV 24, FS 1.2, inside the networks: frame, then drawing, both as they are."
    batch = sampler_of(store(tmp_path/'shards', {'corners': 5}, corners), clips=1).batch(0)
    for trunk in (Embedder(MODEL).trunk, Discriminator(MODEL, ['a']).trunk):
        seen = []
        trunk.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        trunk(batch.target_images, batch.target_drawings)
        assert torch.equal(seen[0], torch.cat([batch.target_images, batch.target_drawings], 1))


def revealing(network: str, scaling: str) -> perceptual.VGGFeatures:
    "A VGG whose first map is its input: positive parts of the three channels, then negative parts."
    vgg = perceptual.VGGFeatures(network, scaling)
    first = vgg.convolutions['1_1']
    nn.init.zeros_(first.weight); nn.init.zeros_(first.bias)
    for channel in range(3): first.weight.data[channel, channel, 1, 1], first.weight.data[3 + channel, channel, 1, 1] = 1, -1
    return vgg


@pytest.mark.parametrize('network, scaling, blue_green_red', [
    ('vgg19', 'caffe', (103.939, 116.779, 123.68)), ('vggface', 'vggface-caffe', (93.594, 104.762, 129.186))])
def test_content_networks_get_what_they_were_trained_on(tmp_path, monkeypatch, network, scaling, blue_green_red):
    "AV 24, 25, FS 1.2, 1.3, 2.9, 3.5: sideways RGB in 0..1 went into networks for upright BGR in 0..255 less their own mean."
    vgg = revealing(network, scaling)
    monkeypatch.setattr(losses, 'load_vgg', lambda *_, **__: vgg)
    content = losses.ContentLoss(LossConfig(pixel=0, structure=0, random_features=0, parts=0, **{network: 1.0}), 'fp32')
    batch = sampler_of(store(tmp_path/'shards', {'corners': 5}, corners), clips=1).batch(0)
    maps = content.features_of_real(batch.target_images).maps[network][0]
    seen = maps[0, :3] - maps[0, 3:6]
    for row, column in np.ndindex(2, 2):
        wanted = torch.tensor(CORNERS[row, column][::-1].copy()) - torch.tensor(blue_green_red)
        assert (seen[:, 8 + 16 * row, 8 + 16 * column] - wanted).abs().max() < 4, (row, column)
    fake = batch.target_images.clone().requires_grad_()
    content(fake + 0.1, batch.target_images)[network].backward()
    assert fake.grad.abs().max() > 0, 'not cut off'
    assert all(weight.grad is None and not weight.requires_grad for weight in content.parameters()), 'frozen'


@pytest.mark.parametrize('consecutive', [False, True], ids=['any frames', 'consecutive'])
def test_every_clip_is_visited_equally_often(shards, tmp_path, consecutive):
    "AV 12, FS 1.26: the list and its length counted different things; later videos never came, earlier ones came under several names."
    clips = CLIPS
    if consecutive:      # two clips whose frames never follow each other, side by side
        clips = {name: frames for name, frames in CLIPS.items() if frames > 2} | {'gaps': 5, 'holes': 5}
        shards = store(tmp_path/'shards', clips, positions={'gaps': range(0, 25, 5), 'holes': range(0, 25, 5)})
    sampler = sampler_of(shards, clips=1, targets=1 + consecutive, support=(1,), consecutive=consecutive)
    assert set(CLIPS) & set(clips) <= set(sampler.keys) and sampler.keys == sorted(sampler.keys)
    batches = [sampler.batch(step) for step in range(300)]
    visits = Counter(key for batch in batches for key in batch.keys)
    assert set(visits) == set(clips) - {'gaps', 'holes'} and max(visits.values()) < 1.5 * min(visits.values()), visits
    for batch in batches[:50]:      # under its own name: the picture says which clip it is of
        assert abs(tensor_to_frames(batch.target_images)[..., 1].mean() - (40 + 40 * sorted(clips).index(batch.keys[0]))) < 8


def test_no_clip_is_in_a_batch_twice(tmp_path):
    "AV 12: as long as there are clips enough."
    sampler = sampler_of(store(tmp_path/'shards', dict.fromkeys('abcd', 5), positions={'b': range(0, 25, 5)}), clips=3, consecutive=True)
    for step in range(40): assert len({*sampler.batch(step).keys}) == 3


def test_order_on_disk_means_nothing(shards, tmp_path):
    "AV 13: names were given by the order of a folder's listing, so W_i was another person's on another machine."
    other = store(tmp_path/'shards', dict(reversed(CLIPS.items())))
    assert (other/'manifest.jsonl').read_text() != (shards/'manifest.jsonl').read_text()
    for step in range(5):
        ours, theirs = sampler_of(shards).batch(step), sampler_of(other).batch(step)
        assert ours.keys == theirs.keys and torch.equal(ours.target_drawings, theirs.target_drawings)
        assert number_of(ours.target_images) == number_of(theirs.target_images)
    tables = [Discriminator(MODEL, sampler_of(folder).keys).table for folder in (shards, other)]
    assert tables[0].keys == tables[1].keys == sorted(CLIPS)


def test_only_what_is_needed_is_decoded(shards, monkeypatch):
    "FS 1.28, 2.13: all frames of all clips of a person were decoded, and kept, to show nine of them."
    decoded, original = Counter(), StoredClip.frame
    monkeypatch.setattr(StoredClip, 'frame', lambda clip, index: decoded.update([(clip.key, index)]) or original(clip, index))
    sampler = sampler_of(shards, clips=1, support=(3,), keys=['a_dozen'])
    sampler.batch(0)
    assert decoded.total() == 5
    for step in range(50): sampler.batch(step)
    assert len(decoded) == 12 and decoded.total() == 12, 'once each'
    forgetful = sampler_of(shards, clips=1, support=(3,), keys=['a_dozen'], cache_bytes=1)
    for step in range(20): forgetful.batch(step)
    assert decoded.total() == 12 + 100, 'K + M of each episode, nothing is kept'


def test_files_are_closed(shards):
    "FS 2.14: a handle of every clip that was looked at stayed open."
    handles = Path('/proc/self/fd')
    if not handles.exists(): pytest.skip('this system does not tell')
    sampler = sampler_of(shards, cache_bytes=1)
    sampler.batch(0)
    before = len(list(handles.iterdir()))
    for step in range(30): sampler.batch(step)
    assert len(list(handles.iterdir())) == before


def test_a_frame_that_cannot_be_read_is_an_error(shards, monkeypatch):
    "AV 16, 17, FS 2.13: a picture that could not be read was passed on, or left out so that sound and picture were of different frames."
    def unreadable(clip: StoredClip, index: int) -> np.ndarray: raise DataError(f'{clip.key}: frame {index} is damaged')
    monkeypatch.setattr(StoredClip, 'frame', unreadable)
    with pytest.raises(DataError, match='damaged'): sampler_of(shards).batch(0)


class Blind(LandmarkDetector):
    "A detector that sees nobody and counts how often it was asked."
    name, version, asked = 'blind', '0', 0
    def detect(self, image: np.ndarray) -> list[Face]: self.asked += 1; return []


class Knowing(LandmarkDetector):
    "A detector that has been told."
    name, version = 'knowing', '0'
    def __init__(self, points: np.ndarray): self.points = points.astype(np.float32)
    def detect(self, image: np.ndarray) -> list[Face]: return [Face(self.points, (*self.points.min(0), *self.points.max(0)), 1.0)]


def test_a_film_without_a_face_ends_with_one_error(tmp_path, monkeypatch):
    "AV 18, 19, FS 1.23: no face meant an attempt for ever, or an index error far away."
    from talking_face.few_shot import reenactment
    film, detector = make_film(tmp_path/'nobody.mp4', [np.full((64, 64, 3), 90, np.uint8)] * 6), Blind()
    with pytest.raises(NoFaceError, match='nobody.mp4'): photos.photos_from_video(film, 64, 1.5, detector, 'largest', 4)
    assert 1 <= detector.asked <= 12
    monkeypatch.setattr(reenactment, 'make_detector', lambda *_: detector)
    with pytest.raises(NoFaceError, match='nobody.mp4'): reenactment.read_driver(film, 64, 1.5, ReenactConfig(face='largest'))
    assert detector.asked <= 24


@pytest.mark.parametrize('place', [(-15, -24), (66, 10), (30, 71), (30, 20)], ids=['left and top', 'right', 'bottom', 'inside'])
def test_crop_at_the_border_moves_pixels_and_points_alike(tmp_path, place):
    "AV 20, 22, FS 1.8: the crop was clipped at the border and stretched, the landmarks were shifted as if it were not, and cut to whole pixels."
    from PIL import Image
    points = POINTS[0] * 1.5 + place      # 144 x 160 pixels, the crop leaves it on one or two sides
    picture = np.zeros((160, 144, 3), np.uint8)
    inside = [index for index in (8, 30, 36, 45, 48, 54) if (points[index] > 4).all() and (points[index] < (139, 155)).all()]
    assert len(inside) >= 2
    yy, xx = np.mgrid[:160, :144]
    for x, y in points[inside]: picture = np.maximum(picture, (255 * np.exp(-((xx - x)**2 + (yy - y)**2) / 8))[..., None].astype(np.uint8))
    Image.fromarray(picture).save(tmp_path/'photo.png')
    crop = photos.photos_from_images([tmp_path/'photo.png'], 128, 1.5, Knowing(points))
    extent = np.ptp(crop.landmarks[0], axis=0) / np.ptp(points, axis=0)
    assert abs(extent[0] - extent[1]) < 1e-4, 'a square stays a square'
    yy, xx = np.mgrid[:128, :128]
    for index in inside:
        x, y = crop.landmarks[0, index]
        near = crop.images[0, ..., 0] * ((xx - x)**2 + (yy - y)**2 < 36) + 1e-9
        assert np.hypot((near * xx).sum() / near.sum() - x, (near * yy).sum() / near.sum() - y) < 0.5, index


# ---- networks ----

def rows(model: ModelConfig, count: int = 2) -> list[torch.Tensor]:
    "Pictures and drawings of noise."
    return [torch.rand(count, 3, model.image_size, model.image_size) * 2 - 1 for _ in range(2)]


def random_psi(generator: nn.Module, count: int = 1) -> torch.Tensor: return 0.5 * torch.randn(count, generator.psi_size)


@BOTH
def test_no_network_pads_or_rescales_in_secret(model):
    "FS 1.6, 1.7: D added a border meant for another size; G drew at a size it had not been trained at."
    side, discriminator, generator = model.image_size, Discriminator(model, ['a']), Generator(model)
    for trunk in (discriminator.trunk, Embedder(model).trunk):
        sizes = []
        for block in trunk.blocks: block.register_forward_hook(lambda module, inputs, output: sizes.append((inputs[0].shape[-1], output.shape[-1])))
        trunk(*rows(model))
        halves = [(side >> step, side >> step + 1) for step in range(len(sizes)) if side >> step > 4]
        assert sizes == halves + [(4, 4)] * (len(sizes) - len(halves))
    drawings = rows(model)[0]
    assert generator(drawings, random_psi(generator, 2)).shape == drawings.shape
    larger = torch.zeros(1, 3, 2 * side, 2 * side)
    with pytest.raises(ValueError, match='must be'): generator(larger, random_psi(generator))
    with pytest.raises(ValueError, match='must be'): discriminator.features(larger, larger)


@BOTH
def test_scores_are_linear_and_without_bounds(model):
    "FS 2.2: a sigmoid in front of the hinge kept scores in 0..1, so that the loss never let go and never got below 1."
    discriminator = Discriminator(model, ['a']).eval()
    images, drawings = rows(model, 3)
    vectors = discriminator.video_vectors(['a'] * 3).detach()
    features, _ = discriminator.features(images, drawings)
    for factor in (1, -100, 10_000):
        scores = discriminator(images, drawings, factor * vectors - discriminator.w0 * (1 - factor)).scores
        assert torch.allclose(scores, factor * (features * (vectors + discriminator.w0)).sum(1) + discriminator.b, rtol=1e-4, atol=1e-5)
    assert scores.abs().max() > 1


@pytest.mark.parametrize('pooling', ['sum', 'mean', 'max'])
@BOTH
def test_fresh_scores_lie_within_the_hinge(model, pooling):
    "FS 1.11: W drawn from 0..1 made first scores of 5 to 12, and without a training pass numbers of 25 digits."
    wide = model.replace(pooling=pooling, embedding_size=256, discriminator_width=16, maximum_channels=256)
    for seed in range(3):
        torch.manual_seed(seed)
        discriminator = Discriminator(wide, ['a', 'b'])
        for mode in (False, True):
            with torch.no_grad(): scores = discriminator.train(mode)(*rows(wide), discriminator.video_vectors(['a', 'b'])).scores
            assert scores.abs().max() < 1, (seed, mode)
        weights = discriminator.table.rows.weight
        assert weights.min() < 0 < weights.max() and abs(weights.mean()) < 0.1 * weights.std()


@BOTH
def test_brightness_and_contrast_can_be_expressed(model):
    "FS 2.3: a norm on the finished picture gave every person the same mean and spread in every channel."
    generator = Generator(model).eval()
    drawing = rows(model)[0][:1]
    with torch.no_grad():
        pictures = torch.cat([generator(drawing, psi[None]) for psi in random_psi(generator, 4)])
        means, spreads = pictures.mean((2, 3)), pictures.std((2, 3))
        before = generator(drawing, torch.zeros(1, generator.psi_size)).mean((0, 2, 3))
        generator.output.bias += torch.tensor([0.5, 0.0, -0.5])
        after = generator(drawing, torch.zeros(1, generator.psi_size)).mean((0, 2, 3))
    assert (means.std(0) > 0.005).all() and (spreads.std(0) / spreads.mean(0) > 0.05).all()
    assert after[0] - before[0] > 0.15 and abs(after[1] - before[1]) < 0.01 and after[2] - before[2] < -0.15


@BOTH
def test_every_number_of_a_person_reaches_the_picture(model):
    "FS 2.4, 2.5, 3.6: the second half of a block took the first half's numbers, a plain norm or bias came over them; thousands of rows were dead."
    generator = Generator(model).eval()
    drawings, psi = rows(model, 3)[0], random_psi(generator, 3).requires_grad_()
    image, maps = generator.trace(drawings, psi)
    slopes, = torch.autograd.grad((image * torch.randn_like(drawings)).sum(), psi)
    weak = slopes.abs().amax(0) < 1e-3      # most are about 1; what a norm removes leaves rounding errors of 1e-7
    assert not weak.any(), f'{int(weak.sum())} of {len(weak)} numbers do nothing'
    for name in maps:      # the statistics of a block's output are its own
        if name.startswith('downs'): continue
        spreads, means = maps[name].std((2, 3)), maps[name].mean((2, 3))
        assert spreads.std() > 0.03 * spreads.mean() and means.abs().max() > 0.03 * spreads.mean(), name


@pytest.mark.parametrize('mode', ['best', 'thesis'])
@pytest.mark.parametrize('system', ['few_shot', 'va', 'va_slim'])
@pytest.mark.parametrize('name', ['tiny', 'small', 'paper'])
def test_the_drawing_survives_the_bottleneck(name, system, mode):
    "FS 2.6: at 4 x 4 without any way around it, little was left of the landmarks' places."
    model = preset(name, system, mode).model
    assert model.landmark_pyramid or model.image_size >> model.generator_downs >= 8


# ---- the table of video vectors ----

def test_a_state_does_not_depend_on_the_batch(tmp_path):
    "AV 9, FS 1.18, 1.25: W lay in the state as wide as the batch, and only a batch of that size could go on with it."
    from safetensors.torch import load_file, save_file
    discriminator = Discriminator(MODEL, sorted(CLIPS))
    images, drawings = rows(MODEL, 5)
    for keys in (['two'], ['five', 'two', 'five'], ['another'] * 5):      # any number, any order
        scores = discriminator(images[:len(keys)], drawings[:len(keys)], discriminator.video_vectors(keys)).scores
        scores.sum().backward()
        save_file(discriminator.state_dict(), tmp_path/'d.safetensors')
        fresh = Discriminator(MODEL, sorted(CLIPS))
        fresh.load_state_dict(load_file(tmp_path/'d.safetensors'))
        assert torch.equal(fresh.video_vectors(['two', 'another']), discriminator.video_vectors(['two', 'another']))
        assert fresh.table.rows.weight.shape == (len(CLIPS), MODEL.embedding_size)
