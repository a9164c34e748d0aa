"""The two optional detectors against their packages; missing, damaged and hostile weights."""
import os, socket, subprocess, sys
from pathlib import Path

import numpy as np
import pytest

from talking_face.core import CheckpointError, ConfigError, WeightsUnavailable
from talking_face.signals import detectors as room
from talking_face.signals.detectors import (FAN_FILE, FAN_SOURCE, MEDIAPIPE_SHA256, S3FD_FILE, FanDetector, MediapipeDetector, _s3fd_search, find_fan_files,
                                            find_mediapipe_file, make_detector)
from talking_face.signals.landmarks import FLIP_ORDER, PARTS, DlibDetector, detect_face, interocular_distance, track_face
from talking_face.signals.media import read_image, read_video

from faces import EMBEDDED, ROOT, SHARED, dlib_detector, frame, percent, real_data  # fixtures among them

MODELS = ROOT/'../shared/models'



@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments, **options): raise AssertionError('the network was touched')
    for name in ('connect', 'connect_ex'): monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)


# --- FAN

@pytest.fixture(scope='module')
def random_weights(tmp_path_factory):
    "Files in the format of the package face-alignment, with random numbers: they prove reading, cropping and decoding, not accuracy."
    torch = pytest.importorskip('torch')
    from face_alignment.detection.sfd.net_s3fd import s3fd
    from face_alignment.models import FAN
    folder = tmp_path_factory.mktemp('torch')/'hub/checkpoints'; folder.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(FAN(4).state_dict(), folder/FAN_FILE)
    torch.save(s3fd().state_dict(), folder/S3FD_FILE)
    return folder


def test_fan_file_names_are_the_packages():
    from face_alignment.api import models_urls
    from face_alignment.detection.sfd.sfd_detector import models_urls as box_urls
    assert models_urls['2DFAN-4'] == FAN_SOURCE + FAN_FILE and box_urls['s3fd'] == FAN_SOURCE + S3FD_FILE


def test_fan_equals_the_package(random_weights, no_network, monkeypatch, frame):
    "The package cuts its points to whole pixels; ours must be the same before the cut."
    face_alignment = pytest.importorskip('face_alignment')
    detector = FanDetector(str(random_weights), face_detector='dlib', device='cpu')
    assert detector.name == 'fan' and 'boxes dlib-' in detector.version and '2DFAN4-' in detector.version
    monkeypatch.setenv('TORCH_HOME', str(random_weights.parents[1]))
    for name in ('_get_preds_fromhm', 'transform_np'):                # their Python instead of ten seconds of numba's compiler
        monkeypatch.setattr(face_alignment.utils, name, getattr(face_alignment.utils, name).py_func)
    package = face_alignment.FaceAlignment(face_alignment.LandmarksType.TWO_D, device='cpu', compile=False, face_detector='folder')
    image = np.pad(frame, ((0, 30), (0, 170), (0, 0)), 'edge')   # not square
    face, = detector.detect(image)
    expected, = package.get_landmarks_from_image(image, detected_faces=[np.array(face.box)])
    assert face.landmarks.shape == (68, 2) and face.landmarks.dtype == np.float32
    assert len(np.unique(np.round(face.landmarks), axis=0)) > 5          # the random network does answer with different places
    assert all(((np.trunc(face.landmarks - 1e-3) == expected) | (np.trunc(face.landmarks + 1e-3) == expected)).ravel())
    assert not np.array_equal(face.landmarks, expected)


def test_s3fd_equals_the_package(random_weights, no_network, frame):
    from face_alignment.detection.sfd import FaceDetector
    package = FaceDetector('cpu', path_to_detector=str(random_weights/S3FD_FILE), filter_threshold=0.3)
    detector = FanDetector(str(random_weights), device='cpu')
    assert 's3fd-' in detector.version
    image = np.ascontiguousarray(frame[64:160, 64:160])
    expected = np.array(package.detect_from_image(image)).reshape(-1, 5)
    found = _s3fd_search(detector._s3fd, image, 'cpu', 640, threshold=0.3)
    assert len(found) == len(expected) > 0
    assert np.allclose([box for box, _ in found], expected[:, :4], atol=1e-3) and np.allclose([score for _, score in found], expected[:, 4])
    # twice the picture, searched at half its size: the same boxes, twice as large
    double = _s3fd_search(detector._s3fd, image.repeat(2, 0).repeat(2, 1), 'cpu', 96, threshold=0.3)
    assert np.allclose([box for box, _ in double], 2 * (expected[:, :4] + 0.5) - 0.5, atol=1e-2)


def test_fan_without_weights(no_network, monkeypatch, tmp_path):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'torch'))
    for weights in ('', str(tmp_path), str(tmp_path/'absent.pth')):
        with pytest.raises(WeightsUnavailable) as caught: make_detector('fan', weights)
        for part in (FAN_SOURCE + FAN_FILE, 'checkpoints', '--weights', '--detector dlib'): assert part in str(caught.value)
    assert make_detector('auto').name == 'dlib'
    with pytest.raises(WeightsUnavailable): make_detector('auto', str(tmp_path/'absent.pth'))
    with pytest.raises(ConfigError): FanDetector(face_detector='haar')


def test_auto_takes_fan_from_torchs_cache(random_weights, no_network, monkeypatch, tmp_path):
    monkeypatch.setenv('TORCH_HOME', str(random_weights.parents[1]))
    with make_detector('auto') as detector: assert detector.name == 'fan'
    files = find_fan_files()
    assert (files.landmarks, files.boxes) == (random_weights/FAN_FILE, random_weights/S3FD_FILE)
    alone = tmp_path/'my_fan.pth'; alone.symlink_to(files.landmarks)
    assert find_fan_files(str(alone)) == (alone, files.boxes)          # S3FD from the cache
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'empty'))
    assert find_fan_files(str(alone)).boxes is None
    with pytest.raises(WeightsUnavailable, match=S3FD_FILE): FanDetector(str(alone), face_detector='s3fd')


def test_damaged_fan_weights(random_weights, tmp_path):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'executed'),)
    import pickle
    import torch
    torch.save({'conv1.weight': torch.zeros(1)}, tmp_path/'other.pth')
    (tmp_path/'cut.pth').write_bytes((random_weights/FAN_FILE).read_bytes()[:100_000])
    (tmp_path/'empty.pth').write_bytes(b'')
    (tmp_path/'evil.pth').write_bytes(pickle.dumps(Evil()))
    torch.save(Evil(), tmp_path/'evil_zip.pth')
    for name in ('other', 'cut', 'empty', 'evil', 'evil_zip'):
        with pytest.raises(CheckpointError, match=rf'{name}\.pth: not the weights of FAN'): FanDetector(str(tmp_path/f'{name}.pth'))
    assert not (tmp_path/'executed').exists()


def test_importing_the_room_loads_no_heavy_package():
    program = 'import sys, talking_face.signals.detectors; print([name for name in ("dlib", "torch", "face_alignment", "mediapipe", "matplotlib") if name in sys.modules])'
    assert subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True).stdout.strip() == '[]'


# --- MediaPipe

def test_mediapipe_is_an_extra(monkeypatch):
    find = room.importlib.util.find_spec
    monkeypatch.setattr(room.importlib.util, 'find_spec', lambda name: None if name == 'mediapipe' else find(name))
    with pytest.raises(ConfigError, match='pip install mediapipe'): make_detector('mediapipe')


def test_mediapipe_model_is_found_or_refused(monkeypatch, tmp_path):
    monkeypatch.setenv('TALKING_FACE_CACHE', str(tmp_path/'cache')); monkeypatch.setattr(room, 'MEDIAPIPE_SOURCE', 'http://127.0.0.1:1/face_landmarker.task')
    with pytest.raises(WeightsUnavailable, match='cache/face_landmarker.task, or name it with --weights; or use --detector dlib$'): find_mediapipe_file()
    for absent in (tmp_path, tmp_path/'absent.task'):
        with pytest.raises(WeightsUnavailable, match='there is no face_landmarker.task'): find_mediapipe_file(str(absent))
    bundle = tmp_path/'face_landmarker_v2.task'; bundle.write_bytes(b'anything')
    assert find_mediapipe_file(str(tmp_path)) == find_mediapipe_file(str(bundle)) == bundle


@pytest.fixture(scope='module')
def mediapipe_detector():
    pytest.importorskip('mediapipe', reason='the mediapipe extra is not installed')
    if not list(MODELS.glob('face_landmarker*.task')): pytest.skip('needs the Face Landmarker bundle (../shared/models)')
    with pytest.warns(UserWarning, match='metrics'): detector = MediapipeDetector(str(MODELS))
    with detector: yield detector


def test_mediapipe_version_and_known_bundle(mediapipe_detector):
    assert mediapipe_detector.version.endswith(MEDIAPIPE_SHA256[:8]) and mediapipe_detector.name == 'mediapipe'


def test_mediapipe_damaged_bundle(mediapipe_detector, tmp_path):
    bundle = tmp_path/'face_landmarker.task'; bundle.write_bytes(b'not a bundle')
    with pytest.raises(CheckpointError, match='face_landmarker.task: not a Face Landmarker bundle'), pytest.warns(UserWarning): MediapipeDetector(str(bundle))


@pytest.mark.parametrize('wide', [False, True])
def test_mediapipe_points_are_ibug_points(mediapipe_detector, frame, wide):
    "Against the rendered truth, with no constant shift, also in a picture that is not square; irises inside the eyes."
    truth = np.load(EMBEDDED/'syn01/syn01_c0.npz')['landmarks'][0]
    face, = mediapipe_detector.detect(np.pad(frame, ((0, 0), (0, 200), (0, 0)), 'edge') if wide else frame)
    assert percent(face.landmarks, truth) < 7
    assert abs((face.landmarks - truth)[17:, 0].mean()) < 0.8   # half a pixel more or less would not show here, a swapped axis would
    for iris, eye in zip(face.irises, ('right_eye', 'left_eye')):
        contour = face.landmarks[list(PARTS[eye])]
        assert (contour.min(0) < iris[0]).all() and (iris[0] < contour.max(0)).all() and np.linalg.norm(iris[0] - iris[1:].mean(0)) < 1.5


def test_mediapipe_mirror(mediapipe_detector, frame):
    "The table is symmetric: the mirrored picture has the mirrored points."
    straight, mirrored = (mediapipe_detector.detect(picture)[0] for picture in (frame, frame[:, ::-1]))
    assert percent(mirrored.landmarks[FLIP_ORDER] * (-1, 1) + (frame.shape[1] - 1, 0), straight.landmarks) < 2.5
    assert np.abs(mirrored.irises[::-1, 0] * (-1, 1) + (frame.shape[1] - 1, 0) - straight.irises[:, 0]).max() < 2


@real_data
@pytest.mark.parametrize('file', ['id01/lp_d0', 'id11/lp_s20', 'id15/vr_face1', 'id23/pc_681100216', 'id28/grid_brbk7n'])
def test_mediapipe_agrees_with_dlib_on_real_clips(mediapipe_detector, dlib_detector, file):
    frames = read_video(SHARED/f'clips/{file}.mp4', maximum_frames=10)
    ours, theirs = track_face(frames, mediapipe_detector), track_face(frames, dlib_detector)
    assert (ours.scores > 0).all() and percent(ours.landmarks, theirs.landmarks) < 5


@real_data
def test_mediapipe_finds_what_dlib_misses(mediapipe_detector):
    detect_face(read_image(SHARED/'stills/photo_curly_glasses.jpg'), mediapipe_detector)
    assert mediapipe_detector.detect(read_image(SHARED/'stills/noface_grass.jpg')) == []
    track = track_face(read_video(SHARED/'clips/id19/pc_00002.mp4', maximum_frames=60), mediapipe_detector)
    assert (track.scores > 0).mean() > 0.9
