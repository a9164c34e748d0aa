"""Report cards on detected and on stored clips, speech on recordings, selection and the data report on a folder that preprocessing made."""
import json, os, shutil, subprocess, sys, time
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from helpers import CLIPS, ROOT, frames_of, real
from talking_face.config import PreprocessConfig, SelectConfig
from talking_face.core import generator_for, read_json
from talking_face.data.data_report import data_report
from talking_face.data.forgetting import forget
from talking_face.data.preprocessing import preprocess
from talking_face.data.report_card import CARD_FRAMES, card_frames, card_of, explore_clip, face_quality, head_pose, report_card
from talking_face.data.selection import read_keys, save_selection, select
from talking_face.data.shards import Manifest, StoredClip, open_clip, read_manifest
from talking_face.data.sources import landmarks_beside
from talking_face.runs import execute
from talking_face.signals.landmarks import FLIP_ORDER
from talking_face.signals.sound import read_audio
from talking_face.signals.speech_activity import speech_frames, speech_share

VIDEOS = sorted(CLIPS.glob('*/*_c0.mp4'))


@pytest.fixture(scope='module')
def shards(tmp_path_factory) -> Path:
    "Four embedded clips with their known points; in the last one a third of the face is hidden from the detector's answer."
    folder = tmp_path_factory.mktemp('cards')
    for number, video in enumerate(VIDEOS[:4]):
        target = folder/'videos'/video.parent.name/video.name
        target.parent.mkdir(parents=True)
        shutil.copy(video, target)
        points = landmarks_beside(video) + 0.5
        if number == 3: points[20:45] = np.nan
        np.savez(target.with_suffix('.npz'), landmarks=points)
    preprocess([folder/'videos'], folder/'shards', PreprocessConfig(size=128), landmarks=landmarks_beside)
    return folder/'shards'


def without_card(clip: StoredClip) -> StoredClip:
    return StoredClip(clip.key, {**clip.members, 'json': json.dumps({name: value for name, value in clip.info.items() if name != 'card'}).encode()})


# ---- the card ----

def test_a_new_card_says_what_the_stored_one_says(shards):
    for record in read_manifest(shards):
        clip = open_clip(record)
        stored, anew = clip.info['card'], card_of(without_card(clip))
        assert card_of(clip) == stored and stored.keys() == anew.keys()
        for name, value in stored.items():
            tolerance = dict(sharpness=0.3, brightness=0.01, contrast=0.01, face_pixels=0.2).get(name, 0)       # stored: before JPEG; anew: after it
            if value is None or not tolerance: assert anew[name] == value, name
            else: assert abs(anew[name] - value) <= tolerance, name
    shares = sorted(card_of(open_clip(record))['face_share'] for record in read_manifest(shards))
    assert shares[1:] == [1, 1, 1] and abs(shares[0] - 50 / 75) < 0.001


def test_a_card_is_the_same_in_any_process(shards):
    record = read_manifest(shards).records[0]
    code = ('import sys, json; from talking_face.data.shards import *; from talking_face.data.report_card import *\n'
            'clip = open_clip(read_manifest(sys.argv[1]).records[0]); clip.info.pop("card"); print(json.dumps(card_of(clip)))')
    def card_with(**variables: str) -> dict:
        done = subprocess.run([sys.executable, '-c', code, str(shards)], env=os.environ | variables, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
        return json.loads(done.stdout)
    assert card_with(OMP_NUM_THREADS='1', PYTHONHASHSEED='1') == card_with(OMP_NUM_THREADS='2', PYTHONHASHSEED='2') == card_of(without_card(open_clip(record)))


def test_a_card_is_cheap(shards, tmp_path):
    "Its share of the processor time of preprocessing with dlib: 8 % measured."
    clip = without_card(open_clip(read_manifest(shards).records[0]))
    shutil.copytree(VIDEOS[0].parent, tmp_path/'videos', ignore=lambda folder, names: [name for name in names if name != VIDEOS[0].name])
    def cpu(work) -> float: start = time.process_time(); work(); return time.process_time() - start
    card = min(cpu(lambda: card_of(clip)) for _ in range(3))
    whole = cpu(lambda: preprocess([tmp_path/'videos'], tmp_path/'out', PreprocessConfig(detector='dlib')))
    assert card < 0.15 * whole, (card, whole)


def test_frames_and_points_must_fit(shards):
    clip = open_clip(read_manifest(shards).records[0])
    arguments = clip.landmarks, 100.0, np.zeros(0, np.float32), Fraction(25), 75, clip.positions
    pictures = clip.frames(card_frames(len(clip)))
    assert report_card(pictures, *arguments)['face_share'] == 1 and len(pictures) == CARD_FRAMES
    for wrong in (pictures[:-1], [*pictures, pictures[0]]):
        with pytest.raises(ValueError): report_card(wrong, *arguments)


def test_pose_of_detected_points():
    from talking_face.signals.detectors import make_detector
    from talking_face.signals.landmarks import detect_face
    points, truth = [], []
    with make_detector('dlib', '') as detector:
        for video in VIDEOS[:6]:
            poses, pictures = np.load(video.with_suffix('.npz'))['pose_degrees'], frames_of(video, 61)
            for index in range(0, 75, 15): points.append(detect_face(pictures[index], detector).landmarks); truth.append(poses[index])
    points, truth = np.array(points), np.array(truth)
    errors = np.abs(head_pose(points) - truth)
    assert (errors.mean(0) < [3, 6, 2]).all() and np.corrcoef(head_pose(points)[:, 0], truth[:, 0])[0, 1] > 0.97
    mirrored = points[:, FLIP_ORDER] * [-1, 1] + [255, 0]
    assert np.allclose(head_pose(mirrored), head_pose(points) * [-1, 1, -1], atol=1e-4)
    angle = np.radians(20)                                                          # the picture turned by 20 degrees, counter-clockwise as seen
    turned = (points - 128) @ np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) + 128
    moved = head_pose(turned)
    assert np.allclose(moved[:, 2] - head_pose(points)[:, 2], 20, atol=4) and np.allclose(head_pose(points * 3 + 7), head_pose(points), atol=1e-3)


def test_sharpness_orders_real_pictures():
    random = generator_for(3)
    for video in VIDEOS[::3]:
        image, points = frames_of(video, 1)[0], landmarks_beside(video)[0]
        values = [face_quality(cv2.GaussianBlur(image, (0, 0), sigma) if sigma else image, points)[0] for sigma in (0, 1, 2, 3, 5)]
        assert all(before > after for before, after in zip(values, values[1:])) and values[0] > 2 and values[-1] < 1
        noisy = face_quality(np.clip(image + random.normal(0, 8, image.shape), 0, 255).astype(np.uint8), points)[0]
        assert abs(noisy / values[0] - 1) < 0.15
    assert face_quality(np.zeros((64, 64, 3), np.uint8), points / 4) == (0.0, 0.0, 0.0)
    far_outside = face_quality(image, points + 1000)
    assert all(np.isfinite(far_outside))


def test_the_explorer_needs_no_front_end(shards):
    widget = explore_clip(open_clip(read_manifest(shards).records[0]))
    widget.children[0].value = 12
    assert widget.kwargs == dict(index=12)


# ---- speech ----

def test_speech_in_recordings():
    shares = {name: speech_share(read_audio(real(f'speech/{name}.wav'))) for name in
              ('radio_address_clean', 'studio_sentences_pauses', 'speech_background_noise', 'speech_over_music')}
    assert shares['radio_address_clean'] > 0.9 and 0.4 < shares['studio_sentences_pauses'] < 0.65 and 0.7 < shares['speech_background_noise'] < 0.95
    assert 0.3 < shares['speech_over_music'] < 0.6
    voice = read_audio(real('speech/studio_sentences_pauses.wav'))
    clean = speech_frames(voice)
    for decibels in (20, 10, 5):
        noise = voice.std() * 10 ** (-decibels / 20) * generator_for(decibels).standard_normal(len(voice))
        assert np.mean(speech_frames((voice + noise).astype(np.float32)) == clean) > 0.95
    assert np.mean(speech_frames(voice * np.float32(0.03)) == clean) > 0.95


# ---- selection and report ----

def test_selection_of_preprocessed_clips(shards, tmp_path):
    manifest = read_manifest(shards)
    everything, whole = select(manifest), select(manifest, SelectConfig(minimum_face_share=0.9))
    assert everything.kept == manifest and len(whole.kept) == 3 and whole.counts == {'minimum_face_share': (1, 1)}
    assert read_keys(save_selection(whole, tmp_path/'keys.txt')) == whole.kept.keys
    save_selection(whole, tmp_path/'copy')
    assert read_manifest(tmp_path/'copy').sha256 == whole.kept.sha256
    sharpest = max(card['sharpness'] for card in everything.cards.values())
    assert len(select(manifest, SelectConfig(minimum_sharpness=sharpest)).kept) == 1


def test_report_notebook(shards, tmp_path):
    folder = Path(shutil.copytree(shards, tmp_path/'shards'))
    first = read_manifest(folder).identities[0]
    forget(folder, identities=[first])
    execute(ROOT/'nbs/runs/data_report.ipynb', tmp_path/'executed.ipynb', tmp_path, data=str(folder), out=str(tmp_path/'out'))
    report, expected = read_json(tmp_path/'out/report.json'), data_report(read_manifest(folder)).as_dict()
    assert report == json.loads(json.dumps(expected)) and report['whole']['clips'] == 3 and first not in (tmp_path/'out/report.md').read_text()
    assert report['failures'] == {'no face': dict(files=0, frames=25)}
    assert cv2.imread(str(tmp_path/'out/faces.png')).shape == (384, 768, 3)
    assert any('image/png' in output.get('data', {}) for cell in read_json(tmp_path/'executed.ipynb')['cells'] for output in cell.get('outputs', []))


def test_report_of_nothing(shards, tmp_path):
    empty = data_report(Manifest(read_manifest(shards).folder, ()))
    assert empty.whole['clips'] == 0 and empty.quantiles() == {} and 'Left out' in empty.markdown()
