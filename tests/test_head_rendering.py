"""The renderer of synthetic heads: exact coverage under fuzz, the same picture on another processor, faces that a detector finds where the truth says."""
import os, subprocess, sys
from pathlib import Path

import numpy as np
import pytest

from talking_face.core import generator_for
from talking_face.data.head_model import find_head_assets, load_head_model

ROOT = Path(__file__).resolve().parents[1]
FRAME = """
import sys
import numba
import numpy as np
from talking_face.core import generator_for
from talking_face.data.head_model import find_head_assets, load_head_model
from talking_face.data.head_scene import HeadScene, HeadState, draw_view
from talking_face.data.head_shape import draw_identity
scene = HeadScene(load_head_model(find_head_assets()), draw_identity(17), 96, texture=512)
view = draw_view(17)
result = scene.render(HeadState({'mouth-open': .4, 'eye-left-closure': .3}, .3, -.1, .05, (.1, .05)), view, generator_for(1))
np.savez(sys.argv[1], **result._asdict(), processor=str(numba.config.CPU_NAME))
"""


def model():
    if not find_head_assets(): pytest.skip('the head assets are not here')
    return load_head_model(find_head_assets())


def test_random_sheets_have_no_holes_and_no_sample_twice():
    from talking_face.data.head_rasteriser import rasterise
    for seed in range(40):
        random = generator_for(seed, 15)
        cells, size = int(random.integers(2, 30)), int(random.integers(20, 90))
        side = np.linspace(-random.uniform(0, 9), size + random.uniform(0, 9), cells + 1)     # a sheet that reaches over the picture's edges
        corners = np.stack(np.meshgrid(side, side), -1)
        corners[1:-1, 1:-1] += random.uniform(-.24, .24, (cells - 1, cells - 1, 2)) * (side[1] - side[0])
        if seed % 4 == 0: corners = np.round(corners)                                         # corners on samples, edges through them
        first = (np.arange(cells)[:, None] * (cells + 1) + np.arange(cells)).ravel()
        second = [np.stack([first, first + 1, first + cells + 2], 1), np.stack([first, first + cells + 2, first + cells + 1], 1)]
        points = np.column_stack([corners.reshape(-1, 2), random.uniform(1, 5, (cells + 1) ** 2)])
        hits = np.zeros((size, size), int)
        for triangle in np.concatenate(second): hits += rasterise(points, random.permutation(triangle)[None], size, size).triangle >= 0
        inside = (np.arange(size) >= corners[0, 0, 0]) & (np.arange(size) < corners[0, -1, 0])
        assert (hits == np.outer(inside, inside)).all(), f'seed {seed}: {hits.min()} to {hits.max()} hits'


def test_hostile_triangles_change_nothing():
    from talking_face.data.head_rasteriser import rasterise
    points = np.array([[5, 5, 1], [5, 5, 1], [20, 5, 1], [35, 5, 1], [1e6, -1e6, 1], [-1e6, 3, 1], [10, 10, -1], [12, 30, 0], [3, 4, 1.]])
    for corners in ([0, 1, 2], [0, 2, 3], [6, 2, 8], [7, 2, 8]):                              # no area, a line, behind the camera, in it
        assert (rasterise(points, np.array([corners]), 32, 32).triangle == -1).all(), corners
    far = rasterise(points, np.array([[4, 5, 8]]), 32, 32)                                    # corners far outside
    assert np.isfinite(far.nearness).all()
    assert (rasterise(points, np.zeros((0, 3), int), 8, 8).triangle == -1).all()


def test_another_processor_renders_the_same_frame(tmp_path):
    model()
    results = []
    for name in ('', 'generic'):
        path = tmp_path/f'frame{name}.npz'
        settings = {key: value for key, value in os.environ.items() if key != 'NUMBA_CPU_NAME'} | ({'NUMBA_CPU_NAME': name} if name else {})
        done = subprocess.run([sys.executable, '-c', FRAME, path], cwd=ROOT, env=settings | {'OMP_NUM_THREADS': '1', 'NUMBA_NUM_THREADS': '1'}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        results.append(dict(np.load(path)))
    here, there = results
    assert str(here['processor']) != 'generic' == str(there['processor'])
    assert here['landmarks'].tobytes() == there['landmarks'].tobytes() and here['landmarks_3d'].tobytes() == there['landmarks_3d'].tobytes()
    difference = np.abs(here['picture'].astype(int) - there['picture'])
    print('largest difference in grey levels:', difference.max())
    assert difference.max() <= 2 and (here['face_mask'] != there['face_mask']).mean() < 1e-3


def test_a_detector_finds_the_faces_where_the_truth_says():
    from talking_face.data.head_scene import HeadScene, HeadState, draw_view
    from talking_face.data.head_shape import draw_identity
    from talking_face.signals.detectors import make_detector
    head, detector, errors = model(), make_detector('dlib'), []
    for seed in (400, 401, 402):
        scene, random = HeadScene(head, draw_identity(seed), 256, texture=512), generator_for(seed, 1)
        for take in range(2):
            yaw, pitch, roll = np.radians(random.uniform(-1, 1, 3) * [20, 10, 6])
            result = scene.render(HeadState({'mouth-open': float(random.uniform(0, .4))}, yaw, pitch, roll), draw_view(seed, take), random)
            faces = detector.detect(result.picture)
            assert len(faces) == 1, f'{len(faces)} faces in the picture of person {seed}, take {take}'
            eyes = np.linalg.norm(result.landmarks[36] - result.landmarks[45])
            errors.append(np.linalg.norm(faces[0].landmarks - result.landmarks, axis=1).mean() / eyes)
            assert result.face_mask[tuple(result.landmarks[27:48].round().astype(int).T[::-1])].mean() > .8
    print('mean distance from the detector, in eye distances:', np.round(errors, 3))
    assert np.mean(errors) < .06 and max(errors) < .12


def test_the_rest_of_the_house_does_not_load_the_renderer():
    code = 'import sys, talking_face.app.cli, talking_face.data.episodes, talking_face.data.preprocessing; print([name for name in ("numba", "talking_face.data.head_rasteriser") if name in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == '[]', done.stdout + done.stderr
