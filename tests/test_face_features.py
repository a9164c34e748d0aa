"""The reader of dlib's weights against damage, and the rebuilt network and aligner against dlib itself.

The small files here come from a writer of our own: a second implementation of the format, in the other direction.
"""
from __future__ import annotations

import importlib.util, os, struct, subprocess, sys, tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from talking_face.core import CheckpointError, WeightsUnavailable
from talking_face.networks import dlib_file, face_features as ff

ROOT = Path(__file__).parents[1]
REAL = ROOT/'..'/'shared'/'data'/'clips'
has_weights = importlib.util.find_spec('face_recognition_models') is not None
needs_weights = pytest.mark.skipif(not has_weights, reason='face_recognition_models is not installed')
needs_dlib = pytest.mark.skipif(not (has_weights and importlib.util.find_spec('dlib')), reason='dlib or face_recognition_models is not installed')


# ---- a writer of the format

def integer(value: int) -> bytes:
    magnitude = abs(value).to_bytes(max(1, (abs(value).bit_length() + 7) // 8), 'little')
    return bytes([len(magnitude) | (0x80 if value < 0 else 0)]) + magnitude

def number(value: float) -> bytes:
    mantissa, exponent = np.frexp(value)
    return integer(int(mantissa * 2**24)) + integer(int(exponent) - 24)

def text(value: str) -> bytes: return integer(len(value)) + value.encode()
def shape(*sizes: int) -> bytes: return b''.join(map(integer, sizes))
def alias(*sizes: int) -> bytes: return integer(1) + shape(*sizes)
def tensor(values: np.ndarray, *sizes: int) -> bytes: return integer(2) + shape(*sizes) + values.astype('<f4').tobytes()
EMPTY = integer(2) + shape(0, 0, 0, 0)
MULTIPLIERS = b''.join(number(1.0) for _ in range(4))

def small_file(rng: np.random.Generator, newer: bool = False) -> tuple[bytes, dict[str, np.ndarray]]:
    "A network of a convolution, a scale, relu, a skip connection, pooling and a matrix, in the older or newer layer versions."
    weight, bias, scale, shift, matrix = (rng.standard_normal(size).astype(np.float32) for size in ((2, 3, 3, 3), 2, 2, 2, (2, 5)))
    flag = b'1' if newer else b''
    bodies = [
        (3, text('con_5' if newer else 'con_4') + tensor(np.r_[weight.ravel(), bias], 56, 1, 1, 1) + shape(2, 3, 3, 1, 1, 0, 0)
         + alias(2, 3, 3, 3) + alias(1, 2, 1, 1) + MULTIPLIERS + flag),
        (2, text('affine_2' if newer else 'affine_') + tensor(np.r_[scale, shift], 4, 1, 1, 1) + alias(1, 2, 1, 1) + alias(1, 2, 1, 1) + integer(0)
         + (b'0' if newer else b'')),
        (1, b''), (2, text('relu_')), (2, text('add_prev_')), (2, text('max_pool_2') + shape(2, 2, 2, 2, 0, 0)),
        (2, text('fc_3' if newer else 'fc_2') + integer(5) + integer(2) + tensor(matrix, 10, 1, 1, 1) + alias(2, 5, 1, 1) + alias(0, 0, 0, 0)
         + integer(1) + MULTIPLIERS + flag)]
    content = integer(1) + text('loss_metric_2') + number(0.04) + number(0.6)
    content += b''.join(integer(version) for version, _ in reversed(bodies))
    content += text('input_rgb_image_sized') + b''.join(number(mean) for mean in (122.782, 117.001, 104.298)) + integer(150) + integer(150)
    for version, body in bodies:
        if version != 1: content += body + b'000' + 3 * EMPTY + (integer(1) if version == 3 else b'')
    return content, dict(weight=weight, bias=bias, scale=scale, shift=shift, matrix=matrix)

@pytest.fixture(scope='module', params=(False, True), ids=('older', 'newer'))
def small(request) -> tuple[bytes, dict[str, np.ndarray]]:
    return small_file(np.random.default_rng(0), request.param)

def read(content: bytes) -> dlib_file.DlibNetwork: return dlib_file._walk(dlib_file._Reader(content, 'small.dat'))


# ---- reading and damage

def test_reads_what_the_writer_wrote(small):
    content, arrays = small
    stored = read(content)
    assert [layer.kind for layer in stored.layers] == ['convolution', 'affine', 'relu', 'add_prev', 'max_pool', 'linear']
    for name, index, key in (('weight', 0, 'weight'), ('bias', 0, 'bias'), ('scale', 1, 'scale'), ('shift', 1, 'shift'), ('matrix', 5, 'weight')):
        assert np.array_equal(stored.layers[index].arrays[key], arrays[name])
    assert np.allclose(stored.mean, (122.782, 117.001, 104.298), atol=1e-4) and stored.input_size == (150, 150)
    assert abs(stored.margin - 0.04) < 1e-7 and abs(stored.threshold - 0.6) < 1e-7 and stored.layers[4].options['stride_x'] == 2

def test_every_truncation_and_extension_is_refused(small):
    content, _ = small
    for length in range(len(content)):
        with pytest.raises(CheckpointError, match='small.dat'): read(content[:length])
    with pytest.raises(CheckpointError, match='too many'): read(content + b'\0')

def test_every_flipped_bit_is_refused_or_harmless(small):
    "No bit makes the reader crash or hang; a file that is still read has the shapes of the original."
    content, _ = small
    kinds, refused = [layer.kind for layer in read(content).layers], 0
    for place in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content); damaged[place] ^= 1 << bit
            try: stored = read(bytes(damaged))
            except CheckpointError: refused += 1
            else: assert [layer.kind for layer in stored.layers] == kinds and stored.layers[0].arrays['weight'].shape == (2, 3, 3, 3)
    assert refused > len(content)  # most fields outside the raw numbers are guarded

@pytest.mark.parametrize('content, reason', [
    (integer(1) + integer(2**40), 'name of'), (integer(1) + text('loss_metric_2') + integer(1) + integer(32000), 'no scale'),
    (integer(1) + text('loss_metric_2') + integer(2**60) + integer(0), '53 bits'),
    (integer(1) + text('loss_metric_2') + number(1) + number(1) + integer(2) * 20_000, 'list of layers'),
    (b'PK\x03\x04' * 50, 'integer'), (b'\x80\x04' * 50, 'integer')])
def test_hostile_counts_and_other_files_are_refused(content, reason):
    with pytest.raises(CheckpointError, match=reason): read(content)

def test_a_huge_announced_tensor_is_refused_before_anything_is_allocated():
    content, _ = small_file(np.random.default_rng(0))
    huge = content.replace(shape(56, 1, 1, 1), shape(2**31, 2**31, 2**31, 2**31))
    tracemalloc.start()
    with pytest.raises(CheckpointError, match='impossible tensor shape'): read(huge)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6
    negative = content.replace(shape(56, 1, 1, 1), shape(-56, -1, 1, 1))
    with pytest.raises(CheckpointError, match='impossible tensor shape'): read(negative)

def test_another_network_and_missing_files_are_refused(tmp_path, monkeypatch):
    path = tmp_path/'other.dat'
    path.write_bytes(small_file(np.random.default_rng(0))[0])
    with pytest.raises(CheckpointError, match='SHA-256'): ff.load_face_recognition_network(path)
    with pytest.raises(CheckpointError, match='another network'): ff.load_face_recognition_network(path, sha256='')
    with pytest.raises(CheckpointError, match='absent.dat'): dlib_file.read_dlib_network(tmp_path/'absent.dat')
    monkeypatch.setattr(dlib_file.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(WeightsUnavailable, match='pip install'): ff.load_face_recognition_network()

@needs_weights
def test_damage_to_the_real_file():
    content = dlib_file.find_face_recognition_file().read_bytes()
    rng = np.random.default_rng(1)
    for length in rng.integers(0, len(content), 100):
        with pytest.raises(CheckpointError): dlib_file._walk(dlib_file._Reader(content[:length], 'cut'))
    damaged, places = bytearray(content), rng.integers(0, 700, 200)
    for place, bit in zip(places, rng.integers(0, 8, 200)):
        damaged[place] ^= 1 << bit
        try: dlib_file._walk(dlib_file._Reader(bytes(damaged), 'flipped'))
        except CheckpointError: pass
        damaged[place] ^= 1 << bit
    assert bytes(damaged) == content

@needs_weights
def test_almost_the_right_network_is_refused():
    "A changed stride, a missing scale or a number that is not finite must not load."
    stored = dlib_file.read_dlib_network(dlib_file.find_face_recognition_file())
    def load(index, **changes):
        layers = list(stored.layers); layers[index] = layers[index]._replace(**changes)
        ff._fill(ff.FaceRecognitionNetwork(), stored._replace(layers=tuple(layers)), 'changed')
    first = stored.layers[0]
    load(0)
    for changes in (dict(options=first.options | dict(stride_x=1)), dict(options=first.options | dict(padding_y=1)), dict(arrays={}),
                    dict(arrays=first.arrays | dict(weight=np.full_like(first.arrays['weight'], np.nan)))):
        with pytest.raises(CheckpointError): load(0, **changes)
    with pytest.raises(CheckpointError): ff._fill(ff.FaceRecognitionNetwork(), stored._replace(mean=(0., 0., 0.)), 'changed')

def test_importing_loads_neither_dlib_nor_the_weights_package():
    code = 'import sys, talking_face.networks.face_features; assert not {"dlib", "face_recognition_models", "pkg_resources"} & set(sys.modules)'
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT, env=os.environ | {'OMP_NUM_THREADS': '1'})


# ---- against dlib

def as_input(frames: np.ndarray) -> torch.Tensor: return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()

def dlib_chip(frame: np.ndarray, points: np.ndarray) -> np.ndarray:
    import dlib
    shape = dlib.full_object_detection(dlib.rectangle(0, 0, *frame.shape[1::-1]), [dlib.point(int(x), int(y)) for x, y in points])
    return dlib.get_face_chip(np.ascontiguousarray(frame), shape, 150, 0.25)

def compare(frames: list[np.ndarray], landmarks: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    "For each face: largest difference of descriptors of dlib's chip, distance for our own chip, share of equal pixels."
    import dlib
    torch.set_num_threads(1)
    network = ff.load_face_recognition_network()
    recogniser = dlib.face_recognition_model_v1(str(dlib_file.find_face_recognition_file()))
    rows = []
    for frame, points in zip(frames, landmarks):
        chip = dlib_chip(frame, points)
        expected = np.array(recogniser.compute_face_descriptor(chip))
        ours = ff.align_chips(as_input(frame[None]), points[None])
        with torch.no_grad(): same, own = network(as_input(chip[None]))[0].numpy(), network(ours)[0].numpy()
        equal = np.mean(np.floor(ours[0].permute(1, 2, 0).numpy() + 1e-3) == chip)
        rows.append((np.abs(same - expected).max(), np.linalg.norm(own - expected), equal))
    return tuple(map(np.array, zip(*rows)))

def frames_of(path: Path, indices: tuple[int, ...]) -> list[np.ndarray]:
    import av
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format='rgb24') for i, frame in zip(range(max(indices) + 1), container.decode(video=0)) if i in indices]

@pytest.fixture(scope='module')
def embedded() -> tuple[list[np.ndarray], list[np.ndarray]]:
    frames, landmarks = [], []
    for path in sorted((ROOT/'data'/'embedded'/'clips').glob('*/*_c0.mp4')):
        frames += frames_of(path, (5,))
        landmarks.append(np.round(np.load(path.with_suffix('.npz'))['landmarks'][5]))
    assert len(frames) == 24
    return frames, landmarks

@needs_dlib
def test_descriptors_equal_dlib_on_rendered_faces(embedded):
    same, own, equal = compare(*embedded)
    assert same.max() < 1e-5 and own.max() < 0.03 and equal.min() > 0.99

@needs_dlib
def test_chips_equal_dlib_where_faces_are_large_and_the_picture_is_halved(embedded):
    import cv2
    frames, landmarks = (part[:3] for part in embedded)
    scales = (3, 3, 5)
    large = [cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC) for frame, scale in zip(frames, scales)]
    points = [np.round((p + 0.5) * scale - 0.5) for p, scale in zip(landmarks, scales)]
    assert [int(torch.log2(ff.chip_matrices(p[None])[0, :, 0].norm()).floor()) for p in points] == [1, 1, 2]
    def error(frame, p, shift):
        difference = ff.align_chips(as_input(frame[None]), p[None] + shift)[0].permute(1, 2, 0).numpy() - dlib_chip(frame, p)
        return np.abs(difference - np.median(difference)).mean()   # dlib truncates to whole levels at each halving: a constant offset
    for frame, p in zip(large, points):
        assert error(frame, p, 0) < min(2.5, error(frame, p, 2), error(frame, p, -2))   # two of over 700 pixels are seen
    same, own, _ = compare(large, points)
    assert same.max() < 1e-5 and own.max() < 0.05

@needs_dlib
def test_descriptors_equal_dlib_on_real_faces():
    if not REAL.is_dir(): pytest.skip(f'{REAL} is absent: real clips are not part of this repository')
    import dlib
    models = dlib_file.find_face_recognition_file().parent
    detector, predictor = dlib.get_frontal_face_detector(), dlib.shape_predictor(str(models/'shape_predictor_68_face_landmarks.dat'))
    frames, landmarks = [], []
    for path in sorted(REAL.glob('*/*.mp4')):
        frame = frames_of(path, (0,))[0]
        boxes = detector(np.ascontiguousarray(frame), 0)
        if not boxes: continue
        shape = predictor(np.ascontiguousarray(frame), max(boxes, key=lambda box: box.area()))
        frames.append(frame); landmarks.append(np.array([(point.x, point.y) for point in shape.parts()], float))
    assert len(frames) >= 20
    same, own, equal = compare(frames, landmarks)
    assert same.max() < 1e-5, 'the network differs from dlib'
    assert own.max() < 0.03 and np.median(own) < 0.01, 'the aligner differs from dlib'
    assert equal.min() > 0.98


# ---- alignment and descriptors by themselves

def mean_landmarks(size: int = 150) -> np.ndarray:
    "68 landmarks that lie exactly on the mean face of a chip of `size` pixels, in that chip's pixels as a picture."
    points = np.zeros((68, 2))
    for indices, xs, ys in ff._MEAN_FACE.values(): points[list(indices)] = (np.stack([xs, ys], 1) + 0.25) / 1.5 * size
    return points

def test_a_face_on_the_mean_face_is_not_moved():
    matrix = ff.chip_matrices(mean_landmarks()[None])[0].numpy()
    assert np.allclose(matrix, [[1, 0, 0.5], [0, 1, 0.5]], atol=1e-9)  # dlib's chip pixel 0 covers the picture from 0 to 1

def test_turning_the_picture_turns_the_matrix():
    points, angle = mean_landmarks(), 0.4
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = points @ turn.T * 1.7 + [30, -12]
    base, matrix = (ff.chip_matrices(p[None])[0].numpy() for p in (points, moved))
    centre = np.array([74.5, 74.5])
    assert np.allclose(matrix[:, :2] @ centre + matrix[:, 2], turn @ (base[:, :2] @ centre + base[:, 2]) * 1.7 + [30, -12])
    assert np.allclose(matrix[:, :2], turn * (1.7 * 150 - 1) / 149)

@pytest.mark.parametrize('landmarks', [np.zeros((1, 5, 2)), np.full((1, 68, 2), np.nan), np.zeros((2, 68, 2))])
def test_wrong_landmarks_are_refused(landmarks):
    with pytest.raises(ValueError, match='landmarks'): ff.align_chips(torch.zeros(1, 3, 64, 64), landmarks)

@needs_weights
def test_descriptors_of_a_mixed_batch_equal_single_ones(embedded):
    import cv2
    frame, points = embedded[0][0], embedded[1][0]
    large = cv2.resize(frame, None, fx=3, fy=3, interpolation=cv2.INTER_CUBIC)
    canvas = np.zeros_like(large); canvas[:256, :256] = frame
    both = torch.cat([as_input(large[None]), as_input(canvas[None])])   # one is halved, the other not
    landmarks = np.stack([np.round((points + 0.5) * 3 - 0.5), points])
    together = ff.align_chips(both, landmarks)
    for i in range(2): assert torch.allclose(together[i], ff.align_chips(both[i:i + 1], landmarks[i:i + 1])[0], atol=1e-4)
    network = ff.load_face_recognition_network()
    assert ff.identity_distance(*network(together).numpy()) < 0.15   # one face at two sizes
    assert ff.identity_descriptors(np.zeros((0, 64, 64, 3), np.uint8), np.zeros((0, 68, 2)), network).shape == (0, 128)

@needs_weights
def test_gradients_of_feature_maps_in_double_precision():
    network = ff.load_face_recognition_network().double()
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(1, 3, 68, 68, generator=generator, dtype=torch.float64).mul(255).requires_grad_(True)
    def value(x):
        maps = network.features(x, 'b13')
        return sum(maps[name].square().mean() for name in ('stem', 'b3', 'b7', 'b10', 'b13'))
    gradient, = torch.autograd.grad(value(images), images)
    assert (gradient != 0).float().mean() > 0.9
    for pixel in torch.randint(0, images.numel(), (12,), generator=generator):
        step = torch.zeros(images.numel(), dtype=torch.float64).index_fill(0, pixel[None], 1e-4).view_as(images)
        with torch.no_grad(): numeric = (value(images + step) - value(images - step)).item() / 2e-4
        assert abs(numeric - gradient.flatten()[pixel].item()) < 1e-4 * abs(numeric) + 1e-9
