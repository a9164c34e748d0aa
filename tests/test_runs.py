"""The notebooks for papermill: executed from end to end with tiny values, refused before anything runs where a parameter is wrong."""
import ast, json, logging, os, shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import papermill
import pytest

from talking_face.config import PreprocessConfig
from talking_face.core import ConfigError, MediaError
from talking_face.data.preprocessing import preprocess
from talking_face.runs import check_parameters, declared_parameters, execute

from helpers import CLIPS, ROOT, clip, frames_of, lag_and_likeness, watch

RUNS = {path.stem: path for path in sorted((ROOT/'nbs/runs').glob('*.ipynb'))}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch): monkeypatch.setenv('OMP_NUM_THREADS', '1')     # for the kernels


def outputs(notebook: Path) -> list[dict]:
    return [output for cell in json.loads(notebook.read_text())['cells'] for output in cell.get('outputs', [])]


def text(notebook: Path) -> str:
    return '\n'.join(''.join(output.get('text', '')) + ''.join(output.get('data', {}).get('text/plain', '')) for output in outputs(notebook))


def pictures(notebook: Path) -> int:
    return sum('image/png' in output.get('data', {}) for output in outputs(notebook))


# ---- executed ----

@pytest.fixture(scope='module')
def way(workshop, tmp_path_factory) -> Path:
    "A folder in which the notebooks were executed, one after the other."
    folder, lines = tmp_path_factory.mktemp('way'), []
    preprocess([workshop.videos], folder/'seconds', PreprocessConfig(size=64, detector='dlib', maximum_seconds=1))
    experiment = dict(shards=str(folder/'seconds'), train_split='', test_splits=[], shots=[2], seeds=[0], people=2, threads=1)
    given = {'meta_learn': dict(shards=str(workshop.shards), out=str(folder/'run'), split='', steps=6, threads=1),
             'fine_tune': dict(run=str(folder/'run'), photos=str(workshop.videos/'syn11'), out=str(folder/'person'), shots=3, epochs=1, end_s=1,
                               threads=1, detector='dlib'),
             'reenact': dict(person=str(folder/'person'), driving=str(clip('syn01')), out=str(folder/'film.mp4'), side_by_side=True, detector='dlib'),
             'data_report': dict(data=str(workshop.shards), out=str(folder/'report')),
             'audio_value': experiment | dict(out=str(folder/'value'), shots=2, systems=['few_shot', 'va_slim'], steps=2, fine_tune_epochs=0, scorer_steps=2),
             'compare_modes': experiment | dict(out=str(folder/'modes'), people=1, seconds=1.0, fine_tune_seconds=.2, probe_steps=2)}
    for name, parameters in given.items(): execute(RUNS[name], folder/f'{name}.ipynb', ROOT, callback=lines.append, **parameters)
    (folder/'progress.txt').write_text('\n'.join(lines))
    return folder


def test_everything_is_executed_and_kept(way):
    made = {'film.mp4', 'modes', 'person', 'progress.txt', 'report', 'run', 'seconds', 'value', *(f'{name}.ipynb' for name in RUNS)}
    assert set(os.listdir(way)) == made
    for name in RUNS:
        cells = [cell for cell in json.loads((way/f'{name}.ipynb').read_text())['cells'] if cell['cell_type'] == 'code']
        assert all(cell['execution_count'] for cell in cells)
        assert not [output for output in outputs(way/f'{name}.ipynb') if output['output_type'] == 'error' or output.get('name') == 'stderr']


def test_results_are_there(way):
    steps = [row['step'] for row in map(json.loads, (way/'run/metrics.jsonl').read_text().splitlines()) if row['event'] == 'step']
    assert steps == [6] and (way/'run/DONE').exists() and list((way/'run/checkpoints').glob('step-000006.*'))
    header = json.loads((way/'person/config.json').read_text())
    assert (header['photos'], header['run']) == (3, str(way/'run'))
    assert header['steps'] == header['fine_tuning']['views']      # one epoch: every view of 3 photos, 3 together
    film = watch(way/'film.mp4')
    assert (len(film.times_s), film.width, film.height) == (75, 128, 64) and len(film.sound)


def test_experiments_leave_their_tables(way):
    value, modes = (json.loads((way/name/'results.json').read_text()) for name in ('value', 'modes'))
    assert {row[0] for row in value['means']} == {'few_shot', 'va_slim', 'real frames'} and len(value['answers']) == 4      # with and without lips, each twice
    assert {row[2] for row in modes['means']} >= {'best fine_tuned', 'thesis feed_forward', 'warp', 'real'} and modes['settings']['seconds'] == 1
    for name in ('value', 'modes'): assert {'measured.csv', 'results.csv', 'results.json', 'results.md', 'stages', 'strip.png'} <= set(os.listdir(way/name))


def test_pages_show_figures_pictures_and_progress(way):
    assert [pictures(way/f'{name}.ipynb') for name in ('meta_learn', 'fine_tune', 'reenact')] == [5, 2, 1]
    assert '6 steps in' in text(way/'meta_learn.ipynb') and 'frames=75' in text(way/'reenact.ipynb')
    steps = json.loads((way/'person/config.json').read_text())['steps']
    shown = (way/'progress.txt').read_text()
    assert [pictures(way/f'{name}.ipynb') for name in ('audio_value', 'compare_modes')] == [3, 6]      # bars, and the strip
    assert 'doing va_slim-seed0 (3 of 3)' in text(way/'audio_value.ipynb') and 'doing thesis-seed0 (2 of 2)' in text(way/'compare_modes.ipynb')
    for line in ('meta-learning tiny few_shot 6/6', f'fine-tuning on 3 photos {steps}/{steps}', 'finding the face 75/75', 'generating 75/75'): assert line in shown


# ---- refused ----

TYPOS = [('meta_learn', 'stesp', 6, "'steps'"), ('meta_learn', 'steps', '6', 'int'), ('meta_learn', 'steps', 6.5, 'int'),
         ('meta_learn', 'resume', 1, 'bool'), ('fine_tune', 'epoch', 1, "'epochs'"), ('fine_tune', 'photos', ['a', 'b'], 'str'),
         ('reenact', 'side_by_sied', True, "'side_by_side'"), ('reenact', 'audio', None, 'str')]


@pytest.mark.parametrize('notebook, name, value, word', TYPOS)
def test_wrong_parameter_is_refused_before_anything_runs(tmp_path, monkeypatch, notebook, name, value, word):
    monkeypatch.setattr(papermill, 'execute_notebook', lambda *a, **k: pytest.fail('the notebook was started'))
    with pytest.raises(ConfigError) as error: execute(RUNS[notebook], tmp_path/'new folder'/'out.ipynb', tmp_path, **{name: value})
    assert f'{notebook}.ipynb' in str(error.value) and name in str(error.value) and word in str(error.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('notebook', RUNS)
def test_papermill_knows_every_parameter(notebook):
    "Its own inspection (`papermill --help-notebook`) reads names, types, defaults and help from the same cell."
    declared, inspected = declared_parameters(RUNS[notebook]), papermill.inspect_notebook(str(RUNS[notebook]))
    assert list(inspected) == list(declared) and declared
    for name, value in declared.items():
        seen = inspected[name]
        assert (seen['inferred_type_name'], ast.literal_eval(seen['default'])) == (type(value).__name__, value) and seen['help'], name


def test_papermill_called_directly_with_a_typo_fails_inside(tmp_path, caplog):
    from papermill.exceptions import PapermillExecutionError
    with caplog.at_level(logging.ERROR), pytest.raises(PapermillExecutionError) as error:
        wrong = dict(stesp=6, out=str(tmp_path/'run'))
        papermill.execute_notebook(str(RUNS['meta_learn']), str(tmp_path/'out.ipynb'), wrong, cwd=str(ROOT), progress_bar=False)
    assert error.value.ename == 'ConfigError' and "did you mean 'steps'" in error.value.evalue
    assert os.listdir(tmp_path) == ['out.ipynb']      # papermill keeps its copy; no run was begun


def test_fault_inside_comes_back_as_itself(workshop, tmp_path):
    with pytest.raises(MediaError, match='nowhere.mp4: there is no such file') as error:
        execute(RUNS['reenact'], tmp_path/'out.ipynb', tmp_path, person=str(workshop.person), driving='nowhere.mp4', out='film.mp4')
    assert type(error.value) is MediaError and os.listdir(tmp_path) == ['out.failed.ipynb']
    kept = outputs(tmp_path/'out.failed.ipynb')
    assert kept[-1]['ename'] == 'MediaError'                                                                          # where it failed,
    assert any('| `adapt` |' in ''.join(output.get('data', {}).get('text/markdown', '')) for output in kept)         # and what went well before


# ---- the walkthrough, which takes minutes, without the work: what it asks of whom ----

def test_walkthrough_gives_the_notebooks_what_they_take(workshop, tmp_path, monkeypatch):
    from talking_face.app import walkthrough
    calls = []
    def prepare(inputs, out, config, progress):
        assert inputs == [CLIPS] and Path(config.identities).is_file()
        shutil.copytree(workshop.shards, out)
        (out/'manifest.jsonl').write_text((out/'manifest.jsonl').read_text().replace('"split": ""', '"split": "test"'))
        return SimpleNamespace(clips=2, frames=150)
    def note(notebook, output, folder, **given):
        calls.append((notebook.stem, SimpleNamespace(**check_parameters(given, declared_parameters(notebook), notebook.name))))
    monkeypatch.setattr(walkthrough, 'preprocess', prepare)
    monkeypatch.setattr(walkthrough, 'execute', note)
    shards, run, people = walkthrough.run_stages(tmp_path, ROOT, 7, 3)
    assert [name for name, _ in calls] == ['meta_learn', 'fine_tune', 'fine_tune', 'reenact', 'reenact'] and list(people) == ['syn01', 'syn11']
    train, first, second, cross, own = (given for _, given in calls)
    assert (train.shards, train.out, train.steps, train.seed) == (str(shards), str(run), 7, 3)
    assert {(tuned.run, tuned.photos, tuned.shots, tuned.seed) for tuned in (first, second)} == {(str(run), str(shards), 8, 3)}
    assert [first.out, second.out] == [str(path) for path in people.values()] and first.clip.startswith('syn01') and second.clip.startswith('syn11')
    assert cross.person == own.person == first.out and Path(cross.driving) == clip('syn11') and cross.side_by_side
    assert round(first.end_s * 25, 6) == 37            # the photos are from frames 0 to 36 of 75; the face is judged on frames 38 to 74
    held_out, whole = watch(Path(own.driving)), watch(clip('syn01'))
    there, source = (np.stack(frames_of(path)).astype(int) for path in (Path(own.driving), clip('syn01')))
    assert len(held_out.times_s) == 37 and np.abs(there - source[38:]).mean() < 3
    lag, likeness = lag_and_likeness(whole.sound[38 * 640:], held_out.sound)
    assert abs(lag) <= 16 and likeness > .95
