"""Geometry and drawing: random matrices and faces, pairs of all embedded people, difficult photos, real clips."""
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np, pytest

from talking_face.core import ConfigError, NoFaceError
from talking_face.signals.adaptation import adapt_landmarks, fit_adaptation
from talking_face.signals.drawing import PALETTES, Palette, draw_landmarks
from talking_face.signals.geometry import clip_crop, compose, fill_gaps, frame_crop, invert, similarity, transform_points, warp_image
from talking_face.signals.landmarks import INNER_LIP_PAIRS, interocular_distance, mouth_opening

EMBEDDED, SHARED = Path('data/embedded/clips'), Path('../shared/data')
NAMES = [f'syn{i:02d}' for i in range(1, 13)]


def embedded(name: str) -> np.ndarray: return np.load(EMBEDDED/name[:5]/f'{name}.npz')['landmarks']


def turned(degrees: float, scale: float, shift=(0., 0.)) -> np.ndarray:
    c, s = scale*np.cos(np.radians(degrees)), scale*np.sin(np.radians(degrees))
    return np.array([[c, -s, shift[0]], [s, c, shift[1]]])


def about(point, degrees, scale, place) -> np.ndarray:
    matrix = turned(degrees, scale)
    matrix[:, 2] = np.asarray(place) - matrix[:, :2] @ point
    return matrix


def error(a: np.ndarray, b: np.ndarray) -> float:
    "Mean distance of the points in per cent of the inter-ocular distance."
    return float(100*np.nanmean(np.linalg.norm(a - b, axis=-1)/interocular_distance(b)[:, None]))


def shape_distance(a: np.ndarray, b: np.ndarray) -> float:
    "Distance of two shapes (68, 2) after the best similarity, in per cent of b's inter-ocular distance."
    return error(transform_points(a, similarity(a, b))[None].astype(float), b[None])


def smallest_gap(points: np.ndarray) -> float:
    "The most crossed lip or lid of a clip, signed, in per cent of the inter-ocular distance (measured by hand, not by the package)."
    across = points[:, [42, 45]].mean(1) - points[:, [36, 39]].mean(1)
    down = np.stack([-across[:, 1], across[:, 0]], -1)/np.linalg.norm(across, axis=-1, keepdims=True)
    pairs = (*INNER_LIP_PAIRS, (37, 41), (38, 40), (43, 47), (44, 46))
    return float(min((100*((points[:, low] - points[:, up])*down).sum(-1)/interocular_distance(points)).min() for up, low in pairs))


def eye_opening(points: np.ndarray) -> np.ndarray:
    return np.linalg.norm(points[:, [37, 38, 43, 44]] - points[:, [41, 40, 47, 46]], axis=-1).mean(-1)/interocular_distance(points)


# matrices and pictures

def test_random_matrices_invert_and_compose():
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b, points = rng.normal(size=(2, 3)), rng.normal(size=(2, 3)), rng.normal(scale=100, size=(68, 2))
        if min(abs(np.linalg.det(m[:, :2])) for m in (a, b)) < 0.05: continue
        assert np.allclose(transform_points(points, compose(a, invert(a))), points, atol=1e-8)
        assert np.allclose(invert(compose(a, b)), compose(invert(b), invert(a)))
    exact = turned(33, 1.7, (5, -8))
    assert np.allclose(similarity(points, transform_points(points, exact)), exact)
    mirrored = similarity(points, points*[-1, 1])
    assert np.linalg.det(mirrored[:, :2]) >= 0, 'a similarity must never mirror a face'


@pytest.mark.parametrize('call', [
    lambda: transform_points(np.zeros((5, 3)), turned(0, 1)), lambda: transform_points(np.zeros((5, 2)), np.zeros((3, 3))),
    lambda: transform_points(np.zeros((5, 2)), np.full((2, 3), np.nan)), lambda: similarity(np.zeros((4, 2)), np.zeros((5, 2))),
    lambda: similarity(np.full((4, 2), np.nan), np.zeros((4, 2))), lambda: similarity(np.ones((4, 2)), np.ones((4, 2))),
    lambda: warp_image(np.zeros((8, 8), np.uint8), turned(0, 1), 8), lambda: warp_image(np.zeros((8, 8, 3), np.float32), turned(0, 1), 8),
    lambda: warp_image(np.zeros((8, 8, 3), np.uint8), turned(0, 1), 8, 'wrap'), lambda: warp_image(np.zeros((8, 8, 3), np.uint8), turned(0, 0), 8),
    lambda: clip_crop(np.zeros((68, 2))), lambda: clip_crop(np.zeros((3, 68, 2))), lambda: clip_crop(np.ones((3, 68, 2)), margin=0),
    lambda: adapt_landmarks(np.zeros((3, 68, 2)), np.zeros((68, 2))), lambda: adapt_landmarks(np.zeros((3, 68, 2)), np.zeros((1, 68, 2)), 'median'),
    lambda: draw_landmarks(np.zeros((67, 2)), 64), lambda: draw_landmarks(np.zeros((68, 2)), 0)])
def test_wrong_shapes_are_refused(call):
    with pytest.raises(ValueError): call()


def test_dots_stay_on_their_points():
    rng, (y, x), worst = np.random.default_rng(1), np.mgrid[:300, :400], 0.
    for _ in range(25):
        scale, point = float(np.exp(rng.uniform(np.log(0.15), np.log(2.5)))), rng.uniform((60, 60), (340, 240))
        size, sigma = 96, max(1.5, 1.8/scale)
        picture = np.repeat((255*np.exp(-((x - point[0])**2 + (y - point[1])**2)/(2*sigma**2))).round().astype(np.uint8)[..., None], 3, -1)
        place = rng.uniform(40, 56, 2)
        matrix = about(point, rng.uniform(-180, 180), scale, place)
        light = warp_image(picture, matrix, size)[..., 0].astype(float)
        centre = np.array([light.sum(0) @ np.arange(size), light.sum(1) @ np.arange(size)])/light.sum()
        worst = max(worst, float(np.linalg.norm(centre - place)))
    assert worst < 0.1, worst


def test_upright_stays_upright():
    picture = np.zeros((60, 100, 3), np.uint8)
    picture[5:15, 80:95] = (255, 0, 0)  # red, top right
    matrix = frame_crop(np.stack([np.linspace(10, 90, 68), np.linspace(5, 55, 68)], -1), 1.0).matrix(50)
    result = warp_image(picture, matrix, 50)
    row, column = np.array(np.unravel_index(result[..., 0].argmax(), (50, 50)))
    assert column > 35 and row < 20 and not result[..., 1:].any()


@pytest.mark.parametrize('border', ['replicate', 'reflect'])
@pytest.mark.parametrize('scale', [0.21, 0.5, 0.9, 1.0, 1.6])
def test_flat_pictures_stay_flat_and_borders_continue_them(scale, border):
    flat = np.full((40, 30, 3), (10, 128, 250), np.uint8)
    assert (warp_image(flat, about((15, 20), 25, scale, (40, 40)), 80, border) == (10, 128, 250)).all()


def test_picture_that_is_not_contiguous():
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    matrix = about((32, 32), 5, 0.6, (16, 16))
    assert (warp_image(picture[:, ::-1, ::-1], matrix, 32) == warp_image(picture[:, ::-1, ::-1].copy(), matrix, 32)).all()


def test_brightness_is_kept_at_every_scale():
    picture = np.random.default_rng(0).integers(40, 216, (512, 512, 3), dtype=np.uint8)  # noise: the worst case for aliasing
    for scale in np.linspace(0.1, 1, 19):
        result = warp_image(picture, about((255.5, 255.5), 0, scale, (31.5, 31.5)), 64)[10:54, 10:54]  # this part never leaves the picture
        samples = 44*44/scale**2  # pixels behind the result
        assert abs(result.mean() - 128) < 5*51/np.sqrt(samples*3) + 0.8
        if scale < 0.45: assert result.std() < 1.6*51*scale, 'noise must average out with the area of a pixel'


def test_crop_rule_is_the_documented_one():
    rng = np.random.default_rng(2)
    for _ in range(20):
        landmarks = rng.uniform(0, 500, (int(rng.integers(1, 9)), 68, 2))
        low, high = landmarks.min((0, 1)), landmarks.max((0, 1))
        crop = clip_crop(landmarks, 1.7)
        assert np.allclose(crop.centre, (low + high)/2 - [0, 0.1*(high - low)[1]])
        assert np.isclose(crop.side, 1.7*np.median((landmarks.max(1) - landmarks.min(1)).max(1)))
        assert np.allclose(transform_points(np.array(crop.centre), crop.matrix(96)), 47.5)


def test_fill_gaps_random_holes():
    rng = np.random.default_rng(3)
    truth = (np.arange(60.)[:, None, None]*rng.normal(size=(1, 68, 2)) + rng.normal(size=(1, 68, 2))).astype(np.float32)  # straight lines in time
    for _ in range(30):
        lost = rng.random(60) < 0.4
        holes = truth.copy(); holes[lost] = np.nan
        filled, runs, t = fill_gaps(holes, 3), [], 0
        while t < 60:
            end = t
            while end < 60 and lost[end]: end += 1
            if end > t: runs.append((t, end))
            t = max(end, t + 1)
        for begin, end in runs:
            bridged = begin > 0 and end < 60 and end - begin <= 3
            assert np.isfinite(filled[begin:end]).all() == bridged and (bridged or np.isnan(filled[begin:end]).all())
        known = np.isfinite(filled).all((1, 2))
        assert np.allclose(filled[known], truth[known], atol=1e-3)


# adaptation

def test_every_person_drives_another():
    kept, leaked = [], []
    for j, name in enumerate(NAMES):
        target, driver = embedded(f'{name}_c0'), embedded(f'{NAMES[(j + 5) % 12]}_c1')
        photos = target[4:75:9]
        assert error(adapt_landmarks(target, photos), target) < 0.1 and error(adapt_landmarks(target, photos, 'shape'), target) < 0.1
        for mode in ('relative', 'shape'):
            result = adapt_landmarks(driver, photos, mode)
            assert result.dtype == np.float32 and result.shape == driver.shape and np.isfinite(result).all()
            assert np.corrcoef(mouth_opening(result), mouth_opening(driver))[0, 1] > 0.95
            assert np.corrcoef(eye_opening(result), eye_opening(driver))[0, 1] > 0.95
            assert smallest_gap(result) > -0.01
        fitted = fit_adaptation(driver, photos)
        at_rest = fitted.apply(driver)[np.argmax(fitted.weights)]
        kept.append(shape_distance(at_rest, fitted.target_reference))
        leaked.append(shape_distance(fitted.driver_reference, fitted.target_reference))
    assert np.mean(kept) < 0.6*np.mean(leaked), (np.mean(kept), np.mean(leaked))


def test_camera_of_either_side_does_not_matter():
    driver, photos = embedded('syn04_c0'), embedded('syn11_c0')[::10]
    plain = adapt_landmarks(driver, photos)
    assert error(adapt_landmarks(transform_points(driver, turned(17, 2.3, (-40, 90))), photos), plain) < 0.05
    moved = turned(-8, 0.6, (30, 12))
    assert error(adapt_landmarks(driver, transform_points(photos, moved)), transform_points(plain, moved)) < 0.05
    shape = adapt_landmarks(driver, photos, 'shape')
    assert error(adapt_landmarks(driver, transform_points(photos, moved), 'shape'), shape) < 0.05, 'shape stays where the driver is'


def test_head_roll_is_followed():
    still, photos = np.repeat(embedded('syn04_c0')[:1], 40, 0), embedded('syn11_c0')[30:31]
    angles = np.linspace(-25, 25, 40)
    driver = np.stack([transform_points(face, about(face[30], a, 1, face[30])) for face, a in zip(still, angles)])
    result = adapt_landmarks(driver, photos)
    axis = result[:, 45] - result[:, 36]
    rolled = np.degrees(np.arctan2(axis[:, 1], axis[:, 0]))
    assert np.allclose(rolled - rolled.mean(), angles, atol=0.2)


@pytest.mark.parametrize('choice', ['widest mouth', 'shut eyes', 'turned'])
def test_one_difficult_photo(choice):
    for j in range(0, 12, 3):
        target, driver = embedded(f'{NAMES[j]}_c0'), embedded(f'{NAMES[(j + 4) % 12]}_c0')
        value = {'widest mouth': mouth_opening(target), 'shut eyes': -eye_opening(target),
                 'turned': np.abs(target[:, 30, 0] - target[:, [36, 45], 0].mean(1))}[choice]
        result = adapt_landmarks(driver, target[[value.argmax()]])
        assert np.corrcoef(mouth_opening(result), mouth_opening(driver))[0, 1] > 0.95 and smallest_gap(result) > -0.01
        assert np.corrcoef(eye_opening(result), eye_opening(driver))[0, 1] > 0.95
        assert 0.85 < np.polyfit(mouth_opening(driver), mouth_opening(result), 1)[0] < 1.15, 'a mouth opens as far as the driver opens his'
        assert mouth_opening(result).min() < 0.05, 'a mouth the driver shuts is shut, whatever the photo shows'
        assert eye_opening(result).min() < 0.4*np.median(eye_opening(target)), 'a blink shuts the eyes'
        assert eye_opening(result).max() > 0.5*np.median(eye_opening(target)), 'eyes the driver opens are open'


@pytest.mark.parametrize('height', [0.6, 1.3])
def test_narrow_and_wide_eyes_shut_together(height):
    target = np.repeat(embedded('syn05_c0')[:1].astype(float), 30, 0)
    eyes = [((36, 39), (37, 38, 40, 41)), ((42, 45), (43, 44, 46, 47))]

    def scale_lids(points, factor):  # towards the line through the corners, at right angles to it
        points = points.copy()
        for (a, b), lids in eyes:
            lids, along = list(lids), (points[:, b] - points[:, a])/np.linalg.norm(points[:, b] - points[:, a], axis=-1, keepdims=True)
            across = np.stack([-along[:, 1], along[:, 0]], -1)[:, None]
            offset = ((points[:, lids] - points[:, [a]])*across).sum(-1, keepdims=True)
            points[:, lids] += (np.reshape(factor, (-1, 1, 1)) - 1)*offset*across
        return points

    blink = 1 - 0.98*np.exp(-((np.arange(30) - 15)/3.)**2)
    blinking = scale_lids(target, blink)
    result = adapt_landmarks(scale_lids(blinking, height), target[:1])  # a driver with other eyes, and a photo with open ones
    assert error(result, blinking) < 0.4, error(result, blinking)
    assert abs(eye_opening(result).min()/eye_opening(result).max() - eye_opening(blinking).min()/eye_opening(blinking).max()) < 0.03


def test_missing_faces():
    driver, photos = embedded('syn01_c0').copy(), embedded('syn02_c0')[:3].copy()
    whole = adapt_landmarks(driver, photos)
    holes = driver.copy(); holes[40:] = np.nan
    result = adapt_landmarks(holes, np.concatenate([photos, np.full((2, 68, 2), np.nan)]))
    assert np.isnan(result[40:]).all() and np.isfinite(result[:40]).all()
    fitted = fit_adaptation(driver, photos)
    assert np.allclose(fitted.apply(holes)[:40], whole[:40], atol=1e-3), 'frames do not depend on each other once fitted'
    for bad_driver, bad_photos in ((np.full_like(driver, np.nan), photos), (driver, np.full_like(photos, np.nan))):
        for mode in ('relative', 'shape'):
            with pytest.raises(NoFaceError): adapt_landmarks(bad_driver, bad_photos, mode)
    untouched = adapt_landmarks(holes, photos, 'none')
    assert np.array_equal(untouched, holes, equal_nan=True) and untouched is not holes


# drawing

def by_definition(points: np.ndarray, size: int) -> np.ndarray:
    "lines-v1 as its formula reads: every pixel against every line."
    palette, half = PALETTES['lines-v1'], max(size/128, 1)/2
    y, x = np.mgrid[:size, :size].astype(float)
    image = np.zeros((size, size, 3))
    for chain, colour in zip(palette.chains, palette.colours):
        for p, q in zip(points[list(chain[:-1])], points[list(chain[1:])]):
            d = q - p; length = np.hypot(*d)
            t = np.clip(((x - p[0])*d[0] + (y - p[1])*d[1])/length**2, 0, 1) if length else np.zeros_like(x)
            c = np.abs(d).max()/length if length else 1.
            image = np.maximum(image, np.clip((half - np.hypot(x - p[0] - t*d[0], y - p[1] - t*d[1]))/c + 0.5, 0, 1)[..., None]*colour)
    return np.floor(image + 0.5).astype(np.uint8)


@pytest.mark.parametrize('size', [1, 7, 64, 131, 300])
def test_random_faces_are_drawn_by_the_definition(size):
    rng = np.random.default_rng(size)
    for scatter in (0.05, 0.5, 3.):
        for rounded in (False, True):
            points = rng.normal(size/2, scatter*size, (68, 2))
            if rounded: points = np.round(points)  # vertical, level, diagonal and empty lines
            assert np.abs(draw_landmarks(points, size).astype(int) - by_definition(points, size)).max() <= 1


def test_batches_and_missing_faces():
    rng = np.random.default_rng(0)
    faces = rng.uniform(-20, 84, (23, 68, 2)); missing = rng.random(23) < 0.3
    faces[missing, 5, 1] = rng.choice([np.nan, np.inf, -np.inf, 1e300], missing.sum())
    for palette in PALETTES:
        drawn = draw_landmarks(faces, 64, palette)
        assert drawn.dtype == np.uint8 and drawn.shape == (23, 64, 64, 3) and not drawn[missing].any()
        for face, image in zip(faces[~missing], drawn[~missing]): assert (draw_landmarks(face, 64, palette) == image).all() and image.any()


def test_palettes_are_frozen_and_checked():
    with pytest.raises(Exception, match='cannot assign'): PALETTES['lines-v1'].name = 'other'
    with pytest.raises(ConfigError, match='unknown'): draw_landmarks(np.zeros((68, 2)), 64, 'lines')
    with pytest.raises(ConfigError, match='colours'): Palette('x', ((0, 1),), ())
    with pytest.raises(ConfigError, match='outline'): Palette('x', ((0, 1, 2, 0),), ((10, 10, 10),), (((0, 1, 2), (11, 0, 0)),))


def test_fill_shows_only_inside_its_outline():
    points = np.zeros((68, 2)); points[:4] = [[10, 10], [40, 10], [40, 40], [10, 40]]
    square = Palette('square', ((0, 1, 2, 3, 0),), ((200, 200, 200),), (((0, 1, 2, 3), (100, 100, 100)),))
    image = draw_landmarks(points, 64, square)[..., 0]
    assert (image[11:40, 11:40] == 100).all() and (image[10, 10:41] == 200).all() and not image[:9].any() and not image[:, 42:].any()


# real clips

@pytest.mark.skipif(not (SHARED/'clips').exists(), reason='the local sample data are not here')
def test_real_clips_drive_each_other():
    pytest.importorskip('dlib')
    from talking_face.signals.landmarks import DlibDetector, track_face
    from talking_face.signals.media import iterate_video
    with DlibDetector() as detector:
        tracks = [track_face((frame.image for frame in islice(iterate_video(SHARED/'clips'/name, fps=Fraction(25, 2)), 36)), detector).landmarks
                  for name in ('id16/vr_face2.mp4', 'id08/lp_d3.mp4', 'id17/vr_face5.mp4')]
    for j, target in enumerate(tracks):
        driver, photos = tracks[(j + 1) % 3], target[np.linspace(0, len(target) - 1, 8).astype(int)]
        assert error(adapt_landmarks(target, photos), target) < 1
        crop = clip_crop(target)
        inside = transform_points(target, crop.matrix(256))
        assert np.nanmin(inside) > 0 and np.nanmax(inside) < 255
        for mode in ('relative', 'shape'):
            result = adapt_landmarks(driver, photos, mode); known = np.isfinite(driver).all((1, 2))
            assert np.array_equal(np.isfinite(result).all((1, 2)), known) and smallest_gap(result[known]) > -0.01
            if mouth_opening(driver[known]).std() > 0.01:
                assert np.corrcoef(mouth_opening(result[known]), mouth_opening(driver[known]))[0, 1] > 0.95
