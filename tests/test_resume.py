"""A training that is killed and continued is the same training: weights, state and figures, bit for bit. One that goes wrong says so and stops."""
import json, shutil, signal, time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from helpers import ADVERSARIAL, DLIB, MICRO, Job, die_before, finished, shell, wait_for

STEPS = 12
MODES = ['--losses.gradient-penalty', 1, '--gradient-penalty-every', 3, '--adversarial-start', .2, '--accumulate', 2, '--checkpointing']
HEARING = ['--model.sound', 'logmel', '--model.sound-size', 8, '--model.sound-width', 4, '--losses.sync', .1, '--losses.sound-match', .1, '--sync-start', .3, '--mouth-drop', .5, '--targets', 5]
SYSTEMS = {'reconstruction': [],
           'adversarial': ADVERSARIAL,                         # with a discriminator and a table of which a step moves a few rows only
           'modes': [*ADVERSARIAL, *MODES],                    # which begins after some steps, does something dear now and then, and goes through its batch in parts
           'hearing': HEARING}                                 # with a sound embedder, a table of sounds, and a scorer that learns beside them


def command(shards: Path, run: Path, *options: object) -> list[object]:
    rhythm = ['--log-every', 1, '--checkpoint-every', 1, '--keep-checkpoints', 3]
    return ['train', '--data', shards, '--out', run, '--steps', STEPS, *rhythm, *MICRO, *options]


def checkpoints(run: Path) -> dict[str, bytes]:
    "Every file in the folder of checkpoints, headers, hidden files and all."
    return {path.name: path.read_bytes() for path in sorted((run/'checkpoints').iterdir())}


def steps(run: Path) -> list[int]:
    "The steps whose weights are there, in order."
    return sorted(int(path.name[5:11]) for path in run.glob('checkpoints/step-??????.safetensors'))


def newest(run: Path) -> int: return max(steps(run), default=0)


def log(run: Path) -> str:
    return (run/'metrics.jsonl').read_text() if (run/'metrics.jsonl').exists() else ''


def figures(run: Path) -> list[dict]:
    "What was logged of the steps, without the clock."
    rows = [json.loads(line) for line in log(run).splitlines()]
    return [{name: value for name, value in row.items() if name != 'time'} for row in rows if row['event'] == 'step']


def assert_same(run: Path, reference: Path) -> None:
    assert checkpoints(run) == checkpoints(reference) and figures(run) == figures(reference)
    assert (run/'DONE').exists() and not (run/'FAILED').exists() and not list(run.rglob('.*'))


@pytest.fixture(scope='module')
def references(workshop, tmp_path_factory) -> dict[str, Path]:
    "Runs that nobody disturbed."
    from talking_face.app.cli import main
    runs = {name: tmp_path_factory.mktemp(name)/'run' for name in SYSTEMS}
    for name, run in runs.items(): assert main([str(part) for part in command(workshop.shards, run, *SYSTEMS[name])]) == 0
    return runs


def test_reference_has_what_must_be_restored(references):
    "The other tests would prove little if these were not there, or never moved: averages, moments, rows of the video table and the rows' moments."
    run = references['adversarial']
    late, early = (load_file(run/f'checkpoints/step-{step:06d}.safetensors') for step in (STEPS, STEPS - 1))
    moved = {name for name in late if not np.array_equal(late[name], early[name])}
    for part in ('embedder.', 'generator.', 'discriminator.', 'discriminator.table.', 'average.embedder.', 'average.generator.'):
        assert any(name.startswith(part) for name in moved), part
    state = load_file(run/f'checkpoints/step-{STEPS:06d}.state.safetensors')
    for part in ('generator/', 'discriminator/', 'videos/'):
        assert any(name.startswith(part) and np.abs(value).max() > 0 for name, value in state.items()), part
    assert {'adversarial', 'match', 'feature_matching', 'discriminator'} <= figures(run)[0].keys() and len(figures(run)) == STEPS


def test_modes_have_what_must_be_restored(references):
    late, first = ({name: figures(references[name])[step] for name in ('modes', 'hearing')} for step in (-1, 0))
    assert 'adversarial' not in first['modes'] and 'adversarial' in late['modes'] and sum('gradient_penalty' in row for row in figures(references['modes'])) == 6
    assert 'sync' not in first['hearing'] and {'sync', 'sound_match', 'sound_table', 'scorer'} <= late['hearing'].keys()
    state = load_file(references['hearing']/f'checkpoints/step-{STEPS:06d}.state.safetensors')
    for part in ('generator/', 'sound_table/', 'scorer/'): assert any(name.startswith(part) and np.abs(value).max() > 0 for name, value in state.items()), part


# ---- killed ----

@pytest.mark.parametrize('system', SYSTEMS)
def test_killed_at_random_moments(workshop, references, tmp_path, system):
    "kill -9 again and again: some steps after the last start, and then up to 30 ms later, which is anywhere in a step or its checkpoint."
    run, random, kills = tmp_path/'run', np.random.default_rng(len(system)), 0
    while newest(run) < STEPS - 5 and kills < 6:
        begun, more = log(run).count('"start"'), random.integers(0, 3)
        job = Job(tmp_path/f'{kills}', *command(workshop.shards, run, '--resume', *SYSTEMS[system]))
        wait_for(lambda: log(run).count('"start"') > begun and log(run).rpartition('"start"')[2].count('"step": ') > more, job.process.is_alive)
        time.sleep(random.uniform(0, .03))
        if job.kill() == 0: break      # it was through already
        kills += 1
    assert Job(tmp_path/'last', *command(workshop.shards, run, '--resume', *SYSTEMS[system])).outcome().code == 0
    assert kills >= 2
    assert_same(run, references[system])


@pytest.mark.parametrize('call, place, number, left', [
    *(('replace', name, 0, []) for name in ('config.json', 'environment.json', 'data.json')),  # before there is anything
    ('replace', '/step-', 0, []), ('replace', '/step-', 1, []),                              # before the first state; after it, before its weights
    ('replace', '/step-', 8, [2, 3, 4]), ('replace', '/step-', 9, [2, 3, 4]),                # the same of the fifth, whose predecessors are there
    ('unlink', '/step-', 0, [1, 2, 3, 4]), ('unlink', '/step-', 1, [1, 2, 3, 4]),            # before the first is deleted; when half of it is
    ('replace', 'DONE', 0, [10, 11, 12])])
def test_killed_just_before_a_file_changes(workshop, references, talking_face, tmp_path, call, place, number, left):
    run = tmp_path/'run'
    job = command(workshop.shards, run, '--resume', *ADVERSARIAL)
    killed = Job(tmp_path/'killed', *job, prepare=die_before, details=(call, number, place)).outcome()
    assert killed.code == -signal.SIGKILL and steps(run) == left
    person = ['fine-tune', '--run', run, '--photos', workshop.photo, '--out', tmp_path/'person', '--epochs', 0, *DLIB]
    if left: assert talking_face(*person).code == 0     # what is there can be used as it is
    assert talking_face(*job).code == 0
    assert_same(run, references['adversarial'])


def test_killed_while_writing_the_log(workshop, references, talking_face, tmp_path):
    run = shutil.copytree(references['reconstruction'], tmp_path/'run')
    for path in run.glob(f'checkpoints/step-{STEPS:06d}*'): path.unlink()
    (run/'metrics.jsonl').write_text(log(run)[:-40])      # a torn last line
    assert talking_face(*command(workshop.shards, run, '--resume')).code == 0
    assert figures(run) == figures(references['reconstruction'])


def test_means_in_the_log_survive_a_kill_between_two_lines(workshop, talking_face, tmp_path):
    "A line for every five steps, a checkpoint for every two: the line of step 10 is the mean of five steps, although the run is continued at step 8."
    rhythm = ['--log-every', 5, '--checkpoint-every', 2]
    assert talking_face(*command(workshop.shards, tmp_path/'whole', *rhythm)).code == 0
    job = command(workshop.shards, tmp_path/'run', *rhythm)
    killed = Job(tmp_path/'killed', *job, prepare=die_before, details=('replace', 8, '/step-')).outcome()
    assert killed.code == -signal.SIGKILL and newest(tmp_path/'run') == 8
    assert talking_face(*job, '--resume').code == 0
    assert [row['step'] for row in figures(tmp_path/'run')] == [5, 10, 12]
    assert_same(tmp_path/'run', tmp_path/'whole')


@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_the_user(workshop, references, talking_face, tmp_path, number, code):
    run = tmp_path/'run'
    process = shell(*command(workshop.shards, run))
    wait_for(lambda: newest(run) >= 2, lambda: process.poll() is None)
    process.send_signal(number)
    outcome = finished(process)
    assert outcome.code == code and outcome.output == '' and 'Traceback' not in outcome.errors and 2 <= newest(run) < STEPS
    assert (run/'FAILED').exists() and not (run/'DONE').exists() and not list(run.rglob('.*'))
    if number == signal.SIGINT: assert len(outcome.messages()) == 1 and outcome.messages()[0].startswith('error: ')
    assert talking_face(*command(workshop.shards, run, '--resume')).code == 0
    assert_same(run, references['reconstruction'])


@pytest.mark.parametrize('died', [False, True])
def test_a_run_begun_with_resume_takes_the_clips_of_the_training_split(workshop, talking_face, tmp_path, died):
    "Whether the folder is new or was left by a kill before anything was trained: test clips stay out."
    shards, run = shutil.copytree(workshop.shards, tmp_path/'shards'), tmp_path/'run'
    manifest = shards/'manifest.jsonl'
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text(''.join(line.replace('"split": ""', f'"split": "{split}"') for line, split in zip(lines, ('train', 'test'))))
    job = command(shards, run, '--resume')
    if died: assert Job(tmp_path/'killed', *job, prepare=die_before, details=('replace', 0, 'data.json')).outcome().code == -signal.SIGKILL
    assert talking_face(*job).code == 0
    assert json.loads((run/'data.json').read_text())['keys'] == [json.loads(lines[0])['key']]


def test_finished_run_is_not_trained_further(workshop, references, talking_face, tmp_path):
    run = shutil.copytree(references['adversarial'], tmp_path/'run')
    assert talking_face(*command(workshop.shards, run, '--resume', *ADVERSARIAL)).code == 0
    assert_same(run, references['adversarial'])


def test_weights_without_their_state_are_refused(workshop, references, talking_face, tmp_path):
    run = shutil.copytree(references['adversarial'], tmp_path/'run')
    newest_state, older_state = (run/f'checkpoints/step-{step:06d}.state.safetensors' for step in (STEPS, STEPS - 1))
    for damage, word in ((lambda: shutil.copy(older_state, newest_state), 'another step'), (newest_state.unlink, 'no such')):
        damage()
        outcome = talking_face(*command(workshop.shards, run, '--resume', *ADVERSARIAL))
        assert outcome.code == 2 and len(outcome.messages()) == 1 and f'step-{STEPS:06d}' in outcome.messages()[0] and word in outcome.messages()[0]


# ---- chance ----

def test_the_seed_decides_everything(workshop, references, tmp_path):
    "A second training, in another process, is the same to the last bit; one with another seed is not."
    jobs = [Job(tmp_path/f'log{seed}', *command(workshop.shards, tmp_path/f'{seed}', '--seed', seed, *ADVERSARIAL)) for seed in (0, 1)]
    assert [job.outcome().code for job in jobs] == [0, 0]
    assert_same(tmp_path/'0', references['adversarial'])
    mine, other = (load_file(tmp_path/f'{seed}/checkpoints/step-{STEPS:06d}.safetensors') for seed in (0, 1))
    trained = [name for name in mine if name.startswith(('embedder.', 'generator.', 'discriminator.')) and mine[name].ndim > 1]
    assert trained and not any(np.array_equal(mine[name], other[name]) for name in trained)


def test_workers_that_draw_ahead_change_nothing(workshop, references, tmp_path):
    job = Job(tmp_path/'log', *command(workshop.shards, tmp_path/'run', '--workers', 2, *ADVERSARIAL))
    assert job.outcome().code == 0
    name = f'checkpoints/step-{STEPS:06d}.safetensors'
    mine, theirs = load_file(tmp_path/'run'/name), load_file(references['adversarial']/name)
    assert mine.keys() == theirs.keys() and all(np.array_equal(mine[key], theirs[key]) for key in mine)


# ---- collapse ----

@pytest.mark.parametrize('options, words', [
    (['--learning-rate', '1e9'], ['learning_rate', 'at most 1']), (['--learning-rate', 'nan'], ['learning_rate']),
    (['--losses.pixel', 'nan'], ['pixel'])])
def test_absurd_options_are_refused(workshop, talking_face, tmp_path, options, words):
    outcome = talking_face(*command(workshop.shards, tmp_path/'run', *options))
    assert outcome.code == 2 and len(outcome.messages()) == 1 and all(word in outcome.messages()[0] for word in words)
    assert not (tmp_path/'run').exists()


def test_numbers_that_are_not_finite_stop_the_run(workshop, references, talking_face, tmp_path, monkeypatch):
    "From step 7 on the pictures are NaN. The checkpoint of step 6 is kept and is good: with sound pictures the run ends as if nothing had happened."
    from talking_face.data.episodes import EpisodeSampler
    original, run = EpisodeSampler.batch, tmp_path/'run'
    def spoiled(sampler, step: int, slots=None):
        batch = original(sampler, step, slots)
        return batch._replace(target_images=batch.target_images * float('nan')) if step >= 6 else batch
    monkeypatch.setattr(EpisodeSampler, 'batch', spoiled)
    outcome = talking_face(*command(workshop.shards, run))
    assert outcome.code == 2 and len(outcome.messages()) == 1 and str(run) in outcome.messages()[0] and 'step 7' in outcome.messages()[0]
    assert newest(run) == 6 and (run/'FAILED').read_text().startswith('TrainingAlarm') and len(figures(run)) == 6
    assert all(np.isfinite(value).all() for value in load_file(run/'checkpoints/step-000006.safetensors').values())
    monkeypatch.undo()
    assert talking_face(*command(workshop.shards, run, '--resume')).code == 0
    assert_same(run, references['reconstruction'])


def test_overflow_stops_the_run(workshop, talking_face, tmp_path):
    outcome = talking_face(*command(workshop.shards, tmp_path/'run', '--losses.pixel', '3e38'))
    assert outcome.code == 2 and 'is inf at step 1' in outcome.messages()[0] and newest(tmp_path/'run') == 0
    assert (tmp_path/'run/FAILED').read_text().startswith('TrainingAlarm')
