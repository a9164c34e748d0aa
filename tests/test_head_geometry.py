"""The synthetic head's geometry: file formats under damage, fitting against a plain loop, people, expressions, landmarks and dress over many people."""
import dataclasses, hashlib, json, os, subprocess, sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from talking_face.core import DataError
from talking_face.data.head_dress import clothes_pieces, cut_surface, dress_pieces, glasses_pieces, neckline_field
from talking_face.data.head_landmarks import HeadLandmarks
from talking_face.data.head_model import Material, Piece, find_head_assets, fit_piece, load_head_model, piece_bone_weights, read_mesh, read_piece, read_target
from talking_face.data.head_shape import (CLOTHES_STYLES, EXPRESSION_UNITS, GLASSES_STYLES, LIDS, HeadPose, Identity, draw_identity, express, neck_pivot, shape_vertices,
                                          tongue_offsets, turn)

try: FOLDER = find_head_assets()
except DataError: FOLDER = ''
assets = pytest.mark.skipif(not FOLDER, reason='the head assets are not here (set TALKING_FACE_HEAD_ASSETS to their folder)')


@pytest.fixture(scope='module')
def model():
    return load_head_model(FOLDER)


@pytest.fixture(scope='module')
def landmarks(model):
    return HeadLandmarks(model)


@pytest.fixture(scope='module')
def people(model):
    "Sixteen people with their bodies."
    return [(identity, shape_vertices(model, identity)) for identity in map(draw_identity, range(900, 916))]


# ---- formats ----

OBJ = 'o thing\nv 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\ng side\nf 1/1 2/2 3/3 4/4\n'
TARGET = '# moves\n0 .1 -.2 .003\n3 1e-3 0 0\n'
BINDING = 'name it\nobj_file it.obj\nx_scale 0 1 1.0\nverts 0\n0\n1\n0 1 2 .2 .3 .5 .1 0 -.1\n3\nmaterial it.mhmat\n'


def test_polygons_become_fans(tmp_path):
    for corners in range(3, 9):
        angles = np.arange(corners) * 2 * np.pi / corners
        points = np.stack([np.cos(angles), np.sin(angles), 0 * angles], 1)
        (tmp_path/'n.obj').write_text(''.join('v %r %r %r\n' % tuple(point) for point in points.tolist()) + f'f {" ".join(str(i + 1) for i in range(corners))}\n')
        mesh = read_mesh(tmp_path/'n.obj')
        a, b, c = (mesh.vertices[mesh.triangles[:, corner]] for corner in range(3))
        area = np.cross(b - a, c - a)[:, 2] / 2
        assert len(mesh.triangles) == corners - 2 and (area > 0).all() and area.sum() == pytest.approx(corners / 2 * np.sin(2 * np.pi / corners))
        assert np.array_equal(mesh.vertices, points)


@pytest.mark.parametrize('name, text, read', [('it.obj', OBJ, read_mesh), ('it.target', TARGET, lambda path: read_target(path, 4)), ('it.mhclo', BINDING, lambda path: read_piece(path, 4))],
                         ids=('obj', 'target', 'mhclo'))
def test_damage_is_named_or_harmless(tmp_path, name, text, read):
    "Whatever happens to a file, its reader returns something whole or says which file is damaged; nothing else is raised."
    (tmp_path/'it.obj').write_text(OBJ)
    path, random, refused = tmp_path/name, np.random.default_rng(5), 0
    path.write_text(text)
    whole = read(path)
    assert all(np.isfinite(part).all() for part in whole if isinstance(part, np.ndarray) and part.dtype.kind == 'f')
    for trial in range(300):
        data = bytearray(text.encode())
        place = int(random.integers(len(data)))
        if trial % 3 == 0: del data[place:]
        elif trial % 3 == 1: data[place] = int(random.integers(256))
        else: data[place:place + int(random.integers(1, 6))] = random.choice([b' nan', b' 1e999', b' -7', b'\n', b'/', b' 99999999', b'f'])
        path.write_bytes(bytes(data))
        try: result = read(path)
        except DataError as error:
            refused += 1
            assert name in str(error) or 'it.obj' in str(error)
        else: assert all(np.isfinite(part).all() for part in result if isinstance(part, np.ndarray) and part.dtype.kind == 'f')
    assert refused > 60


def test_fit_against_a_plain_loop():
    random = np.random.default_rng(0)
    body = random.normal(size=(30, 3))
    piece = Piece('it', random.integers(0, 30, (12, 3)), random.dirichlet([1, 1, 1], 12), random.normal(size=(12, 3)), np.array([[3, 7, .5], [0, 0, 0], [9, 2, 2.]]),
                  np.array([[0, 1, 2]]), np.zeros((1, 2)), np.zeros((1, 3), int))
    scale = [abs(body[3, 0] - body[7, 0]) / .5, 1, abs(body[9, 2] - body[2, 2]) / 2]
    expected = [[sum(piece.weights[vertex, corner] * body[piece.references[vertex, corner], axis] for corner in range(3)) + piece.offsets[vertex, axis] * scale[axis] for axis in range(3)]
                for vertex in range(12)]
    assert np.allclose(fit_piece(piece, body), expected, atol=1e-12)


def test_assets_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv('TALKING_FACE_HEAD_ASSETS', str(tmp_path))
    with pytest.raises(DataError, match='base.obj'): find_head_assets()
    with pytest.raises(DataError, match='base.obj'): load_head_model(tmp_path)


@assets
def test_model_is_whole(model):
    assert model.triangles.max() < len(model.vertices) and model.uv_triangles.max() < len(model.uv) and model.triangles.shape == model.uv_triangles.shape
    assert np.unique(model.numbers).size == len(model.numbers) == len(model.vertices) == len(model.bone_weights)
    for name, target in model.targets.items():
        assert len(target.indices) == len(target.offsets) and (len(target.indices) == 0 or 0 <= target.indices.min() <= target.indices.max() < len(model.vertices)), name
    for piece in model.pieces.values():
        assert len(piece.references) == len(piece.weights) == len(piece.offsets) and piece.references.max() < len(model.vertices) and piece.triangles.max() < len(piece.references)
        assert np.isfinite(fit_piece(piece, model.vertices)).all() and piece.uv_triangles.max() < len(piece.uv)


# ---- people ----

def test_people_are_plain_and_different():
    people = [draw_identity(seed) for seed in range(600)]
    def plain(value):
        if isinstance(value, dict): return all(type(key) is str and plain(part) for key, part in value.items())
        return all(map(plain, value)) if type(value) in (list, tuple) else type(value) in (int, float, str)
    assert all(plain(person.to_dict()) for person in people)
    assert len({json.dumps(person.sliders) for person in people}) == len(people)
    assert all(0 <= getattr(person, name) <= 1 for person in people for name in ('female', 'age', 'muscle', 'weight', 'skin_redness', 'freckles', 'wrinkles', 'grey', 'brow_density', 'brow_thickness',
                                                                                 'beard', 'lip_redness', 'lipstick', 'eye_makeup', 'teeth_shade', 'teeth_irregularity'))
    assert all(0 < channel < 1 for person in people for name in ('skin_colour', 'iris_colour', 'hair_colour', 'lipstick_colour', 'glasses_colour', 'clothes_colour') for channel in getattr(person, name))
    assert Identity.from_dict(json.loads(json.dumps(people[3].to_dict()))) == people[3]


@assets
def test_bodies_are_human(model, people):
    "Sizes in decimetres over sixteen people: wide limits, but nobody may leave them."
    for identity, body in people:
        points = body[model.landmark_vertices]
        eyes = model.group_centre('helper-l-eye', body)[0] - model.group_centre('helper-r-eye', body)[0]
        assert .50 < eyes < .72 and .8 < points[27, 1] - points[8, 1] < 1.5 and 1.1 < points[16, 0] - points[0, 0] < 1.8, identity.seed
        asymmetry = np.abs(points[36:42, 1].mean() - points[42:48, 1].mean())
        assert asymmetry < .06 and points[30, 2] > points[27, 2]


@assets
def test_everybody_can_do_everything(model, people):
    random = np.random.default_rng(1)
    for identity, body in people:
        for unit in random.choice(EXPRESSION_UNITS, 6, replace=False):
            moved = np.abs(express(model, identity, body, {str(unit): 1.}) - express(model, identity, body, {})).max()
            assert .005 < moved < .6, (identity.seed, unit, moved)
        for unit, pairs in LIDS.items():
            above, below = model.landmark_vertices[np.array(pairs).T]
            for weight in (.3, 1.):
                slits = [float((shape[above, 1] - shape[below, 1]).sum()) for shape in (express(model, dataclasses.replace(identity, resting={}), body, {unit: share}) for share in (0., weight))]
                assert slits[1] == pytest.approx((1 - weight) * slits[0], abs=1e-9)
    with pytest.raises(ValueError, match='smirk'): express(model, identity, body, {'smirk': 1.})


@assets
def test_tongue_is_where_it_speaks(model, people):
    "For th the tip is in front of the teeth but behind the lips, and between the lips; for l it is behind the upper teeth; with nothing said it moves with nothing."
    teeth, tongue = model.pieces['teeth_base'], model.pieces['tongue01']
    tip = fit_piece(tongue, model.vertices)[:, 2].argmax()
    front = np.abs(fit_piece(teeth, model.vertices)[:, 0]) < .05
    for identity, body in people:
        for key, opened in (('tongue-out', .25), ('tongue-up', .3)):
            shape = express(model, identity, body, {'mouth-open': opened})
            x, y, z = (fit_piece(tongue, shape) + tongue_offsets(model, {'mouth-open': opened, key: 1.}))[tip]
            upper, lower = shape[model.landmark_vertices[[62, 66]]]
            foremost = fit_piece(teeth, shape)[front, 2].max()
            assert lower[1] - .05 < y < upper[1] + .03 and z < upper[2] + .05, (identity.seed, key, y - upper[1], y - lower[1], z - upper[2])
            assert (z > foremost) == (key == 'tongue-out'), (identity.seed, key, z - foremost)
    assert not tongue_offsets(model, {}).any() and tongue_offsets(model, {'mouth-open': 1.})[tip, 1] < -.1


# ---- landmarks ----

def project(vertices, middle_y, size=256, distance=14., height=3.):
    scale = size / height * distance / (distance - vertices[:, 2])
    return np.stack([size / 2 + vertices[:, 0] * scale, size / 2 - (vertices[:, 1] - middle_y) * scale], 1)


def posed(model, identity, body, pose, expression={}):
    unposed = express(model, identity, body, expression)
    return unposed, project(turn(unposed, model.bone_weights, neck_pivot(model, body), pose), body[model.landmark_vertices[30], 1])


POSES = [HeadPose(*np.radians(angles)) for angles in ((0, 0, 0), (25, 0, 0), (-25, 0, 0), (12, 10, 5), (-18, -10, -8))]


@assets
def test_jaw_is_ordered_even_and_on_the_outline(model, landmarks, people):
    "A second implementation: paint the face (no ears, no neck) and ask how far the jaw points of the far side are from the border of the paint."
    ears = np.zeros(len(model.vertices), bool)
    for side in 'lr': ears[model.targets[f'ears/{side}-ear-wing-incr'].indices] = True
    corners = model.vertices[model.triangles]
    face = model.triangles[~ears[model.triangles].any(1) & (corners[..., 1].min(1) > 6.15) & (corners[..., 2].min(1) > .45) & (corners[..., 2].max(1) > .7)]
    gaps = []
    for identity, body in people[:8]:
        for pose in POSES:
            unposed, flat = posed(model, identity, body, pose)
            points, solid = landmarks.points(unposed, flat)
            assert points.shape == (68, 2) and solid.shape == (68, 3) and np.isfinite(points).all()
            steps = np.sqrt((np.diff(points[:17], axis=0) ** 2).sum(1))
            for half in (steps[:8], steps[8:]): assert half.max() < 2.2 * half.min(), (identity.seed, pose)
            around = points[:17] - points[27:36].mean(0)
            assert (np.diff(np.arctan2(around[:, 0], around[:, 1])) > .03).all(), (identity.seed, pose)    # around the nose, from the picture's left to its right
            far = slice(11, 16) if pose.yaw > .2 else slice(1, 6) if pose.yaw < -.2 else slice(0, 0)
            paint = np.zeros((256 * 4, 256 * 4), np.uint8)
            for triangle in face: cv2.fillConvexPoly(paint, np.round(flat[triangle] * 4).astype(np.int32), 255)
            edge = cv2.distanceTransform(255 - cv2.Canny(paint, 50, 150), cv2.DIST_L2, 5) / 4
            gaps += [edge[int(round(y * 4)), int(round(x * 4))] for x, y in points[far]]
    assert len(gaps) == 8 * 4 * 5 and np.median(gaps) < .75 and np.quantile(gaps, .9) < 1.5 and max(gaps) < 2.5, np.quantile(gaps, [.5, .9, 1])


@assets
def test_landmarks_move_smoothly(model, landmarks, people):
    "A tenth of a degree per step: no point of the outline may jump further than points of the skin move, because a jump would be a tremor in every drawing."
    for identity, body in people[:4]:
        track = np.array([landmarks.points(*posed(model, identity, body, HeadPose(np.radians(yaw), .05, .02)))[0] for yaw in np.arange(-25, 25, .1)])
        steps = np.sqrt((np.diff(track, axis=0) ** 2).sum(-1))
        assert steps.max() < .4, (identity.seed, steps.max(0))


@assets
def test_landmarks_follow_the_face(model, landmarks, people):
    identity, body = people[5]
    def at(expression): return landmarks.points(*posed(model, identity, body, HeadPose(), expression))[0]
    rest, opened, shut, smile = at({}), at({'mouth-open': .6}), at({'eye-left-closure': 1.}), at({'mouth-corner-puller': .8})
    assert opened[66, 1] - opened[62, 1] > rest[66, 1] - rest[62, 1] + 5 and opened[8, 1] > rest[8, 1] + 2 and np.abs(opened[17:27] - rest[17:27]).max() < .5
    assert (shut[46:48, 1] - shut[[44, 43], 1]).mean() < .4 * (rest[46:48, 1] - rest[[44, 43], 1]).mean() and np.abs(shut[36:42] - rest[36:42]).max() < .5
    assert smile[54, 0] - smile[48, 0] > rest[54, 0] - rest[48, 0] + 1


PROGRAM = '''
import hashlib, numpy as np
from talking_face.data.head_landmarks import HeadLandmarks
from talking_face.data.head_model import find_head_assets, load_head_model
from talking_face.data.head_shape import HeadPose, draw_identity, express, neck_pivot, shape_vertices, turn
model = load_head_model(find_head_assets()); landmarks, found = HeadLandmarks(model), []
for seed in range(3):
    identity = draw_identity(seed); body = shape_vertices(model, identity)
    for yaw in (-.4, .1, .3):
        unposed = express(model, identity, body, {'mouth-open': .4, 'eye-left-closure': .5})
        posed = turn(unposed, model.bone_weights, neck_pivot(model, body), HeadPose(yaw, .1, -.05))
        found += landmarks.points(unposed, posed[:, :2] * 14 / (14 - posed[:, 2:]) * 100)
print(hashlib.sha256(b''.join(np.float32(np.round(points * 1024) / 1024).tobytes() for points in found)).hexdigest())
'''


@assets
def test_landmarks_are_the_same_bytes_everywhere(tmp_path):
    "With a fresh cache, with the kept copy, with other numbers of threads, and with numpy's vector instructions switched off."
    plain = {name: value for name, value in os.environ.items() if name not in ('NPY_DISABLE_CPU_FEATURES', 'OMP_NUM_THREADS')}
    plain |= {'TALKING_FACE_CACHE': str(tmp_path), 'TALKING_FACE_HEAD_ASSETS': FOLDER}
    found = np._core._multiarray_umath.__cpu_features__
    switchable = [name for name in ('AVX2', 'FMA3', 'AVX512F', 'AVX512_SKX', 'AVX512_ICL', 'ASIMDDP') if found.get(name) and name in np._core._multiarray_umath.__cpu_dispatch__]
    answers = {subprocess.run([sys.executable, '-c', PROGRAM], env=plain | extra, capture_output=True, text=True, check=True).stdout
               for extra in ({}, {'OMP_NUM_THREADS': '1'}, {'NPY_DISABLE_CPU_FEATURES': ' '.join(switchable)} if switchable else {})}
    assert len(answers) == 1 and len(answers.pop()) == 65


# ---- dress ----

@assets
def test_dress_fits_everybody(model, people):
    for number, (identity, body) in enumerate(people):
        identity = dataclasses.replace(identity, clothes=CLOTHES_STYLES[number % 5], glasses=GLASSES_STYLES[1 + number % 4])
        worn = dress_pieces(model, identity, body)
        assert [item.material for item in worn] == [Material.CLOTH] * 2 + [Material.FRAME] + [Material.LENS] * 2
        for item in worn:
            piece, places = item.piece, fit_piece(item.piece, body)
            assert np.isfinite(places).all() and np.allclose(piece.weights.sum(1), 1) and piece.triangles.min() >= 0 and piece.triangles.max() < len(places) == piece.triangles.max() + 1
            shares = piece_bone_weights(piece, model)
            assert 0 <= shares.min() and shares.max() <= 1 and all(0 <= channel <= 1 for channel in item.colour)
        lens = fit_piece(worn[3].piece, body)
        eye = model.group_centre('helper-l-eye', body)
        assert np.abs(lens.mean(0)[:2] - eye[:2]).max() < .08 and .1 < lens[:, 2].mean() - eye[2] < .45, identity.seed          # in front of the eye, not on the forehead
        assert glasses_pieces(model, dataclasses.replace(identity, glasses=''), body) == []


@assets
def test_cloth_stays_outside_when_the_head_turns(model, people):
    "The cloth's vertices keep their distance from the skin below them, whatever the pose, because both turn alike."
    for identity, body in people[:5]:
        cloth = clothes_pieces(model, identity, body)[0].piece
        pivot = neck_pivot(model, body)
        for pose in POSES:
            skin = turn(body, model.bone_weights, pivot, pose)
            places = turn(fit_piece(cloth, body), piece_bone_weights(cloth, model), pivot, pose)
            below = (skin[cloth.references] * cloth.weights[..., None]).sum(1)
            distance = np.sqrt(((places - below) ** 2).sum(1))
            assert distance.min() > .015 and distance.max() < .6


def test_cutting_random_fields_keeps_the_area():
    "What is below zero and what is above it are together the whole, for any field on any mesh."
    random = np.random.default_rng(3)
    grid = np.arange(49).reshape(7, 7)
    triangles = np.concatenate([np.stack([grid[:-1, :-1], grid[1:, :-1], grid[:-1, 1:]], -1).reshape(-1, 3), np.stack([grid[1:, :-1], grid[1:, 1:], grid[:-1, 1:]], -1).reshape(-1, 3)])
    points = np.stack([*np.divmod(np.arange(49), 7), np.zeros(49)], 1) + random.normal(0, .1, (49, 3))
    def area(places, faces): return np.sqrt((np.cross(places[faces[:, 1]] - places[faces[:, 0]], places[faces[:, 2]] - places[faces[:, 0]]) ** 2).sum(1)).sum() / 2
    for _ in range(20):
        field, total = random.normal(size=49), 0.
        for sign in (1, -1):
            references, weights, faces, edge = cut_surface(triangles, sign * field)
            assert np.allclose((field[references] * weights).sum(1)[edge], 0, atol=1e-12) and np.allclose(weights.sum(1), 1)
            total += area((points[references] * weights[..., None]).sum(1), faces)
        assert total == pytest.approx(area(points, triangles))


@assets
def test_covered_skin_is_what_the_field_says(model):
    for style in CLOTHES_STYLES:
        field = neckline_field(style, model.vertices)
        face = model.vertices[model.landmark_vertices]
        assert (neckline_field(style, face) > 0).all() and (field[model.vertices[:, 1] < 4.9] < 0).all()
