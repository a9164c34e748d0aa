"""Two processes train what one trains: the tiny GAN on gloo, started by torchrun as users start it; one is killed, and the training is continued by the other number."""
import os, shutil, signal, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from helpers import wait_for
from talking_face.config import MetaLearningConfig, preset
from talking_face.core import ConfigError, DataError, TalkingFaceError, write_json
from talking_face.few_shot.meta_learning import meta_learn, meta_learn_with
from talking_face.networks.distributed import Distributed, Place, meeting_trouble, torchrun
from talking_face.networks.training import checkpoints
from talking_face.runs import RunFolder

SHAPES = dict(image_size=32, generator_downs=2, generator_residuals=1, embedding_size=16, embedder_width=4, generator_width=4, generator_last=4, discriminator_width=4,
              sound_size=8, sound_width=4, spectral_norm=True)
PATIENCE_S = 120     # a start takes seconds on an idle machine


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def everything(**changes: object) -> MetaLearningConfig:
    """Every loss, table and mode in which processes could disagree, in two parts.

    Where real and generated pictures cancel, a gradient of D is 0 in truth and 1e-9 by rounding, and Adam makes a whole step of it: hence powers of two
    and small steps. `test_two_processes_train_what_one_trains` looks at the rest of the weights more closely."""
    config = preset('tiny', 'va_sync')
    losses = config.losses.replace(adversarial=.5, feature_matching=5., match=1., sound_match=1., gradient_penalty=1.)
    options = dict(precision='fp32', learning_rate=3e-5, discriminator_learning_rate=1e-5, schedule='constant', warmup_steps=0, steps=4, clips=4, targets=8, support=(2,),
                   accumulate=2, sync_start=0., gradient_penalty_every=2, threads=1, log_every=1,
                   sample_every=0, checkpoint_every=1, keep_checkpoints=99, device='cpu')
    return config.replace(model=config.model.replace(**SHAPES), losses=losses, **options | changes)


def weights(run: RunFolder | Path, step: int) -> dict[str, np.ndarray]:
    return load_file(Path(getattr(run, 'path', run))/f'checkpoints/step-{step:06d}.safetensors')


def assert_close(mine: dict, theirs: dict, tolerance: float) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items(): assert np.abs(mine[name].astype(np.float64) - value).max() <= tolerance, name


@pytest.fixture(scope='module')
def meeting() -> None:
    if trouble := meeting_trouble(): pytest.skip(f'two processes cannot meet on this machine: {trouble}')


@pytest.fixture(scope='module')
def alone(workshop, tmp_path_factory) -> RunFolder:
    torch.set_num_threads(1)
    return meta_learn(everything(), workshop.shards, tmp_path_factory.mktemp('alone')/'run', callback=lambda *_: None)


def test_two_processes_train_what_one_trains(meeting, workshop, alone, tmp_path):
    seen = []
    run = meta_learn_with(2, everything(), workshop.shards, tmp_path/'run', callback=lambda done, total, text: seen.append(done))
    assert run.events('start')[0]['processes'] == 2 and (run.path/'DONE').exists() and seen[-1] == 4
    for step in (1, 4): assert_close(weights(run, step), weights(alone, step), 1e-5)
    both, before = [weights(one, 4) for one in (run, alone)], weights(run, 1)
    steps = {name: np.abs(both[0][name].astype(np.float64) - before[name]) for name in before if not name.startswith('average.')}
    apart = {name: np.abs(both[0][name].astype(np.float64) - both[1][name]) for name in steps}
    assert np.median(np.concatenate([value[value > 0].ravel() for value in steps.values()])) > 1e-5     # they went somewhere ...
    assert np.mean(np.concatenate([value.ravel() for value in apart.values()]) > 1e-7) < .02            # ... together
    moved = {name for name, value in weights(run, 4).items() if not np.array_equal(value, weights(run, 1)[name])}
    for part in ('embedder.', 'sound_embedder.', 'generator.', 'discriminator.trunk', 'discriminator.table.rows', 'sound_table.rows', 'scorer.', 'average.generator.'):
        assert any(name.startswith(part) for name in moved), part
    rows, expected = run.events('step'), alone.events('step')
    assert [row['step'] for row in rows] == [1, 2, 3, 4]     # logged once
    for row, other in zip(rows, expected):
        assert row.keys() == other.keys() and row['video_rows'] == other['video_rows']
        for name in row.keys() - {'event', 'time'}:
            if name != 'adversarial_gradient': assert abs(row[name] - other[name]) <= 1e-3 * abs(other[name]) + 1e-5, name     # that one is of a process's first part
    names = {path.name for path in (run.path/'checkpoints').iterdir()}
    assert names == {path.name for path in (alone.path/'checkpoints').iterdir()} and not list(run.path.rglob('.*'))     # saved once, nothing left over


def children(process: int) -> dict[int, int]:
    "The processes that torchrun `process` has started: pid by rank."
    found = {}
    for pid in map(int, Path(f'/proc/{process}/task/{process}/children').read_text().split()):
        variables = dict(line.partition('=')[::2] for line in Path(f'/proc/{pid}/environ').read_text().split('\0'))
        if 'RANK' in variables: found[int(variables['RANK'])] = pid
    return found


@pytest.mark.skipif(not Path(f'/proc/self/task/{os.getpid()}/children').exists(), reason='finds its processes in /proc')
def test_one_process_killed_ends_both_and_one_alone_continues(meeting, workshop, tmp_path):
    config, run = everything(steps=10), tmp_path/'run'
    job = write_json(tmp_path/'job.json', dict(config=config.to_dict(), shards=str(workshop.shards), out=str(run), keys=None, resume=False))
    command, environment = torchrun(['-m', 'talking_face.few_shot.meta_learning', str(job)], 2)
    with open(tmp_path/'said', 'w') as said: training = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
    try:
        wait_for(lambda: len(checkpoints(run)) >= 2, lambda: training.poll() is None, PATIENCE_S)
        os.kill(children(training.pid)[1], signal.SIGKILL)
        assert training.wait(PATIENCE_S) != 0
    finally: training.kill()
    newest = len(checkpoints(run))
    assert 2 <= newest < 10 and not (run/'DONE').exists()
    resumed = meta_learn(config, workshop.shards, run, resume=True, callback=lambda *_: None)
    assert resumed.events('start')[-1]['step'] == newest and resumed.events('start')[-1]['processes'] == 1 and (run/'DONE').exists()
    reference = meta_learn(config, workshop.shards, tmp_path/'alone', callback=lambda *_: None)
    assert_close(weights(resumed, newest), weights(reference, newest), 1e-5 * max(newest / 4, 1) ** 2)     # Adam's steps part slowly
    assert_close(weights(resumed, 10), weights(reference, 10), 1e-3)


def test_more_processes_than_episodes_are_refused():
    with pytest.raises(ConfigError, match='clips = 2'): Place(0, 3).slots(2)


# ---- what the processes say to each other, without starting any ----

def test_an_error_of_the_first_process_is_said_once(monkeypatch):
    "Process 0 raises it; the others leave with code 2 and no word."
    box = {}
    monkeypatch.setattr('torch.distributed.broadcast_object_list', lambda values: box.setdefault('sent', list(values)) if rank == 0 else values.__setitem__(slice(None), box['sent']))
    def refuse(): raise DataError('no shards')
    rank = 0
    with pytest.raises(DataError, match='no shards'): Distributed(0, 2).on_first(refuse)
    rank = 1
    with pytest.raises(SystemExit) as stop: Distributed(1, 2).on_first(refuse)
    assert stop.value.code == 2


class Store(dict):
    def set(self, key, value): self[key] = value.encode()
    def get(self, key): return dict.__getitem__(self, key)
    def check(self, keys): return set(keys) <= self.keys()
    def wait(self, keys, patience):
        if not self.check(keys): raise TimeoutError


def test_the_reason_travels_to_the_first_process():
    store = Store()
    with pytest.raises(DataError), Distributed(1, 2, store=store): raise DataError('shard 7 is gone')
    with pytest.raises(TalkingFaceError, match='process 1 of 2: shard 7 is gone'), Distributed(0, 2, store=store): raise RuntimeError('gloo: Connection closed by peer')
    with pytest.raises(TalkingFaceError, match='lost contact'), Distributed(0, 2, store=Store()): raise RuntimeError('gloo: Connection closed by peer')
    with pytest.raises(RuntimeError, match='matrix'), Distributed(0, 2, store=Store()): raise RuntimeError('a matrix does not fit')     # an error of ours stays what it is


def test_who_leaves_last_is_not_lost_but_who_fails_last_is_heard(monkeypatch):
    "A process that is through closes its connections; the wait for it then ends like the wait for one that failed."
    ended = []
    def refuse(): raise RuntimeError('gloo: Connection closed by peer')
    monkeypatch.setattr('torch.distributed.barrier', refuse)
    monkeypatch.setattr('torch.distributed.destroy_process_group', lambda: ended.append(True))
    monkeypatch.setattr('torch.distributed.distributed_c10d._get_default_group', lambda: None)
    with Distributed(0, 2, store=Store({'through 1': b''})): pass
    assert ended == [True]
    with pytest.raises(TalkingFaceError, match='process 1 of 2: the disk is full'), Distributed(0, 2, store=Store(failed=b'process 1 of 2: the disk is full')): pass
    with pytest.raises(SystemExit), Distributed(1, 2, store=Store()): pass


NOWHERE = ['unshare', '--net', '--uts', 'sh', '-c', 'hostname nowhere && ip link set lo up && exec "$@"', 'sh']     # runs a command on such a machine


def can_be_nowhere() -> bool:
    meeting = "import socket; server = socket.create_server(('127.0.0.1', 0)); socket.create_connection(server.getsockname(), 5); socket.if_nameindex()"
    try: return bool(shutil.which('unshare')) and subprocess.run([*NOWHERE, sys.executable, '-c', meeting], capture_output=True, timeout=20).returncode == 0
    except subprocess.TimeoutExpired: return False


@pytest.mark.skipif(not can_be_nowhere(), reason='makes a machine whose name leads nowhere with unshare, hostname and ip, which needs their permission')
def test_processes_find_each_other_where_the_name_of_the_machine_leads_nowhere(meeting, tmp_path):
    program = tmp_path/'count.py'
    program.write_text('import sys, torch\nfrom pathlib import Path\nfrom talking_face.networks.distributed import Distributed\n'
                       "with Distributed.from_env('cpu', 60) as d: Path(sys.argv[1], str(d.rank)).write_text(str(int(d.average(torch.tensor([d.rank + 1]), 1))))\n")
    command, environment = torchrun([str(program), str(tmp_path)], 2)
    found = subprocess.run([*NOWHERE, *command], env=environment, text=True, capture_output=True, timeout=PATIENCE_S)
    assert found.returncode == 0 and (tmp_path/'0').read_text() == (tmp_path/'1').read_text() == '3', found.stderr


def test_a_machine_where_processes_cannot_meet_is_told_from_a_fault_of_ours(monkeypatch):
    monkeypatch.setenv('GLOO_SOCKET_IFNAME', 'nothing0')
    assert 'nothing0' in meeting_trouble()
