"""Hair on many heads: what must hold for every style, person and pose, beyond the few shown in the chapters."""
from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from talking_face.core import generator_for
from talking_face.data.hair_growth import Anchors, Growth, HairSurface, Roots, bind_hair, grow_strands, make_ribbons, shorten_strands, unit_vectors
from talking_face.data.hair_regions import beard_density, hairline_distance, head_space, scalp_density
from talking_face.data.head_hair import CORE_CENTRE, CORE_RADII, HAIR_TABLE, draw_taste, in_face_window, make_beard, make_hair, make_lashes, scalp_hair
from talking_face.data.head_model import find_head_assets, fit_piece, load_head_model, piece_bone_weights
from talking_face.data.head_shape import BEARD_STYLES, EXPRESSION_UNITS, HAIR_STYLES, HeadPose, draw_identity, express, neck_pivot, shape_vertices, turn

needs_assets = pytest.mark.skipif(not find_head_assets(), reason='the head assets are not here (set TALKING_FACE_HEAD_ASSETS to their folder)')
MOST_TRIANGLES = 48_000


@pytest.fixture(scope='module')
def model():
    return load_head_model(find_head_assets())


def person_with(style: str, start: int = 0):
    "The first person from `start` on who wears their hair like that."
    return next(person for person in map(draw_identity, range(start, start + 400)) if person.hair_style == style)


def flat_surface():
    "The plane y = 0, seen from above, and a grid of roots on it."
    x, z = (part.ravel() for part in np.meshgrid(np.linspace(-2, 2, 81), np.linspace(-2, 2, 81)))
    points = np.stack([x, 0 * x, z], 1)
    inner = points[(np.abs(x) < 1) & (np.abs(z) < 1)][::7]
    count = len(inner)
    roots = Roots(np.zeros((count, 3), int), np.full((count, 3), 1 / 3), inner, np.tile([0., 1, 0], (count, 1)), inner)
    return HairSurface(points, np.tile([0., 1, 0], (len(points), 1))), roots


# without assets

@pytest.mark.parametrize('growth', [Growth(), Growth(points=3, gravity=2.), Growth(points=20, lift=0., hug=1., jitter=0.), Growth(follow=0., jitter=3.)])
def test_strands_keep_their_length_and_stay_above_the_ground(growth):
    surface, roots = flat_surface()
    lengths = generator_for(1).uniform(.1, .9, len(roots.points))
    strands = grow_strands(surface, roots, lengths, lambda p, n: np.broadcast_to([.6, -.8, 0], p.shape), growth, generator_for(2))
    assert strands.shape == (len(lengths), growth.points, 3) and np.isfinite(strands).all()
    np.testing.assert_allclose(np.sqrt((np.diff(strands, axis=1) ** 2).sum(-1)).sum(1), lengths, rtol=1e-9)
    assert strands[:, 1:, 1].min() > -.35 * lengths.max() / (growth.points - 1)      # a step may end below what it is pushed out of, by less than itself
    if growth.points == 20: assert strands[..., 1].min() > -.02


def test_scissors_cut_only_what_is_forbidden():
    strands = np.linspace(0, 1, 6)[None, :, None] * np.array([[[1., 0, 0]], [[0, 1., 0]]])
    cut, left = shorten_strands(strands, strands[..., 0] > .5, generator_for(3))
    np.testing.assert_allclose(cut[1], strands[1], atol=1e-12)
    assert left[1] == 1
    assert cut[0, :, 0].max() <= .4 + 1e-12 and .3 <= left[0] <= .4 + 1e-12
    root_only = np.zeros((2, 6), bool); root_only[:, 0] = True                        # the root itself cannot be cut away
    assert (shorten_strands(strands, root_only, generator_for(3))[1] == 1).all()


def test_binding_reaches_any_share_of_the_turn():
    surface, roots = flat_surface()
    vertices, bone_weights = np.array([[0., 0, 0], [1, 0, 0], [0, 0, 1], [0, 2, 0], [0, -2, 0]]), np.array([.4, .5, .6, 1., 0.])
    roots = roots._replace(corners=np.tile([0, 1, 2], (len(roots.points), 1)))
    strands = grow_strands(surface, roots, np.full(len(roots.points), .5), lambda p, n: n, Growth(points=4), generator_for(4))
    ribbons = make_ribbons(strands, np.tile([0., 0, 1], (*strands.shape[:2], 1)), np.full(len(strands), .03), .3, generator_for(5))
    for share in (0., .3, .5, .9, 1.):
        turning = np.full(ribbons.vertices.shape[:2], share)
        hair = bind_hair('x', ribbons, roots, vertices, bone_weights, turning, Anchors(3, 4), np.ones(turning.shape), np.ones(turning.shape))
        np.testing.assert_allclose(fit_piece(hair.piece, vertices), ribbons.vertices.reshape(-1, 3), atol=1e-12)
        np.testing.assert_allclose((bone_weights[hair.piece.references] * hair.piece.weights).sum(1), share, atol=.011)
        assert hair.piece.weights.min() >= -1e-12 and hair.piece.references.max() < 5


def test_every_style_is_in_the_salon():
    assert tuple(HAIR_TABLE) == HAIR_STYLES
    for name, style in HAIR_TABLE.items():
        assert style.count * (2 * style.growth.points - 3) < 40_000, name
        assert style.lowest >= 7.55 and style.width < .06 and bool(style.ends_at) + bool(max(style.lengths)) + (style.comb == 'tied') == 1, name


def test_hairlines_of_two_hundred_people():
    "Above the brows, behind the temples, below the crown; no hair on the face, both sides alike; women's lower than men's at the temples, on average."
    face = np.array([[0, 7.7, 1.47], [.45, 7.55, 1.3], [0, 7.0, 1.6], [.6, 7.0, 1.0], [0, 6.2, 1.4], [.85, 7.2, .5]])
    head = np.array([[0, 8.5, .6], [.5, 8.2, .3], [0, 7.4, -.38], [.7, 7.75, .4]])
    temples = {True: [], False: []}
    for person in map(draw_identity, range(200)):
        assert hairline_distance(person, face).max() < 0 and hairline_distance(person, head).min() > .05, person.seed
        assert np.array_equal(hairline_distance(person, head), hairline_distance(person, head * [-1, 1, 1]))
        density = scalp_density(None, person, np.concatenate([face, head]))
        assert density[:len(face)].max() == 0 and density.max() <= 1
        temples[person.female > .5].append(hairline_distance(person, np.array([[.55, 7.95, 1.15]]))[0])
    assert np.mean(temples[True]) > np.mean(temples[False]) + .05


def test_beards_stay_off_lips_nose_and_women():
    off = np.array([[0, 6.62, 1.6], [.15, 6.6, 1.55], [0, 6.95, 1.65], [.3, 7.1, 1.35], [0, 7.8, 1.45], [.5, 5.8, .5]])
    for style in BEARD_STYLES:
        for seed in range(5): assert beard_density(dataclasses.replace(draw_identity(seed), beard_style=style), off).max() == 0, style
    assert all(not person.beard_style for person in map(draw_identity, range(100)) if person.female > .5)


# with assets

@needs_assets
@pytest.mark.parametrize('style', HAIR_STYLES)
def test_hair_of_every_style(model, style):
    "Roots on the scalp, nothing in the skull, nothing before the eyes, triangles within the budget, another seed another hairdo."
    tips = []
    for start in (0, 500):
        person = person_with(style, start)
        neutral = shape_vertices(model, person)
        space, parts = head_space(model, neutral), scalp_hair(model, person, neutral)
        assert sum(len(part.piece.triangles) for part in parts) + 1400 < MOST_TRIANGLES and parts[0].piece.name == 'hair'
        for part in parts:
            places = (fit_piece(part.piece, neutral) - space.origin) / space.scale
            x, y, z = places.T
            assert not ((np.abs(x) < .55) & (y > 7.0) & (y < 7.45) & (z > .8)).any(), (part.piece.name, 'before the eyes')
            assert not ((np.abs(x) < .36) & (y > 6.4) & (y < 7.5) & (z > .8)).any(), (part.piece.name, 'before the face')
            depth = space.surface.distance(places)[0]
            assert (depth < -.03).mean() < .005 and depth.min() > -.15, (part.piece.name, 'in the skull', depth.min())
            roots = places[part.piece.uv[:, 1] == 0]
            if part.piece.name in ('hair', 'fringe', 'wisps'): assert np.abs(space.surface.distance(roots)[0]).max() < .06 and y.max() < 9.6
            used = np.unique(part.piece.triangles)
            assert used.size == len(part.tint) and (np.diff(part.tangent_ends, axis=1) != 0).all() and np.isfinite(places).all()
        tips.append(places[-1])
    assert np.abs(tips[0] - tips[1]).max() > 1e-3


@needs_assets
@pytest.mark.parametrize('style', ['buzz', 'crop', 'curly', 'afro', 'bun'])
def test_hair_without_a_parting_is_about_the_same_on_both_sides(model, style):
    person = person_with(style)
    neutral = shape_vertices(model, person)
    hair = scalp_hair(model, person, neutral)[0]
    x, y, _ = ((fit_piece(hair.piece, neutral) - head_space(model, neutral).origin)).T
    left, right = x[x > 0], -x[x < 0]
    assert .85 < len(left) / len(right) < 1.18
    assert np.abs(np.quantile(left, [.25, .5, .75, .95]) - np.quantile(right, [.25, .5, .75, .95])).max() < .15


@needs_assets
def test_the_same_person_has_the_same_hair_byte_for_byte(model):
    for style in ('pixie', 'ponytail'):
        person = person_with(style)
        one, two = (make_hair(model, person, shape_vertices(model, person)) for _ in range(2))
        for first, second in zip(one, two, strict=True):
            for mine, theirs in zip([*first.piece[1:], *first[1:]], [*second.piece[1:], *second[1:]], strict=True): assert mine.tobytes() == theirs.tobytes()


@needs_assets
def test_turned_and_laughing_hair_stays_with_the_head(model):
    "Turned by 25 degrees, roots stay on the scalp, lashes at the eyes, and long hair outside the body; no expression moves the hair of the head."
    pose = HeadPose(np.radians(25), np.radians(10), np.radians(6))
    for style in ('long', 'ponytail', 'short'):
        person = person_with(style)
        neutral = shape_vertices(model, person)
        pivot, parts = neck_pivot(model, neutral), make_hair(model, person, neutral)
        body = turn(neutral, model.bone_weights, pivot, pose)
        surface = HairSurface.from_mesh(body[:], model.triangles)
        loud = express(model, person, neutral, {unit: .6 for unit in EXPRESSION_UNITS if unit.startswith(('mouth', 'eyebrows'))})
        for part in parts:
            places = turn(fit_piece(part.piece, neutral), piece_bone_weights(part.piece, model), pivot, pose)
            if part.piece.name in ('hair', 'tail'):
                roots = part.piece.uv[:, 1] == 0
                if part.piece.name == 'hair': assert np.abs(surface.distance(places[roots])[0]).max() < .08
                depth = surface.distance(places)[0]
                assert (depth < -.08).mean() < .03, (style, part.piece.name, (depth < -.08).mean())
                assert np.abs(fit_piece(part.piece, loud) - fit_piece(part.piece, neutral)).max() < .12


@needs_assets
def test_lashes_sit_on_the_lids_of_everybody(model):
    for seed in range(6):
        person = draw_identity(seed)
        neutral, lashes = shape_vertices(model, person), make_lashes(model, person)
        assert lashes.piece.weights.min() > -.6 and (lashes.piece.offsets == 0).all()
        for closure in (0., 1.):
            body = express(model, person, neutral, {'eye-left-closure': closure, 'eye-right-closure': closure})
            places = fit_piece(lashes.piece, body)
            for name in ('helper-l-eye', 'helper-r-eye'):
                side = np.sign(model.group_centre(name, body)[0]) * places[:, 0] > 0
                ball = body[model.groups[name]]
                reach = np.sqrt(((places[side] - ball.mean(0)) ** 2).sum(1)) / (np.ptp(ball, axis=0).mean() / 2)
                assert 160 < side.sum() and .9 < reach.min() and reach.max() < 2.6, (seed, closure, reach.min(), reach.max())


@needs_assets
def test_beards_open_with_the_jaw(model):
    person = dataclasses.replace(person_with('short'), beard_style='short', beard=.9)
    neutral = shape_vertices(model, person)
    beard, = make_beard(model, person, neutral)
    opened = express(model, person, neutral, {'mouth-open': 1.})
    drop = (fit_piece(beard.piece, neutral) - fit_piece(beard.piece, opened))[:, 1]
    rest = model.vertices[beard.piece.references[:, 0]]
    assert drop[(rest[:, 1] < 6.4) & (rest[:, 2] > 1.2)].mean() > .15 > .05 > np.abs(drop[rest[:, 1] > 6.75]).mean()
    for style in ('stubble', ''): assert make_beard(model, dataclasses.replace(person, beard_style=style), neutral) == []


@needs_assets
def test_no_scalp_is_mistaken_for_the_inside_of_the_skull(model):
    used = np.unique(model.triangles)
    for seed in range(20):
        person = draw_identity(seed)
        scalp = used[hairline_distance(person, model.vertices[used]) > 0]
        places = head_space(model, shape_vertices(model, person)).vertices[scalp]
        assert (((places - CORE_CENTRE) / CORE_RADII) ** 2).sum(1).min() > 1.2, seed


@needs_assets
def test_tastes_differ(model):
    tastes = []
    for seed in range(40):
        person = draw_identity(seed)
        if len(tastes) < 8: tastes.append(draw_taste(person, head_space(model, shape_vertices(model, person))))
    assert {taste.side for taste in tastes} == {-1., 1.} and len({round(taste.part, 6) for taste in tastes}) == 8
    assert all(.8 < taste.length < 1.2 and np.isfinite(taste.tie).all() and taste.tie[2] < .8 for taste in tastes)


@needs_assets
def test_unknown_styles_are_refused(model):
    person = dataclasses.replace(draw_identity(0), hair_style='mohawk')
    with pytest.raises(ValueError, match='mohawk.*buzz'): scalp_hair(model, person, shape_vertices(model, draw_identity(0)))


def test_face_window_moves_nothing_else():
    points = unit_vectors(generator_for(9).standard_normal((2000, 3))) * [.9, 1.3, 1.2] + [0, 7.3, .5]
    inside = in_face_window(points, 7.6)
    assert 20 < inside.sum() < 600 and (points[inside, 2] > .8).all() and (points[inside, 1] < 7.64).all() and np.abs(points[inside, 0]).max() < .65
