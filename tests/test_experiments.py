"""Experiments: intervals against closed forms, stages that several processes share and a kill does not harm, both comparisons from end to end with toy networks."""
import json, multiprocessing, os, signal, time
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import bootstrap

from talking_face.core import ConfigError, DataError, generator_for
from talking_face.evaluation import experiments, modes, sound_value
from talking_face.evaluation.experiments import Interval, Measured, Stage, bootstrap_interval, share_stages
from talking_face.evaluation.metrics import METRICS, Judge
from talking_face.evaluation.modes import ModesConfig
from talking_face.evaluation.sound_value import DEAF, LIPS, REAL_FRAMES, SOUNDS, WAYS, SoundValueConfig
from talking_face.runs import RunFolder, declared_parameters

from helpers import ROOT
from test_evaluation import face_shape

TOY = dict(image_size=32, generator_downs=2, generator_residuals=1, embedding_size=16, embedder_width=4, generator_width=4, generator_last=4, discriminator_width=4,
           attention=False)


# ---- intervals ----

@pytest.mark.parametrize('people', [2, 5, 40])
def test_interval_agrees_with_scipy(people):
    values = generator_for(people).lognormal(size=people)
    ours = bootstrap_interval(values, resamples=20_000)
    theirs = bootstrap((values,), np.mean, method='percentile', n_resamples=20_000, rng=np.random.default_rng(1)).confidence_interval
    assert (ours.mean, ours.n) == (pytest.approx(values.mean()), people)
    assert np.allclose([ours.low, ours.high], theirs, atol=.03 * values.std())


def test_interval_moves_with_its_numbers():
    "Shift, scale, order of people and a wider level do what they must; a column of seeds that is only repeated adds nothing."
    table = generator_for(0).normal(size=(9, 3))
    plain, wide = bootstrap_interval(table), bootstrap_interval(table, level=.99)
    assert np.allclose(bootstrap_interval(5 + 2 * table)[:3], 5 + 2 * np.array(plain[:3]))
    mirrored = bootstrap_interval(-table)
    assert np.allclose([mirrored.low, mirrored.high], [-plain.high, -plain.low]) and mirrored.side == -plain.side
    assert wide.low < plain.low < plain.mean < plain.high < wide.high
    assert np.allclose(bootstrap_interval(np.repeat(table[:, :1], 4, 1))[:3], bootstrap_interval(table[:, 0])[:3])
    shuffled = bootstrap_interval(table[::-1], resamples=20_000)
    assert np.allclose(shuffled[:3], bootstrap_interval(table, resamples=20_000)[:3], atol=.03)


def test_seeds_are_a_source_of_chance_of_their_own():
    "Two seeds that disagree for everybody: however many people, the interval reaches from one to the other. As single cells they would look certain."
    table = np.tile([[0., 1.]], (200, 1))
    crossed, cells = bootstrap_interval(table), bootstrap_interval(table.ravel())
    assert np.allclose([crossed.low, crossed.high], [0, 1]) and cells.high - cells.low < .12


def test_wrong_shapes_and_levels_are_refused():
    for values in ([], [[[1.]]], 3.): pytest.raises(ValueError, bootstrap_interval, values)
    for level in (0, 1, 95): pytest.raises(ValueError, bootstrap_interval, [1., 2.], level)


# ---- stages ----

def note(folder: Path) -> int:
    "The work of a test's stage: leave one line that says who did it."
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder/'workers.txt', 'a') as file: file.write(f'{os.getpid()}\n')
    time.sleep(.05)
    return int(folder.name.split('-')[0])


def hang(folder: Path) -> None:
    folder.mkdir(parents=True); (folder/'begun').touch(); time.sleep(60)


def numbered(out: Path, count: int = 8) -> list[Stage]: return [Stage(out, f'{number}-part', dict(number=number), note) for number in range(count)]


def work_through(out: Path, gate, found) -> None:
    gate.wait()
    found.put(share_stages(numbered(out)))


def test_two_processes_share_the_stages(tmp_path):
    context = multiprocessing.get_context('fork')
    gate, found = context.Barrier(2), context.Queue()
    processes = [context.Process(target=work_through, args=(tmp_path, gate, found)) for _ in range(2)]
    for process in processes: process.start()
    results = [found.get(timeout=30) for _ in processes]
    for process in processes: process.join(10)
    workers = [(stage.folder/'workers.txt').read_text().split() for stage in numbered(tmp_path)]
    assert results == [list(range(8))] * 2 and all(len(names) == 1 for names in workers)      # each exactly once,
    assert len({names[0] for names in workers}) == 2                                          # by both


def test_killed_stage_is_done_again_at_once(tmp_path):
    stage = Stage(tmp_path, '7-part', dict(a=1), hang)
    process = multiprocessing.get_context('fork').Process(target=stage.run)
    process.start()
    deadline = time.monotonic() + 20
    while not (stage.folder/'begun').exists(): assert time.monotonic() < deadline; time.sleep(.01)
    again = stage._replace(work=note)
    assert again.run(wait=False) is False and not again.finished      # somebody is at it
    os.kill(process.pid, signal.SIGKILL); process.join()
    assert again.run(wait=False) and again.result() == 7 and (stage.folder/'begun').exists()


def test_failed_stage_leaves_no_result(tmp_path):
    def fail(folder: Path) -> None: raise DataError('no such clip')
    stage = Stage(tmp_path, 'x', {}, fail)
    with pytest.raises(DataError, match='no such clip'): share_stages([stage])
    assert not stage.finished and stage._replace(work=lambda folder: 3).run() and stage.result() == 3


def test_stage_depends_on_every_setting(tmp_path):
    from talking_face.config import preset
    config = preset('tiny')
    folders = {Stage(tmp_path, 'a', dict(config=each.to_dict()), note).folder for each in (config, config.replace(seed=1), config.replace(model=config.model.replace(attention=True)))}
    assert len(folders) == 3
    with pytest.raises(ValueError): Stage(tmp_path, 'a', dict(value=float('nan')), note).folder      # two NaN settings would be equal or not, by chance


# ---- a judge that sees at once: a face stands in the middle, its mouth as far open as the picture is bright ----

class QuickJudge(Judge):
    def landmarks(self, frames):
        shapes = np.repeat(face_shape()[None], len(frames), 0) * (frames.shape[1] / 32) + frames.shape[1] / 2
        shapes[:, 65:68, 1] += frames.mean((1, 2, 3))[:, None] / 64
        return shapes.astype(np.float32)
    def descriptors(self, frames, landmarks):
        return np.repeat(frames.reshape(len(frames), -1, 3).mean(1), 43, 1)[:, :128].astype(np.float32) / 255


@pytest.fixture(scope='module')
def shards(workshop): return workshop.shards


# ---- best against thesis ----

def toy_modes() -> dict:
    from talking_face.config import preset
    made = modes.mode_configs(ModesConfig())
    return {mode: each.replace(model=each.model.replace(**TOY), support=(2,), losses=each.losses.replace(face=0., pixel=1.)) for mode, each in made.items()}


@pytest.fixture(scope='module')
def compared(shards, tmp_path_factory):
    config = ModesConfig(shards=str(shards), others=str(shards), out=str(tmp_path_factory.mktemp('modes')), seconds=.4, fine_tune_seconds=.1, shots=(2,), people=2,
                         train_split='', test_splits=(), probe_steps=3)
    said = []
    return config, modes.compare_modes(config, toy_modes(), QuickJudge(), said.append), said


def test_both_modes_get_the_steps_that_fit(compared):
    config, result, said = compared
    pace = modes.pace_stage(config, toy_modes()).result()
    costs = {cost['mode']: cost for cost in result.costs if cost['what'] == 'meta-learning'}
    for mode in modes.MODES:
        assert costs[mode]['steps'] == modes.fitting(config.seconds, pace[mode])
        run, = Path(config.out).glob(f'stages/{mode}-seed0-*/run')
        assert json.loads((run/'config.json').read_text())['steps'] == costs[mode]['steps'] == RunFolder(run).events('step')[-1]['step']      # the schedule ends there
    tuned = [cost for cost in result.costs if cost['what'] != 'meta-learning']
    assert len(tuned) == 2 * 4 and len({(cost['mode'], cost['epochs']) for cost in tuned}) == 2      # one number of epochs for everybody


def test_everybody_is_judged_by_the_same_figures(compared):
    config, result, _ = compared
    methods = {row.condition[2] for row in result.rows}
    assert methods == {'real', 'nearest_frame', 'warp', *(f'{mode} {way}' for mode in modes.MODES for way in ('fine_tuned', 'feed_forward'))}
    seen = {(row.condition, row.metric, row.identity) for row in result.rows}
    assert len(seen) == len(result.rows) and {row.identity for row in result.rows} == {'syn01', 'syn11'} and {row.condition[:2] for row in result.rows} == {(name, 'T=2') for name in modes.CORPUS_NAMES}
    value = {(row.condition[2], row.metric, row.identity): row.value for row in result.rows}
    for identity in ('syn01', 'syn11'):
        assert value['real', 'ssim', identity] == 1 > value['warp', 'ssim', identity] > value['best feed_forward', 'ssim', identity]
        assert value['best fine_tuned', 'ssim', identity] != value['best feed_forward', 'ssim', identity]


def test_report_says_who_was_learnt_from(compared):
    config, result, _ = compared
    report = modes.modes_report(result)
    assert '2 people (syn01, syn11), 2 of whom' in report.split('## others')[0] and 'of whom' not in report.split('## others')[1]
    assert 'none of whom' in modes.modes_report(result._replace(learnt=['syn07'])).split('## others')[0]


def test_comparison_goes_on_where_it_was(compared, monkeypatch):
    config, result, said = compared
    assert len(said) == 2 + 4
    monkeypatch.setattr(modes, 'meta_learn', lambda *a, **k: pytest.fail('was trained already'))
    monkeypatch.setattr(modes, 'evaluate_person', lambda *a, **k: pytest.fail('was judged already'))
    for gone in list(Path(config.out).glob('*.*')): gone.unlink()
    again = modes.compare_modes(config, toy_modes(), QuickJudge(), said.append)
    assert str(again) == str(result) and len(said) == 6
    assert {path.name for path in Path(config.out).iterdir()} == {'stages', 'results.json', 'results.csv', 'measured.csv', 'results.md', 'strip.png'}
    stored = json.loads((Path(config.out)/'results.json').read_text())
    assert len(stored['means']) == len({(row.condition, row.metric) for row in result.rows}) and stored['settings'] == config.to_dict()


def test_killed_training_is_resumed_to_the_same_end(shards, tmp_path, monkeypatch):
    config = ModesConfig(shards=str(shards), out=str(tmp_path), train_split='')
    learnt = toy_modes()['best'].replace(steps=4, checkpoint_every=2, threads=1)
    stage = modes.training_stage(config, 'best', 0, learnt)
    saved = RunFolder.log
    def die(self, event, **values):
        saved(self, event, **values)
        if event == 'step' and values['step'] == 3: raise KeyboardInterrupt
    noisy = stage._replace(work=modes.training_stage(config, 'best', 0, learnt.replace(log_every=1)).work)      # logs each step; the same run otherwise
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, 'log', die)
        with pytest.raises(KeyboardInterrupt): noisy.run()
    assert not stage.finished and stage.run() and modes.read_trained(stage).steps == 4
    events = RunFolder(modes.read_trained(stage).run).events('start')
    assert [row['step'] for row in events] == [0, 2]


def invented(better: float) -> list[Measured]:
    "Rows of twelve people in which mode best is `better` than everything else in every figure."
    methods = ('real', 'best fine_tuned', 'best feed_forward', 'thesis fine_tuned', 'thesis feed_forward', 'nearest_frame', 'warp')
    offset = {method: {'best fine_tuned': 2 * better, 'best feed_forward': better}.get(method, 0.) for method in methods}
    sign = {'higher': 1, 'lower': -1, 'real': 1}
    random = generator_for(3)
    return [Measured(('own', 'T=8', method), metric, f'p{person}', seed, 5 + sign[entry.better] * offset[method] + .01 * random.normal())
            for metric, entry in METRICS.items() for method in methods for person in range(12) for seed in (0, 1)]


@pytest.mark.parametrize('better, word', [(1., 'is better than'), (-1., 'is worse than'), (0., 'no difference')])
def test_answers_follow_the_numbers(better, word):
    answers = modes.mode_answers(invented(better))
    assert len(answers) == len(modes.QUESTIONS) * len(modes.ASKED)
    said = [word in answer.words for answer in answers]
    assert all(said) if better else np.mean(said) > .8      # of 25 comparisons of nothing, one or two exclude 0


def test_undefined_figure_is_said_and_not_skipped():
    rows = [row._replace(value=float('nan')) if (row.condition[2], row.metric, row.identity, row.seed) == ('thesis fine_tuned', 'landmarks', 'p3', 1) else row for row in invented(1.)]
    words = [answer.words for answer in modes.mode_answers(rows) if answer.metric == 'landmarks' and 'thesis fine_tuned' in (answer.first, answer.second)]
    assert len(words) == 1 and 'undefined for 1 of 12 people; of the others: best, fine-tuned is better than' in words[0] and '11 people' in words[0]
    nobody = [row._replace(value=float('nan')) for row in rows]
    assert all('undefined for 12 of 12 people' in answer.words for answer in modes.mode_answers(nobody))
    line, = (line for line in modes.modes_table(rows, ('own', 'T=8')).splitlines() if line.startswith('| thesis, fine-tuned'))
    assert line.split('|')[3].strip() == '-'


def test_configs_that_cannot_be_compared_are_refused(shards, tmp_path):
    toys, config = toy_modes(), ModesConfig(shards=str(shards), out=str(tmp_path/'out'))
    for wrong in (dict(best=toys['best']), toys | dict(best=toys['best'].replace(model=toys['best'].model.replace(image_size=64)))):
        with pytest.raises(ConfigError, match='best'): modes.compare_modes(config, wrong)
    assert not (tmp_path/'out').exists()


# ---- does sound help? ----

def toy_systems(config: SoundValueConfig) -> dict:
    sound = dict(sound_size=8, sound_width=4)
    return {system: each.replace(model=each.model.replace(**TOY, **sound), support=(2,)) for system, each in sound_value.system_configs(config).items()}


@pytest.fixture(scope='module')
def heard(shards, tmp_path_factory):
    config = SoundValueConfig(shards=str(shards), out=str(tmp_path_factory.mktemp('value')), systems=('few_shot', 'va_slim'), seeds=(0, 1), steps=2, shots=2, fine_tune_epochs=1,
                              scorer_steps=2, train_split='', test_splits=())
    said = []
    return config, sound_value.measure_sound_value(config, toy_systems(config), QuickJudge(), said.append), said


def test_every_system_is_played_what_it_can_hear(heard):
    config, result, said = heard
    conditions = list(dict.fromkeys(row.condition for row in result.rows))
    deaf = {('few_shot', way, lips, DEAF) for way in WAYS for lips in LIPS}
    hearing = {('va_slim', way, lips, sound) for way in WAYS for lips in LIPS for sound in SOUNDS}
    assert set(conditions) == deaf | hearing | {(REAL_FRAMES, '', '', '')} == set(result.curves)
    assert len(said) == 1 + 4 + 2 + 8      # scorer, trainings, real frames, people x systems x seeds
    assert len(result.rows) == len({row[:4] for row in result.rows}) == len(sound_value.SOUND_FIGURES) * 2 * (2 * (len(deaf) + len(hearing)) + 1)


def test_sound_and_lips_reach_the_pictures(heard):
    "What differs between two conditions is what was changed: each sound and the lips make other films of the same weights; both seeds differ."
    _, result, _ = heard
    value = {(row.condition, row.identity, row.seed): row.value for row in result.rows if row.metric == 'ssim'}
    for way in WAYS:
        for lips in LIPS:
            films = [value[('va_slim', way, lips, sound), 'syn01', 0] for sound in SOUNDS]
            assert len(set(films)) == 4, films
        assert value[('few_shot', way, LIPS[0], DEAF), 'syn01', 0] != value[('few_shot', way, LIPS[1], DEAF), 'syn01', 0]
    assert value[('va_slim', WAYS[0], LIPS[0], 'right'), 'syn01', 0] != value[('va_slim', WAYS[0], LIPS[0], 'right'), 'syn01', 1]
    assert value[(REAL_FRAMES, '', '', ''), 'syn01', 0] == 1


def test_experiment_goes_on_where_it_was(heard, monkeypatch):
    config, result, said = heard
    for name in ('meta_learn', 'train_scorer', 'fine_tune', 'judge_film'): monkeypatch.setattr(sound_value, name, lambda *a, **k: pytest.fail('was done already'))
    before = len(said)
    part = SoundValueConfig.from_dict(config.to_dict() | dict(seeds=[1]))      # as one of several processes might be started: the same stages
    kept = sound_value.measure_sound_value(part, {'va_slim': toy_systems(config)['va_slim']}, QuickJudge(), said.append)
    assert {row.seed for row in kept.rows if row.condition[0] != REAL_FRAMES} == {1} and len(said) == before
    again = sound_value.measure_sound_value(config, toy_systems(config), QuickJudge(), said.append)
    assert str(again.rows) == str(result.rows) and len(said) == before
    assert {path.name for path in Path(config.out).iterdir()} == {'stages', 'results.json', 'results.csv', 'measured.csv', 'differences.csv', 'results.md', 'strip.png'}


def test_unequal_conditions_are_refused(heard, shards, tmp_path):
    config, _, _ = heard
    systems = toy_systems(config)
    for change in (dict(mouth_drop=0.), dict(steps=3), dict(targets=7)):
        with pytest.raises(ConfigError, match=next(iter(change))): sound_value.measure_sound_value(config, systems | dict(few_shot=systems['few_shot'].replace(**change)))
    with pytest.raises(DataError, match='two are needed'): sound_value.measure_sound_value(SoundValueConfig.from_dict(config.to_dict() | dict(people=1, out=str(tmp_path))))


def played(effect: dict[str, float]) -> list[Measured]:
    "Rows of ten people and two seeds: the mouth's distance under each sound, lips removed, with a system that hears and one that does not."
    random = generator_for(5)
    rows = []
    for person in range(10):
        hard = random.normal(6, 2)
        for seed in (0, 1):
            for system, sound in (*(('va_sync', sound) for sound in SOUNDS), ('few_shot', DEAF)):
                for metric in sound_value.SOUND_FIGURES: rows.append(Measured((system, WAYS[0], LIPS[1], sound), metric, f'p{person}', seed, hard + effect.get(sound, 0) + .05 * random.normal()))
    return rows


@pytest.mark.parametrize('effect, words', [
    (dict(right=-1.), 'listens'), (dict(right=-1., shifted=-1., other=-1.), 'hears that there is sound, but not what it says'),
    (dict(right=1.), 'is disturbed'), ({}, 'nothing is shown'), (dict(shifted=1.), 'nothing is shown')])
def test_answer_follows_the_rule(effect, words):
    answer, against = sound_value.sound_answers(played(effect))
    assert f'va_sync, feed-forward, lips removed: {words}' in answer
    assert ('better' if effect.get('right', 0) < 0 else 'worse' if effect.get('right', 0) > 0 else 'no difference') in against


# ---- options ----

@pytest.mark.parametrize('notebook, kind', [('audio_value', SoundValueConfig), ('compare_modes', ModesConfig)])
def test_run_notebook_and_config_have_the_same_options(notebook, kind):
    declared = declared_parameters(ROOT/f'nbs/runs/{notebook}.ipynb')
    assert declared == {name: value for name, value in kind().to_dict().items() if name != 'device'}


@pytest.mark.parametrize('module', [modes, sound_value])
def test_command_says_what_is_wrong(module, capsys, tmp_path):
    assert module._main(['--shards', str(tmp_path/'nowhere'), '--out', str(tmp_path/'out')]) == 2
    error = capsys.readouterr().err
    assert 'nowhere' in error and error.count('\n') == 1
    with pytest.raises(SystemExit): module._main(['--stepz', '3'])
    assert experiments.config_from_arguments(ModesConfig, ['--shots', '1', '8', '--seconds', '30'], '').shots == (1, 8)
