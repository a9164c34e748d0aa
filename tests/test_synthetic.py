"""The synthetic corpus: same seed, same truth, in any order, by any number of processes, after a kill, on another processor; the judges' figures on fresh people."""
import csv, hashlib, json, os, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest

from talking_face.config import SynthesisConfig
from talking_face.core import DataError, WeightsUnavailable
from talking_face.data.head_model import find_head_assets
from talking_face.data.synthetic import corpus_identity, read_truth, synthesize
from talking_face.evaluation.corpus_truth import FIGURES, corpus_figures, judge_corpus
from talking_face.evaluation.metrics import Judge
from talking_face.signals.media import probe_video

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = ROOT/'data/embedded'
needs_head = pytest.mark.skipif(not find_head_assets(), reason='the head assets (MakeHuman, CC0) are not here; see the card of data/embedded')
QUICK = SynthesisConfig(identities=2, clips=2, seconds=.4, size=64, seed=11)


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob('*')) if path.is_file()}


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> Path:
    "A corpus of two people, rendered in one go by one process."
    out = tmp_path_factory.mktemp('corpus')/'whole'
    assert synthesize(out, QUICK).rendered == 4
    return out


@needs_head
def test_processes_and_growth_do_not_change_a_clip(whole, tmp_path):
    synthesize(tmp_path/'grown', QUICK.replace(identities=1, clips=1))
    corpus = synthesize(tmp_path/'grown', QUICK.replace(jobs=2))
    assert corpus.rendered == 3 and len(corpus.rows) == 4 and contents(tmp_path/'grown') == contents(whole)


@needs_head
def test_a_kill_costs_only_the_clip_in_work(whole, tmp_path):
    out = tmp_path/'killed'
    command = [Path(sys.executable).parent/'talking-face', 'synthesize', '--out', str(out), *'--identities 2 --clips 2 --seconds .4 --size 64 --seed 11 --jobs 2'.split()]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(out.glob('clips/*/[!.]*.npz')) and process.poll() is None and time.monotonic() < deadline: time.sleep(.02)
    if process.poll() is None: os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in out.glob('clips/*/[!.]*.npz')}
    assert done
    corpus = synthesize(out, QUICK)
    assert corpus.rendered == 4 - len(done) and all(path.stat().st_mtime_ns == before for path, before in done.items())
    assert contents(out) == contents(whole)


@needs_head
def test_two_calls_do_not_share_a_folder(whole):
    import fcntl
    before, handle = contents(whole), os.open(whole, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(DataError, match='another process'): synthesize(whole, QUICK)
    finally: os.close(handle)
    assert synthesize(whole, QUICK).rendered == 0 and contents(whole) == before


@needs_head
def test_a_missing_voice_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'espeakng_loader', None)                    # as if the extra were not installed
    with pytest.raises(WeightsUnavailable, match='synthetic'): synthesize(tmp_path/'out', QUICK)
    assert not (tmp_path/'out').exists()


OTHER_MACHINE = '''
import sys, numpy as np
from talking_face.config import SynthesisConfig
from talking_face.core import generator_for
from talking_face.data.head_model import find_head_assets, load_head_model
from talking_face.data.head_scene import HeadState, draw_view
from talking_face.data.synthetic import ROUNDED, prepare_person
person = prepare_person(load_head_model(find_head_assets()), 0, SynthesisConfig(size=128, seed=11))
view = draw_view(5); view = view._replace(exposure=person.scene.calibrate(view))
states = [HeadState({}, 0., 0., 0., (0., 0.)), HeadState({'mouth-open': .5, 'eye-left-closure': 1.}, .35, -.1, .05, (.1, 0.))]
made = [person.scene.render(state, view, generator_for(6)) for state in states]
np.savez(sys.argv[1], pictures=np.stack([one.picture for one in made]), points=np.round(np.stack([one.landmarks for one in made]).astype(np.float64) * ROUNDED))
'''


@needs_head
def test_another_processor_sees_the_same(tmp_path):
    from numpy._core._multiarray_umath import __cpu_dispatch__
    plain = dict(NUMBA_CPU_NAME='generic', NUMBA_CPU_FEATURES='', NUMBA_CACHE_DIR=str(tmp_path/'cache'), NPY_DISABLE_CPU_FEATURES=' '.join(__cpu_dispatch__),
                 OPENBLAS_CORETYPE='Nehalem')
    found = []
    for name, changes in (('here', {}), ('there', plain)):
        subprocess.run([sys.executable, '-W', 'ignore', '-c', OTHER_MACHINE, tmp_path/f'{name}.npz'], cwd=ROOT, env=os.environ | changes, check=True, timeout=300)
        found.append(np.load(tmp_path/f'{name}.npz'))
    assert np.array_equal(found[0]['points'], found[1]['points'])
    assert np.abs(found[0]['pictures'].astype(int) - found[1]['pictures']).max() <= 2


@needs_head
def test_fresh_people_pass_the_judges(tmp_path):
    synthesize(tmp_path, SynthesisConfig(identities=4, clips=2, seconds=1.2, seed=20261))
    figures = corpus_figures(judge_corpus(tmp_path, Judge(detector=None, described=4)))
    assert figures['found'] >= 99 and figures['error_all'] < 4.5 and figures['error_inner'] < 3.3
    assert figures['same_person'] < .33 and figures['two_people'] > figures['same_person'] + .15 and figures['area_under_curve'] > .98


@needs_head
def test_what_a_folder_holds_is_not_mixed(whole, tmp_path):
    def refused(*options) -> str:
        run = subprocess.run([Path(sys.executable).parent/'talking-face', 'synthesize', *map(str, options)], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert run.returncode == 2 and run.stderr.startswith('error: ') and run.stderr.count('\n') == 1, run.stderr
        return run.stderr
    assert 'seed was 11 and is 12' in refused('--out', whole, '--seed', 12, '--size', 64, '--seconds', .4)
    (tmp_path/'mine/clips').mkdir(parents=True)
    assert 'not made by synthesize' in refused('--out', tmp_path/'mine')
    assert list((tmp_path/'mine').rglob('*')) == [tmp_path/'mine/clips']
    assert 'assets' in refused('--out', tmp_path/'out', '--assets', tmp_path/'nowhere') and not (tmp_path/'out').exists()
    assert 'identities' in refused('--out', tmp_path/'out', '--identities', 0)


# ---- the embedded corpus ----

def test_embedded_corpus_is_what_its_card_says():
    rows = list(csv.DictReader((EMBEDDED/'manifest.csv').read_text().splitlines()))
    splits = {}
    for row in rows: splits.setdefault(row['identity'], set()).add(row['split'])
    assert len(splits) >= 24 and all(len(found) == 1 for found in splits.values()) and set.union(*splits.values()) == {'train', 'validation', 'test'}
    assert all([row['identity'] for row in rows].count(identity) >= 2 for identity in splits)
    assert sum(path.stat().st_size for path in EMBEDDED.rglob('*') if path.is_file()) <= 12e6
    listed = {name: digest for digest, name in (line.split('  ') for line in (EMBEDDED/'SHA256SUMS').read_text().splitlines())}
    assert {name for name in contents(EMBEDDED/'clips')} == {name.removeprefix('clips/') for name in listed}
    assert all(contents(EMBEDDED)[name] == digest for name, digest in listed.items())
    assert not [path for path in EMBEDDED.rglob('*') if path.suffix in ('.obj', '.target', '.mhclo')]           # no asset is shipped
    card = (EMBEDDED/'README.md').read_text()
    figures = json.loads((EMBEDDED/'figures.json').read_text())
    assert 'CC0 1.0' in card and 'makehuman' in card and f'{len(rows)} clips of {len(splits)} people' in card and FIGURES['error_inner'].strip() in card
    assert figures['found'] >= 99.5 and figures['error_all'] < 4 and figures['error_inner'] <= 3 and figures['area_under_curve'] >= .9985 and figures['mouth_sound'] >= .54


@pytest.mark.parametrize('number', range(24))
def test_embedded_truth_fits_its_video(number):
    seed = json.loads((EMBEDDED/'synthesis.json').read_text())['seed']
    for video in sorted((EMBEDDED/f'clips/syn{number + 1:02d}').glob('*.mp4')):
        info, truth = probe_video(video), read_truth(video)
        assert (info.frame_count, info.fps, info.has_audio, info.width, info.height) == (75, 25, True, 256, 256)
        assert truth.landmarks.shape == (75, 68, 2) and truth.face_mask.shape == (75, 256, 256) and len(truth.visemes) == len(truth.expressions) == 75
        assert truth.identity == corpus_identity(seed, number).to_dict()
        inside = truth.landmarks[:, 27:].round().astype(int)                        # nose, eyes and mouth lie on the face
        shown = truth.face_mask[np.arange(75)[:, None], inside[..., 1].clip(0, 255), inside[..., 0].clip(0, 255)]
        assert shown.mean() > .9
        assert np.abs(truth.pose_degrees).max(0)[0] <= 30 and (truth.mouth_opening >= 0).all() and truth.mouth_opening.std() > .005
        assert truth.phoneme_times_s.shape == (len(truth.phonemes), 2) and (np.diff(truth.phoneme_times_s[:, 0]) >= 0).all() and truth.phoneme_times_s.max() <= 3.001


def test_embedded_figures_are_measured_again_on_a_part():
    figures = corpus_figures(judge_corpus(EMBEDDED, Judge(described=2), every=8))
    stored = json.loads((EMBEDDED/'figures.json').read_text())
    assert abs(figures['error_all'] - stored['error_all']) < 1 and abs(figures['error_inner'] - stored['error_inner']) < .8 and figures['found'] >= 99
