"""Forgetting people: processes that are killed at any disk operation, other clips byte for byte, many shapes of folders, and preprocessing afterwards."""
import errno, hashlib, json, multiprocessing, os, random, resource, shutil, signal, sys
from pathlib import Path

import numpy as np
import pytest

from helpers import CLIPS
from talking_face.config import PreprocessConfig
from talking_face.core import DataError
from talking_face.data.forgetting import finish_forgetting, forget, forgotten_marks, is_forgotten, readmit
from talking_face.data.shard_writing import ShardWriter, copy_clips, encode_clip, encode_frame, pack_sample
from talking_face.data.shards import open_clip, read_manifest, verify

PICTURE = encode_frame(np.zeros((8, 8, 3), np.uint8))


def sample(identity: str, take: int, part: int, frames: int = 3) -> tuple[dict, bytes]:
    row = dict(key=f'{identity}-{take}-{part:04d}', identity=identity, source=f'{identity}/{take}.mp4', source_sha256='0' * 64, split='train', fps='25/1', size=8,
               frames=frames, seconds=frames / 25, has_audio=False)
    return row, pack_sample(row['key'], encode_clip(row, np.full((frames, 68, 2), take, np.float32), np.ones(frames), [PICTURE] * frames))


def make_folder(folder: Path, people: str = 'abcd', takes: int = 2, clips: int = 2, machines: int = 2, shard_megabytes: float = 0.03) -> Path:
    "Every person's takes are shared out over the machines; every third take is a rejection only."
    jobs = [(person, take) for take in range(takes) for person in people]
    for machine in range(machines):
        part = f'-{machine:03d}-of-{machines:03d}' if machines > 1 else ''
        with ShardWriter(folder, part, shard_megabytes) as writer:
            for number, (person, take) in enumerate(jobs[machine::machines]):
                whole = number % 3 == 2
                for clip in range(0 if whole else clips): writer.add(*sample(person, take, clip))
                writer.reject(dict(file=f'{person}/{take}.mp4', first=None if whole else 3, last=None if whole else 5, frames=0 if whole else 3, reason='no face', detail=''))
                writer.commit(f'{person}/{take}.mp4', sha256='0' * 64, bytes=1, identity=person, split='train', clips=0 if whole else clips, frames=6)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def hashes(folder: Path) -> dict[str, str]:
    "Key to the SHA-256 of the sample's bytes as they lie in the tar: read here, not by the package."
    found = {}
    for path in folder.glob('manifest*.jsonl'):
        for row in map(json.loads, path.read_text().splitlines()):
            with open(folder/row['shard'], 'rb') as tar: tar.seek(row['offset']); found[row['key']] = hashlib.sha256(tar.read(row['length'])).hexdigest()
    return found


# ---- kills ----

class Axe:
    "An audit hook: kills this process in front of disk operation `number` below `folder`."
    def __init__(self, folder: Path, number: int): self.folder, self.left = str(folder), number

    def __call__(self, event: str, arguments: tuple) -> None:
        if event in ('open', 'os.rename', 'os.remove', 'os.truncate', 'os.rmdir', 'shutil.rmtree') and str(arguments[0]).startswith(self.folder):
            if self.left == 0: os.kill(os.getpid(), signal.SIGKILL)
            self.left -= 1


def _run_under_axe(folder: Path, number: int, work) -> None:
    sys.addaudithook(Axe(folder, number))
    work(folder)


def killed_at(folder: Path, number: int, work) -> bool:
    "Do `work(folder)` in a process that dies in front of its disk operation `number`; whether it did."
    process = multiprocessing.get_context('fork').Process(target=_run_under_axe, args=(folder, number, work))
    process.start(); process.join(30)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def forget_a(folder: Path) -> None: forget(folder, identities=['a'])


def test_killed_at_random_moments(tmp_path):
    origin = make_folder(tmp_path/'origin', shard_megabytes=0.02)
    (origin/'.work-000-of-002-x').mkdir(); (origin/'.work-000-of-002-x/a.part').write_bytes(b'frames of a person')
    kept = {key: digest for key, digest in hashes(origin).items() if not key.startswith('a-')}
    forget_a(Path(shutil.copytree(origin, tmp_path/'reference')))
    reference, dice, kills = content(tmp_path/'reference'), random.Random(4), 0
    for trial in range(12):
        folder = Path(shutil.copytree(origin, tmp_path/f'trial{trial}'))
        while killed_at(folder, dice.randrange(90), forget_a):                 # also while it clears up what the last kill left
            kills += 1
            assert verify(read_manifest(folder)) == [] and {key: digest for key, digest in hashes(folder).items() if not key.startswith('a-')} == kept
            if dice.random() < 0.3: finish_forgetting(folder)
        assert content(folder) == reference
        shutil.rmtree(folder)
    assert kills > 10 and not any(name.startswith('.') for name in reference)


def test_killed_and_then_somebody_else_comes(tmp_path):
    "After a kill at any moment, a writer that first finishes what was decided appends as to a healthy folder."
    origin = make_folder(tmp_path/'origin', machines=1, shard_megabytes=0.02)
    for number in range(0, 80, 7):
        folder = Path(shutil.copytree(origin, tmp_path/str(number)))
        died = killed_at(folder, number, forget_a)
        finish_forgetting(folder)
        with ShardWriter(folder, shard_megabytes=0.02) as writer: writer.add(*sample('new', 1, 0)); writer.commit('new/1.mp4', identity='new', clips=1)
        there = read_manifest(folder)
        assert verify(there) == [] and {'b', 'c', 'd', 'new'} <= set(there.identities)
        forget_a(folder)
        left = read_manifest(folder)
        assert verify(left) == [] and left.identities == ['b', 'c', 'd', 'new'] and not (folder/'.forgetting.json').exists()
        if not died: break
    assert not died and number > 20


def test_two_cannot_forget_at_once(tmp_path):
    folder = make_folder(tmp_path/'shards')
    before = content(folder)
    with ShardWriter(folder, '-001-of-002', 0.03):
        with pytest.raises(DataError, match='another process'): forget(folder, identities=['a'])
    assert content(folder) == before
    shutil.copy(folder/'finished-000-of-002.jsonl', tmp_path/'log')
    with ShardWriter(folder, '-001-of-002', 0.03):
        (folder/'.forgetting.json').write_text(json.dumps(dict(format=1, exchange=[], rewrite=[], remove=[])))
        with pytest.raises(DataError, match='another process'): finish_forgetting(folder)
    with pytest.raises(DataError, match='talking-face forget'): ShardWriter(folder, '-001-of-002', 0.03)
    assert finish_forgetting(folder) and not finish_forgetting(folder) and content(folder) == before


@pytest.mark.parametrize('name', ['../outside.tar', '/etc/passwd', '.bashrc', 'config.json', 'a/b.tar'])
def test_a_list_that_was_tampered_with_deletes_nothing(tmp_path, name):
    folder = make_folder(tmp_path/'shards')
    (tmp_path/'outside.tar').write_bytes(b'mine'); (folder/'config.json').write_text('{}')
    (folder/'.forgetting.json').write_text(json.dumps(dict(format=1, exchange=[], rewrite=[], remove=[name])))
    before = content(folder)
    with pytest.raises(DataError, match='foreign files'): forget(folder, identities=['a'])
    assert content(folder) == before and (tmp_path/'outside.tar').read_bytes() == b'mine'


def test_full_disk(tmp_path):
    "No file can grow: nothing changes, and it works when there is room again."
    folder = make_folder(tmp_path/'shards')
    before = hashes(folder)
    def work(folder: Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (15000, 15000))
        try: forget_a(folder)
        except DataError as error: assert os.strerror(errno.EFBIG) in str(error); raise SystemExit(0)
        raise SystemExit(3)
    process = multiprocessing.get_context('fork').Process(target=work, args=(folder,))
    process.start(); process.join(30)
    assert process.exitcode == 0 and hashes(folder) == before and verify(read_manifest(folder)) == []
    forget_a(folder)
    assert 'a' not in read_manifest(folder).identities and not list(folder.glob('.*'))


# ---- shapes of folders ----

@pytest.mark.parametrize('seed', range(10))
def test_any_folder_any_wish(tmp_path, seed):
    "Random folders, random wishes, one after the other: others stay as they are, names vanish, and the folder can be written on."
    dice = random.Random(seed)
    machines = dice.choice([1, 1, 2, 3])
    folder = make_folder(tmp_path/'shards', 'abcdefg'[:dice.randint(2, 7)], dice.randint(1, 4), dice.randint(1, 3), machines, dice.choice([0.008, 0.02, 0.05, 1]))
    gone: set[str] = set()
    for turn in range(4):
        manifest, before = read_manifest(folder), hashes(folder)
        if not len(manifest): break
        wish = dice.choice(['identities', 'keys', 'shards'])
        pool = dict(identities=manifest.identities, keys=manifest.keys, shards=sorted({record.shard for record in manifest}))[wish]
        chosen = dice.sample(pool, dice.randint(1, min(3, len(pool))))
        result = forget(folder, **{wish: chosen})
        column = dict(identities='identity', keys='key', shards='shard')[wish]
        kept = {record.key for record in manifest if getattr(record, column) not in chosen}
        assert hashes(folder) == {key: before[key] for key in kept} and result.clips == len(manifest) - len(kept)
        left = read_manifest(folder)
        assert verify(left) == [] and set(left.keys) == kept and (left.sha256 == manifest.sha256) == (kept == set(manifest.keys))
        assert {path.name for path in folder.glob('*.tar') if path.stat().st_size} == {record.shard for record in left}
        if wish == 'identities': gone |= set(chosen)
        texts = b''.join(path.read_bytes() for path in folder.glob('*.jsonl')).decode()
        assert not any(f'"{identity}"' in texts or f'"{identity}/' in texts for identity in gone)
        assert all(is_forgotten(forgotten_marks(folder), 'any.mp4', identity) for identity in gone)
        part = '' if machines == 1 else f'-{dice.randrange(machines):03d}-of-{machines:03d}'
        with ShardWriter(folder, part, 0.02) as writer: writer.add(*sample(f'new{turn}', 0, 0)); writer.commit(f'new{turn}/0.mp4', identity=f'new{turn}', clips=1)
        assert verify(read_manifest(folder)) == [] and f'new{turn}-0-0000' in read_manifest(folder).keys


def test_a_source_that_keeps_a_clip_keeps_its_receipt(tmp_path):
    folder = make_folder(tmp_path/'shards', machines=1)
    forget(folder, keys=['a-0-0000'])
    with ShardWriter(folder, shard_megabytes=0.03) as writer: assert writer.finished['a/0.mp4']['clips'] == 1
    assert not is_forgotten(forgotten_marks(folder), 'a/0.mp4', 'a')
    assert forget(folder, keys=['a-0-0001']).sources == 1 and is_forgotten(forgotten_marks(folder), 'a/0.mp4', 'a')
    with ShardWriter(folder, shard_megabytes=0.03) as writer: assert 'a/0.mp4' not in writer.finished


def test_copies_and_folders_without_a_log(tmp_path):
    folder = make_folder(tmp_path/'shards', machines=1)
    copied = copy_clips(read_manifest(folder), tmp_path/'copy', 0.03)
    forget(tmp_path/'copy', identities=['b'])
    assert 'b' not in read_manifest(tmp_path/'copy').identities and verify(read_manifest(tmp_path/'copy')) == [] and b'b-0' not in b''.join(content(tmp_path/'copy').values())
    assert 'b' in read_manifest(folder).identities and len(copied) == len(read_manifest(folder))
    bare = Path(shutil.copytree(folder, tmp_path/'bare'))
    for name in ('finished.jsonl', 'rejected.jsonl'): (bare/name).unlink()
    forget(bare, identities=['b'])
    assert verify(read_manifest(bare)) == [] and 'b' not in read_manifest(bare).identities and not (bare/'finished.jsonl').exists()


def test_damage_of_others_is_carried_along_and_a_cut_tar_is_said(tmp_path):
    folder = make_folder(tmp_path/'shards', 'ab', machines=1, shard_megabytes=1)
    record = read_manifest(folder)['b-0-0000']
    with open(folder/record.shard, 'r+b') as tar: tar.seek(record.offset + 3000); tar.write(b'?')
    damaged = hashes(folder)
    forget(folder, identities=['a'])
    assert hashes(folder) == {key: digest for key, digest in damaged.items() if key.startswith('b')} and len(verify(read_manifest(folder))) == 1
    whole = make_folder(tmp_path/'cut', 'ab', machines=1, shard_megabytes=1)
    for log in ('finished', 'rejected'): (whole/f'{log}.jsonl').unlink()                # with a log the writer would refuse the folder before
    last = max(read_manifest(whole), key=lambda record: record.offset)
    with open(whole/last.shard, 'r+b') as tar: tar.truncate(last.offset + 100)
    before = content(whole)
    with pytest.raises(DataError, match='ends too early'): forget(whole, keys=[record.key for record in read_manifest(whole) if record.key != last.key][:1])
    assert {name: data for name, data in content(whole).items() if not name.startswith('.forget-')} == before


def test_unknown_names_change_nothing(tmp_path):
    folder = make_folder(tmp_path/'shards')
    before = content(folder)
    for wish in (dict(identities=['nobody']), dict(identities=['a', 'nobody']), dict(keys=['a-9-0000']), dict(shards=['clips-00000.tar']), {}):
        with pytest.raises(DataError): forget(folder, **wish)
    assert content(folder) == before
    with pytest.raises(DataError, match='manifest'): forget(tmp_path, identities=['a'])
    with pytest.raises(DataError, match='not forgotten'): readmit(folder, identities=['a'])


# ---- preprocessing afterwards ----

def test_preprocessing_does_not_bring_anybody_back(tmp_path):
    from talking_face.data.preprocessing import preprocess
    from talking_face.data.sources import landmarks_beside
    names = sorted(path.name for path in CLIPS.iterdir())[:3]
    for name in names:
        (tmp_path/'videos'/name).mkdir(parents=True)
        for suffix in ('mp4', 'npz'): shutil.copy(CLIPS/name/f'{name}_c0.{suffix}', tmp_path/'videos'/name)
    def again(): return preprocess([tmp_path/'videos'], tmp_path/'shards', PreprocessConfig(size=32), landmarks=landmarks_beside)
    again()
    before = hashes(tmp_path/'shards')
    forget(tmp_path/'shards', identities=names[:1])
    for _ in range(2):
        assert again().processed == 0
        assert read_manifest(tmp_path/'shards').identities == names[1:] and names[0].encode() not in b''.join(content(tmp_path/'shards').values())
    assert readmit(tmp_path/'shards', identities=names[:1]) == 2 and again().processed == 1
    assert hashes(tmp_path/'shards') == before and verify(read_manifest(tmp_path/'shards')) == [] and open_clip(read_manifest(tmp_path/'shards').records[0]).info['identity'] == names[0]
