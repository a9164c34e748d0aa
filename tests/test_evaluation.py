"""Evaluation: damaged and missing input, second implementations on random data, the interface's faults, and a real clip where there is one."""
import json, math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import linregress

from talking_face.core import ConfigError, DataError, NoFaceError
from talking_face.evaluation import baselines, metrics, protocols
from talking_face.evaluation.metrics import Comparison, Judge, Metric, Reference, measure, metric
from talking_face.evaluation.protocols import Clip, Promise, Row
from talking_face.signals.landmarks import Face, mouth_opening

ROOT = Path(__file__).parents[1]
EMBEDDED, REAL = ROOT/'data/embedded/clips', ROOT.parent/'shared/data/clips'


def face_shape() -> np.ndarray:
    "A rough face around (0, 0), outer eye corners 10 apart, mouth open by 2."
    angle = np.linspace(0, np.pi, 17)
    jaw = np.stack([-9 * np.cos(angle), 9 * np.sin(angle)], 1)
    brows = np.array([(x, -5) for x in np.linspace(-6, 6, 10)])
    nose = np.array([(0, y) for y in range(-3, 1)] + [(x, 1) for x in range(-2, 3)])
    eye = lambda left, right: [(left, -3), (left + 1, -4), (right - 1, -4), (right, -3), (right - 1, -2), (left + 1, -2)]
    lips = [(3 * np.cos(a), 5 + 2 * np.sin(a)) for a in np.linspace(np.pi, 3 * np.pi, 12, endpoint=False)]
    inner = [(-2, 5), (-1, 4), (0, 4), (1, 4), (2, 5), (1, 6), (0, 6), (-1, 6)]
    return np.concatenate([jaw, brows, nose, eye(-5, -2), eye(2, 5), lips, inner]).astype(np.float32)


class DotDetector:
    "A face stands where the red dot is (centre of brightness), in one size relative to the picture; a picture without red shows nobody."
    name, version = 'dot', '1'

    def __init__(self): self.sizes = []

    def detect(self, image):
        self.sizes.append(image.shape[:2])
        weight = image[..., 0].astype(float) * (image[..., 0] > 60)
        if not weight.any(): return []
        y, x = ((grid * weight).sum() / weight.sum() for grid in np.indices(weight.shape))
        points = face_shape() * max(image.shape[:2]) / 64 + np.float32([x, y])
        return [Face(points, (0., 0., 1., 1.), 1.), Face(points + 50, (0., 0., .5, .5), .5)]


def dots(centres, size=(64, 64)) -> np.ndarray:
    "Pictures with a red 3 x 3 dot at each whole (x, y); None = no dot. Blue holds the frame's number."
    frames = np.zeros((len(centres), *size, 3), np.uint8)
    for number, (frame, centre) in enumerate(zip(frames, centres)):
        frame[..., 2] = number
        if centre is not None: frame[centre[1] - 1:centre[1] + 2, centre[0] - 1:centre[0] + 2, 0] = 255
    return frames


def dot_judge(described=12):
    seen = []
    def describe(frames, landmarks):
        seen.append((frames, landmarks))
        return np.stack([np.full(128, frame[..., 2].mean()) for frame in frames]).astype(np.float32)
    judge = Judge(DotDetector(), describe, described=described)
    judge.seen = seen
    return judge


def walk(count, seed=0): return [tuple(int(v) for v in np.random.default_rng([seed, t]).integers(20, 44, 2)) for t in range(count)]


def talking_points(centres):
    "The points at each centre, mouths opening and closing; NaN rows where there is no centre."
    points = np.stack([face_shape() + np.float32(centre) if centre is not None else np.full((68, 2), np.nan, np.float32) for centre in centres])
    points[:, 65:68, 1] += np.abs(np.sin(np.arange(len(points))))[:, None]
    return points


def make_clip(name, count=40, seed=0): return Clip(name, dots(walk(count, seed)), talking_points(walk(count, seed)))


# --- metrics -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('seed', range(8))
def test_landmark_figures_against_loops(seed):
    rng = np.random.default_rng(seed)
    wanted = rng.normal(30, 8, (12, 68, 2))
    found = wanted + rng.normal(0, 1, wanted.shape)
    found[rng.random(12) < .3], wanted[rng.random(12) < .2] = np.nan, np.nan
    scale = np.median([math.dist(face[36], face[45]) for face in wanted if np.isfinite(face).all()])
    for points in (range(68), metrics.MOUTH):
        by_hand = [100 * np.mean([math.dist(a[i], b[i]) for i in points]) / scale for a, b in zip(found, wanted)]
        assert np.allclose(metrics.landmark_distances(found, wanted, points), by_hand, equal_nan=True)
    valid = np.isfinite(found).all((1, 2)) & np.isfinite(wanted).all((1, 2))
    line = linregress(mouth_opening(wanted[valid]), mouth_opening(found[valid]))
    assert np.allclose(metrics.mouth_agreement(found, wanted), (line.rvalue, line.slope))


def test_a_single_nan_coordinate_is_a_missing_face():
    points = np.repeat(face_shape()[None], 3, 0)
    points[1, 40, 0] = np.nan
    assert metrics.missing_faces(points).tolist() == [False, True, False]


@pytest.mark.parametrize('wrong', [np.zeros((3, 68, 2)), np.zeros((4, 5, 2)), np.zeros((4, 68, 3)), np.zeros((68, 2))])
def test_landmarks_of_other_shapes_are_refused(wrong):
    for function in (metrics.landmark_distances, metrics.mouth_agreement):
        with pytest.raises(ValueError, match=r'\(T, 68, 2\)'): function(wrong, np.zeros((4, 68, 2)))


@pytest.mark.parametrize('size', [(64, 64), (48, 64), (64, 40), (33, 57), (256, 256), (300, 260)])
def test_points_come_back_to_the_frames_pixels(size):
    centres = [(25, 30), None, (20, 24)]
    judge = dot_judge()
    found = judge.landmarks(dots(centres, size))
    assert metrics.missing_faces(found).tolist() == [False, True, False] and found.dtype == np.float32
    middles = (found - face_shape() * max(size) / 64).mean(1)
    assert np.abs(middles[[0, 2]] - [(25, 30), (20, 24)]).max() < .15          # a half-pixel mistake would give 0.4 and more
    assert set(judge._detector.sizes) == {size if max(size) >= 256 else tuple(round(side * 256 / max(size)) for side in size)}


@pytest.mark.parametrize('described', [1, 4, 100])
def test_only_frames_with_a_face_are_described_and_evenly(described):
    centres = [(30, 30) if index % 3 else None for index in range(30)]
    judge, frames = dot_judge(described), dots(centres)
    assert len(judge.descriptors(frames, judge.landmarks(frames))) == min(described, 20)
    (seen, landmarks), = judge.seen
    numbers = seen[..., 2].mean((1, 2)).round().astype(int)
    assert np.isfinite(landmarks).all() and (numbers % 3 > 0).all() and len(set(numbers)) == len(numbers)
    if described == 4: assert numbers[0] == 1 and numbers[-1] == 29 and np.diff(numbers).min() >= 7
    assert np.isnan(judge.identity(dots([None, None]))).all()


def test_the_detector_and_network_are_asked_once_and_only_if_needed():
    judge, clip = dot_judge(), make_clip('a', 6)
    reference = Reference(clip.landmarks, clip.landmarks, np.zeros(128))
    measure(Comparison(clip.images, reference, judge), ['sharpness'])
    assert not judge._detector.sizes and not judge.seen
    measure(Comparison(clip.images, reference, judge))
    assert len(judge._detector.sizes) == 6 and len(judge.seen) == 1


def test_a_result_without_faces_scores_nothing_anywhere():
    judge, clip = dot_judge(), make_clip('a')
    reference = Reference(clip.landmarks, clip.landmarks, np.zeros(128), clip.images)
    values = measure(Comparison(np.zeros_like(clip.images), reference, judge))
    assert values['failures'] == 100 and values['unjudged'] == 0
    assert all(math.isnan(values[name]) for name in ('landmarks', 'landmarks_mouth', 'mouth_correlation', 'mouth_gain', 'identity'))
    missing = Reference(clip.landmarks, np.full_like(clip.landmarks, np.nan), np.full(128, np.nan), clip.images)
    values = measure(Comparison(clip.images, missing, judge))
    assert values['unjudged'] == 100 and values['failures'] == 0 and math.isnan(values['landmarks']) and math.isnan(values['identity'])


def test_registry_takes_new_metrics_and_refuses_duplicates(monkeypatch):
    monkeypatch.setattr(metrics, 'METRICS', dict(metrics.METRICS))
    metric('brightness', 'brightness', 'real', 'grey')(lambda comparison: float(comparison.frames.mean()))
    clip = make_clip('a', 3)
    values = measure(Comparison(clip.images, Reference(clip.landmarks, clip.landmarks, np.zeros(128)), dot_judge()), ['brightness'])
    assert values == {'brightness': clip.images.mean()} and isinstance(metrics.METRICS['brightness'], Metric)
    with pytest.raises(ConfigError, match='exists'): metric('brightness', 'again', 'higher')(len)
    with pytest.raises(ConfigError, match='better'): metric('other', 'other', 'upward')(len)


# --- baselines ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('seed', range(20))
def test_hold_missing_against_a_loop(seed):
    rng = np.random.default_rng(seed)
    track = rng.normal(size=(15, 68, 2))
    track[rng.random(15) < .6] = np.nan
    valid = np.isfinite(track).all((1, 2))
    if not valid.any():
        with pytest.raises(NoFaceError): baselines.hold_missing(track)
        return
    expected, current = [], track[valid][0]
    for row, good in zip(track, valid):
        if good: current = row
        expected.append(current)
    assert (baselines.hold_missing(track) == np.stack(expected)).all()


@pytest.mark.parametrize('seed', range(6))
def test_warp_survives_any_points(seed):
    rng = np.random.default_rng(seed)
    clip = make_clip('a', 8, seed)
    driving = clip.landmarks + rng.normal(0, 1, (8, 1, 2)) * (0, 5, 20, 60, 200, 1)[seed]
    driving[2] = np.nan
    if seed == 5: driving[3] = driving[3, :1]                                # all points in one place
    for method in (baselines.WarpNearest(clip.images, clip.landmarks), baselines.NearestFrame(clip.images, clip.landmarks), baselines.CopySource(clip.images[0])):
        frames = method(driving)
        assert frames.dtype == np.uint8 and frames.shape == clip.images.shape
    assert all(np.isfinite(baselines.warp_map(pose, clip.landmarks[0], 64)).all() for pose in np.delete(driving, 2, 0))


def test_warp_moves_the_face_to_the_driving_points():
    from skimage.transform import PiecewiseAffineTransform
    rng = np.random.default_rng(0)
    source = face_shape() * 1.5 + 32
    target = source + rng.normal(0, .8, source.shape) + (4, -3)
    places = baselines.warp_map(target, source, 64)
    library = PiecewiseAffineTransform.from_estimate(np.vstack([target, baselines._border(64)]), np.vstack([source, baselines._border(64)]))
    grid = np.stack(np.meshgrid(np.arange(64), np.arange(64)), -1).reshape(-1, 2)
    assert np.median(np.abs(library(grid) - places.reshape(-1, 2))) < 1e-3 and np.quantile(np.abs(library(grid) - places.reshape(-1, 2)), .98) < .05
    centre = np.round(target.mean(0)).astype(int)
    assert np.abs(places[centre[1], centre[0]] - (centre - (4, -3))).max() < 2.5


def test_driving_rows_without_a_face_hold_the_last_picture():
    clip = make_clip('a', 6)
    driving = clip.landmarks.copy()
    driving[3] = np.nan
    for method in (baselines.NearestFrame(clip.images, clip.landmarks), baselines.WarpNearest(clip.images, clip.landmarks)):
        frames = method(driving)
        assert (frames[3] == frames[2]).all()
        with pytest.raises(NoFaceError): method(np.full((2, 68, 2), np.nan))


# --- protocols ---------------------------------------------------------------------------------------------------------------

def evaluate(clips, methods=lambda clip, photos: {}, **options): return protocols.evaluate_people(clips, methods, dot_judge(), **options)


def test_everybody_gets_the_same_frames_and_a_perfect_method_is_perfect():
    clips, asked = [make_clip('a', 40, 1), make_clip('b', 44, 2)], []
    def methods(clip, photos):
        asked.append((clip.identity, photos.tolist()))
        def oracle(driving):
            match = [np.flatnonzero((clip.landmarks == pose).all((1, 2))) for pose in driving]
            return clip.images[[found[0] if len(found) else 0 for found in match]]
        return {'oracle': oracle}
    lines = []
    result = evaluate(clips, methods, progress=lines.append)
    assert [name for name, _ in asked] == ['a', 'b'] and len(lines) == 2 and asked[0][1] == protocols.same_clip_split(40).photos.tolist()
    means = protocols.mean_over_identities(result.rows)
    assert means['oracle', 'same', 'ssim'] == 1 and means['oracle', 'same', 'landmarks'] == 0
    assert means['nearest_frame', 'same', 'landmarks'] > 5 > means['oracle', 'same', 'landmarks']
    assert {row.identity for row in result.rows} == {'a', 'b'} and not any(row.metric == 'ssim' for row in result.rows if row.protocol == 'cross')
    assert len(result.rows) == len({row[:4] for row in result.rows}), 'every number must have one row'
    for method in ('oracle', 'nearest_frame', 'warp'): assert ('real', 'cross', 'failures') not in means and (method, 'cross', 'failures') in means


def test_photos_and_judged_frames_reach_the_methods_untouched():
    seen = {}
    clip = make_clip('a', 40, 1)
    def method(driving):
        seen['driving'] = driving.copy()
        return np.zeros((len(driving), 64, 64, 3), np.uint8)
    rows = protocols.evaluate_person(clip, {'mine': method}, judge=dot_judge()).rows
    assert (seen['driving'] == clip.landmarks[21:]).all() and {row.protocol for row in rows} == {'same'}


@pytest.mark.parametrize('answer', [lambda count: np.zeros((count, 64, 64, 3)), lambda count: np.zeros((count - 1, 64, 64, 3), np.uint8),
                                    lambda count: np.zeros((count, 32, 32, 3), np.uint8), lambda count: np.zeros((count, 3, 64, 64), np.uint8)])
def test_a_method_that_returns_something_else_is_named(answer):
    with pytest.raises(ValueError, match="'mine'"):
        protocols.evaluate_person(make_clip('a'), {'mine': lambda driving: answer(len(driving))}, judge=dot_judge())


def test_bad_calls_are_refused_with_reasons():
    with pytest.raises(ConfigError, match='real'): protocols.evaluate_person(make_clip('a'), {'real': len}, judge=dot_judge())
    with pytest.raises(DataError, match='one clip per identity'): evaluate([make_clip('a'), make_clip('a')])
    with pytest.raises(DataError): evaluate([])
    with pytest.raises(DataError, match='too short'): evaluate([make_clip('a', 12)])
    with pytest.raises(DataError, match='cross'): protocols.figures_table(evaluate([make_clip('a')]).rows, 'cross')
    with pytest.raises(ValueError): protocols.picture_strip({})


def test_a_driver_of_another_size_with_missing_rows():
    target, small = make_clip('a', 40, 1), walk(30, 5)
    points = talking_points(small) / 2 - .25
    points[[0, 7, 8]] = np.nan
    driver = Clip('b', dots(small)[:, ::2, ::2], points)
    photos = protocols.same_clip_split(40).photos
    methods = {'warp': baselines.WarpNearest(target.images[photos], target.landmarks[photos])}
    result = protocols.evaluate_person(target, methods, driver, dot_judge(), cross_step=1)
    cross = {row.metric: row.value for row in result.rows if row.protocol == 'cross'}
    assert cross['unjudged'] == pytest.approx(10) and math.isfinite(cross['landmarks']) and len(result.pictures['warp cross']) == 30
    assert protocols.evaluation_strip({'a': result.pictures}, columns=5, tile=32).shape == (4 * 32, 104 + 160, 3)   # real, drawing, warp, driver


def test_one_lost_person_makes_the_mean_undefined():
    rows = [Row('m', 'same', identity, 'landmarks', value) for identity, value in (('a', 1.), ('b', float('nan')))]
    assert math.isnan(protocols.mean_over_identities(rows)['m', 'same', 'landmarks'])
    verdict, = protocols.check_promises(rows, [Promise('m', 'same', 'landmarks', '<=', 99)])
    assert not verdict.kept and '| - | **FAIL** |' in protocols.promises_table([verdict])


@pytest.mark.parametrize('share,other,bound,kept', [(1, 'real', 0, False), (.5, 'real', 0, True), (1, 'real', -60, True), (1, 'absent', -999, False), (1, '', 50, True)])
def test_thresholds(share, other, bound, kept):
    rows = [Row('m', 'same', 'a', 'sharpness', 50.), Row('real', 'same', 'a', 'sharpness', 100.)]
    verdict, = protocols.check_promises(rows, [Promise('m', 'same', 'sharpness', '>=', bound, other, share)])
    assert verdict.kept is kept and verdict.measured == 50


def test_what_is_written_is_strict_json_and_complete(tmp_path):
    blank = lambda clip, photos: {'untrained': lambda driving: np.zeros((len(driving), 64, 64, 3), np.uint8)}
    result = evaluate([make_clip('a', 40, 1), make_clip('b', 40, 2)], blank)
    verdicts = protocols.write_evaluation(tmp_path/'out', result, protocols.TINY_PROMISES)
    def refuse(text): raise AssertionError(f'{text} is not JSON')
    stored = json.loads((tmp_path/'out/evaluation.json').read_text(), parse_constant=refuse)
    assert len(stored['rows']) == len(result.rows) and len(stored['promises']) == len(protocols.TINY_PROMISES) == len(verdicts)
    lost = [row for row in stored['rows'] if row['method'] == 'untrained' and row['metric'] == 'landmarks']
    assert lost and all(row['value'] is None for row in lost)
    text = (tmp_path/'out/evaluation.md').read_text()
    assert text.count('FAIL') == sum(not verdict.kept for verdict in verdicts) and 'nan' not in text.lower() and '100.0' in text
    assert sorted(path.name for path in (tmp_path/'out').iterdir()) == ['evaluation.json', 'evaluation.md', 'strip.png']


def test_every_promise_of_tiny_can_be_kept_and_broken():
    values = dict(ssim=.95, landmarks=1., landmarks_mouth=1., mouth_correlation=.95, identity=.2, sharpness=300., failures=0.)
    others = {'nearest_frame': dict(ssim=.6), 'warp': dict(ssim=.9), 'scratch': dict(ssim=.85, identity=.4), 'real': dict(sharpness=400.)}
    rows = [Row(method, protocol, 'a', name, value) for method in ('fine_tuned', 'feed_forward') for protocol in ('same', 'cross') for name, value in values.items()]
    rows += [Row(method, 'same', 'a', name, value) for method, pairs in others.items() for name, value in pairs.items()]
    assert all(verdict.kept for verdict in protocols.check_promises(rows, protocols.TINY_PROMISES))
    worse = {name: value / 10 if metrics.METRICS[name].better != 'lower' else value + 10 for name, value in values.items()}
    broken = [row._replace(value=worse[row.metric]) if row.method in ('fine_tuned', 'feed_forward') else row for row in rows]
    assert not any(verdict.kept for verdict in protocols.check_promises(broken, protocols.TINY_PROMISES))


# --- pictures of people ------------------------------------------------------------------------------------------------------

def test_a_real_person():
    "On a real clip: ideal values on itself, the warp between nearest frame and truth."
    from talking_face.signals.geometry import clip_crop, transform_points, warp_image
    from talking_face.signals.media import read_video
    paths = [path for path in (REAL/'id18/vt_test.mp4', REAL/'id16/vr_face2.mp4') if path.is_file()]
    if not paths: pytest.skip('needs a real clip under ../shared/data/clips')
    frames = read_video(paths[0], maximum_frames=60)
    judge = Judge(described=4)
    landmarks = judge.landmarks(frames)
    assert metrics.missing_faces(landmarks).mean() < .1
    matrix = clip_crop(landmarks).matrix(64)
    clip = Clip('person', np.stack([warp_image(frame, matrix, 64) for frame in frames]), transform_points(landmarks, matrix).astype(np.float32))
    chosen = protocols.same_clip_split(len(frames)).photos
    methods = {'nearest_frame': baselines.NearestFrame(clip.images[chosen], clip.landmarks[chosen]), 'warp': baselines.WarpNearest(clip.images[chosen], clip.landmarks[chosen])}
    means = protocols.mean_over_identities(protocols.evaluate_person(clip, methods, judge=judge).rows)
    assert means['real', 'same', 'ssim'] == 1 and means['real', 'same', 'landmarks'] == 0 and means['real', 'same', 'failures'] < 10
    assert means['warp', 'same', 'landmarks'] < means['nearest_frame', 'same', 'landmarks'] and means['warp', 'same', 'ssim'] > .6
    assert means['real', 'same', 'mouth_correlation'] > .7 and means['real', 'same', 'identity'] < .45
