"""Shards, preprocessing and episodes under faults: kills, torn and damaged files, other machines, real clips."""
import json, os, random, shutil, signal, subprocess, sys, tarfile, time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from talking_face.config import ModelConfig, PreprocessConfig
from talking_face.core import ConfigError, DataError, MediaError, tensor_to_frames
from talking_face.data.episodes import EpisodeSampler, read_clip
from talking_face.data.preprocessing import preprocess
from talking_face.data.shard_writing import copy_clips
from talking_face.data.shards import iterate_shards, open_clip, read_manifest, verify
from talking_face.data.sources import find_sources, landmarks_beside

ROOT = Path(__file__).parent.parent
CORPUS = ROOT/'data/embedded'
REAL = ROOT/'../shared/data/clips'
CONFIG = PreprocessConfig(size=64, shard_megabytes=0.3)


def content(folder): return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}

def known_points(path):
    "The points beside the clip, slowly: leaves time to be killed. At module level, because worker processes import it."
    time.sleep(0.15)
    return landmarks_beside(path)


@pytest.fixture(scope='module')
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp('videos')
    for name in ('syn01/syn01_c0', 'syn02/syn02_c0', 'syn02/syn02_c1', 'syn03/syn03_c0', 'syn09/syn09_c0', 'syn11/syn11_c1'):
        (folder/name).parent.mkdir(exist_ok=True)
        for suffix in ('.mp4', '.npz'): shutil.copy((CORPUS/'clips'/name).with_suffix(suffix), (folder/name).with_suffix(suffix))
    (folder/'syn03/empty.mp4').touch()
    return folder

@pytest.fixture(scope='module')
def shards(videos, tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole')/'shards'
    report = preprocess([videos], folder, CONFIG, landmarks=known_points)
    assert report.clips == 6 and report.frames == 450 and report.rejected_files == {'cannot be decoded': 1}
    return folder


CHILD = '''
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_data import CONFIG, known_points
from talking_face.data.preprocessing import preprocess
if __name__ == '__main__': preprocess([Path({videos!r})], {out!r}, CONFIG.replace(jobs={jobs}), landmarks=known_points)
'''

@pytest.mark.parametrize('jobs', [1, 2])
def test_killed_runs_end_as_one_whole_run(videos, shards, tmp_path, jobs):
    out, script, kills = tmp_path/'out', tmp_path/'child.py', 0
    script.write_text(CHILD.format(tests=str(ROOT/'tests'), videos=str(videos), out=str(out), jobs=jobs))
    generator = random.Random(jobs)
    for _ in range(3):
        before = len((out/'finished.jsonl').read_bytes().splitlines()) if (out/'finished.jsonl').exists() else 0
        child = subprocess.Popen([sys.executable, str(script)], start_new_session=True)
        deadline = time.monotonic() + 60
        while child.poll() is None and time.monotonic() < deadline:       # at least one more video finished, then a random moment
            if (out/'finished.jsonl').exists() and len((out/'finished.jsonl').read_bytes().splitlines()) > before: break
            time.sleep(0.005)
        time.sleep(generator.random() * 0.25)
        if child.poll() is None:
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        child.wait()
    assert kills >= 1
    deadline = time.monotonic() + 20                                       # workers end with their parent
    while workers_of(out) and time.monotonic() < deadline: time.sleep(0.05)
    assert not workers_of(out)
    report = preprocess([videos], out, CONFIG, landmarks=known_points)
    assert report.clips == 6 and content(out) == content(shards)
    assert not verify(read_manifest(out))

def workers_of(out):
    "Processes that still have the run's folder open."
    if not Path('/proc/self/fd').exists(): return []
    found = []
    for process in Path('/proc').glob('[0-9]*'):
        if process.name == str(os.getpid()): continue
        try: found += [process.name for file in (process/'fd').iterdir() if str(out) in os.readlink(file)]
        except OSError: pass
    return found

def test_interrupt_signal_stops_workers_cleanly(videos, tmp_path):
    out, script = tmp_path/'out', tmp_path/'child.py'
    script.write_text(CHILD.format(tests=str(ROOT/'tests'), videos=str(videos), out=str(out), jobs=2))
    child = subprocess.Popen([sys.executable, str(script)], start_new_session=True, stderr=subprocess.PIPE, text=True,
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))       # even where the tests themselves ignore it
    while child.poll() is None and not (out/'finished.jsonl').exists(): time.sleep(0.02)
    time.sleep(0.3)
    os.killpg(child.pid, signal.SIGINT)                                    # what a terminal does on Ctrl-C: the whole group
    errors = child.communicate(timeout=30)[1]
    assert 'KeyboardInterrupt' in errors and not list(out.glob('.work*'))
    for line in (out/'manifest.jsonl').read_text().splitlines(): json.loads(line)


def test_a_removed_or_cut_shard_is_said_when_appending(videos, shards, tmp_path):
    for damage in ('unlink', 'truncate'):
        copy = Path(shutil.copytree(shards, tmp_path/damage))
        last = max(copy.glob('*.tar'))
        last.unlink() if damage == 'unlink' else os.truncate(last, 1000)
        with pytest.raises(DataError, match='damaged'): preprocess([videos], copy, CONFIG, landmarks=known_points)

def test_a_changed_video_is_not_silently_kept(videos, shards, tmp_path):
    inputs, copy = Path(shutil.copytree(videos, tmp_path/'in')), shutil.copytree(shards, tmp_path/'out')
    shutil.copy(inputs/'syn02/syn02_c0.mp4', inputs/'syn01/syn01_c0.mp4')
    with pytest.raises(DataError, match='bytes was'): preprocess([inputs], copy, CONFIG, landmarks=known_points)

def test_full_disk_is_one_sentence(videos, tmp_path, monkeypatch):
    import talking_face.data.shard_writing as module
    def full(file): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(module, '_sync', full)
    with pytest.raises(DataError, match='No space left'): preprocess([videos], tmp_path/'out', CONFIG, landmarks=known_points)
    monkeypatch.undo()
    assert preprocess([videos], tmp_path/'out', CONFIG, landmarks=known_points).clips == 6


@pytest.mark.parametrize('edit, words', [
    (lambda row: row.pop('offset'), 'exactly'), (lambda row: row.update(shard='../clips-00000.tar'), 'clips-00000'), (lambda row: row.update(fps='25/0'), 'fps'),
    (lambda row: row.update(frames='75'), 'frames'), (lambda row: row.update(key='a.b'), 'a.b'), (lambda row: row.update(extra=1), 'exactly')])
def test_bad_manifest_rows_name_the_line(shards, tmp_path, edit, words):
    copy = Path(shutil.copytree(shards, tmp_path/'copy'))
    rows = [json.loads(line) for line in (copy/'manifest.jsonl').read_text().splitlines()]
    edit(rows[2])
    (copy/'manifest.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    with pytest.raises(DataError, match='line 3') as caught: read_manifest(copy)
    assert words in str(caught.value)

def test_torn_last_line_is_ignored_and_a_damaged_one_is_not(shards, tmp_path):
    copy = Path(shutil.copytree(shards, tmp_path/'copy'))
    whole = (copy/'manifest.jsonl').read_bytes()
    (copy/'manifest.jsonl').write_bytes(whole + b'{"key": "x')
    assert len(read_manifest(copy)) == 6
    (copy/'manifest.jsonl').write_bytes(b'{"key\n' + whole)
    with pytest.raises(DataError, match='line 1'): read_manifest(copy)
    shutil.copy(copy/'manifest.jsonl', copy/'manifest-001-of-002.jsonl')
    (copy/'manifest.jsonl').write_bytes(whole); (copy/'manifest-001-of-002.jsonl').write_bytes(whole)
    with pytest.raises(DataError, match='twice'): read_manifest(copy)
    with pytest.raises(DataError, match='no manifest.jsonl'): read_manifest(tmp_path/'nothing')

def test_random_damage_never_escapes_as_another_error(shards, tmp_path):
    "Flip bytes of a shard anywhere: reading either works or raises DataError, and verify() sees every change inside a sample."
    manifest = read_manifest(shards)
    record = manifest.records[0]
    original = (shards/record.shard).read_bytes()
    folder = Path(shutil.copytree(shards, tmp_path/'copy'))
    generator, refused = np.random.default_rng(0), 0
    places = np.concatenate([record.offset + generator.integers(0, 6000, 60), record.offset + generator.integers(0, record.length, 60)])
    for place in places:
        damaged = bytearray(original)
        damaged[place] ^= int(generator.integers(1, 256))
        (folder/record.shard).write_bytes(damaged)
        here = read_manifest(folder).select(keys=[record.key])
        assert len(verify(here)) == 1
        try:
            clip = open_clip(here.records[0])
            clip.frames([0, len(clip) - 1]); clip.audio(); clip.positions
        except DataError as error:
            refused += 1
            assert record.key in str(error)
    assert refused > 10

def test_truncated_tar_names_itself_when_streamed(shards, tmp_path):
    copy = Path(shutil.copytree(shards, tmp_path/'copy'))
    first = min(copy.glob('*.tar'))
    os.truncate(first, first.stat().st_size // 2 + 100)
    with pytest.raises(DataError, match=first.name): list(iterate_shards(copy))
    with pytest.raises(DataError, match='copy'): copy_clips(read_manifest(copy), tmp_path/'other')

def test_streaming_through_loader_workers(shards):
    from torch.utils.data import DataLoader
    keys = sorted(clip.key for clip in DataLoader(iterate_shards(shards), batch_size=None, num_workers=2))
    assert keys == read_manifest(shards).keys

def test_shards_are_ordinary_tars(shards):
    with tarfile.open(min(shards.glob('*.tar'))) as tar: names = tar.getnames()
    record = next(record for record in read_manifest(shards) if record.shard == min(shards.glob('*.tar')).name and record.offset == 0)
    assert names[:4] == [f'{record.key}.{suffix}' for suffix in ('json', 'landmarks.npy', 'scores.npy', 'flac')] and names[4] == f'{record.key}.0000.jpg'


def test_long_videos_are_cut_and_nothing_is_lost(videos, tmp_path):
    points = np.load(videos/'syn01/syn01_c0.npz')['landmarks']
    source = tmp_path/'in'/'ada'/'film.mp4'
    source.parent.mkdir(parents=True)
    shutil.copy(videos/'syn01/syn01_c0.mp4', source)
    points[40:62] = np.nan                                                  # the middle of the second and third part
    np.savez(source.with_suffix('.npz'), landmarks=points)
    report = preprocess([source], tmp_path/'out', CONFIG.replace(maximum_seconds=1.0, minimum_frames=15), landmarks=landmarks_beside)
    manifest = read_manifest(tmp_path/'out')
    rejected = [json.loads(line) for line in (tmp_path/'out/rejected.jsonl').read_text().splitlines()]
    assert report.frames + sum(row['frames'] for row in rejected) == 75     # every frame is stored or listed
    assert [(record.frames, record.seconds) for record in manifest] == [(25, 1.0), (15, 1.0)]
    assert report.rejected_frames == {'no face': 22, 'too few usable frames': 13}
    first, second = map(open_clip, manifest)
    assert first.info['first_frame'] == 0 and second.info['first_frame'] == 25 and (second.positions == range(15)).all()
    assert len(first.audio()) == len(second.audio()) == 16_000
    whole = tmp_path/'whole'
    preprocess([videos/'syn01/syn01_c0.mp4'], whole, CONFIG, landmarks=landmarks_beside)
    sound = open_clip(read_manifest(whole).records[0]).audio()
    assert np.array_equal(np.concatenate([first.audio(), second.audio()]), sound[:32_000])

def test_inputs_that_make_no_sense(videos, tmp_path):
    with pytest.raises(MediaError): preprocess([tmp_path], tmp_path/'out', CONFIG)
    with pytest.raises(MediaError): preprocess([tmp_path/'absent.mp4'], tmp_path/'out', CONFIG)
    with pytest.raises(DataError, match='same name'): find_sources([videos/'syn01/syn01_c0.mp4', shutil.copy(videos/'syn02/syn02_c0.mp4', tmp_path/'syn01_c0.mp4')])
    table = tmp_path/'people.csv'
    table.write_text('file,identity\nnowhere.mp4,ada\n')
    with pytest.raises(DataError, match='names none'): find_sources([videos], str(table))
    table.write_bytes('file,identity\nZoë.mp4,ada\n'.encode('latin-1'))
    with pytest.raises(DataError, match='UTF-8'): find_sources([videos], str(table))
    table.write_text('file,identity,split\nsyn01/syn01_c0.mp4,ada,test\n')
    sources = {source.name: source for source in find_sources([videos], str(table))}
    assert sources['syn01/syn01_c0.mp4'].label == ('ada', 'test') and 'table' in sources['syn02/syn02_c0.mp4'].fault

def test_two_machines_make_the_clips_of_one(videos, shards, tmp_path):
    for shard in (1, 0): preprocess([videos], tmp_path/'out', CONFIG.replace(shard=shard, of=2), landmarks=known_points)
    assert read_manifest(tmp_path/'out').sha256 == read_manifest(shards).sha256
    with pytest.raises(ConfigError, match='of was 2'): preprocess([videos], tmp_path/'out', CONFIG, landmarks=known_points)


def test_episodes_of_very_short_clips(videos, tmp_path):
    source = tmp_path/'in/ada/blink.mp4'
    source.parent.mkdir(parents=True)
    shutil.copy(videos/'syn01/syn01_c0.mp4', source)
    points = np.load(videos/'syn01/syn01_c0.npz')['landmarks']
    points[3:] = np.nan
    np.savez(source.with_suffix('.npz'), landmarks=points)
    preprocess([tmp_path/'in'], tmp_path/'out', CONFIG.replace(minimum_frames=2), landmarks=landmarks_beside)
    sampler = EpisodeSampler(tmp_path/'out', ModelConfig(image_size=32), 2, 2, (4,), augment=0.0)
    images, _ = read_clip(read_manifest(tmp_path/'out').records[0], ModelConfig(image_size=32))
    for step in range(20):
        batch = sampler.batch(step)                                         # two clips asked for, one there: it is drawn twice
        number = lambda image: int(np.abs(images.astype(int) - image).sum((1, 2, 3)).argmin())
        support, targets = ([number(image) for image in tensor_to_frames(part)] for part in (batch.support_images, batch.target_images))
        for episode in range(2): assert not set(support[4 * episode:4 * episode + 4]) & set(targets[2 * episode:2 * episode + 2])

def test_sampler_names_what_is_missing(shards, tmp_path):
    with pytest.raises(DataError, match='no key'): EpisodeSampler(shards, ModelConfig(), 1, 1, (1,), keys=['nobody'])
    with pytest.raises(DataError, match='manifest'): EpisodeSampler(tmp_path, ModelConfig(), 1, 1, (1,))


@pytest.mark.skipif(not REAL.exists(), reason='the real clips are not here')
def test_real_clips_keep_their_books(tmp_path):
    "A profile view, found by dlib: frames are lost, and every frame is stored or listed."
    inputs = tmp_path/'in'
    (inputs/'id19').mkdir(parents=True)
    shutil.copy(REAL/'id19/pc_00002.mp4', inputs/'id19')
    report = preprocess([inputs], tmp_path/'out', PreprocessConfig(size=128, detector='dlib'))
    receipts = [json.loads(line) for line in (tmp_path/'out/finished.jsonl').read_text().splitlines()]
    assert report.clips == 1 and report.frames + sum(report.rejected_frames.values()) == sum(receipt['frames'] for receipt in receipts)
    assert report.rejected_frames['no face'] >= 10
    for record in read_manifest(tmp_path/'out'):
        clip = open_clip(record)
        inner = clip.landmarks[:, 17:]
        assert record.fps == Fraction(25) and inner.min() >= -0.5 and inner.max() <= 127.5 and (clip.scores > 0).all()

def test_a_face_that_is_not_there_is_a_rejection_and_a_bad_word_an_error(videos, tmp_path):
    config = PreprocessConfig(size=64, detector='dlib', face='3')
    report = preprocess([videos/'syn01/syn01_c0.mp4'], tmp_path/'out', config)
    assert report.clips == 0 and report.rejected_files == {'the chosen face is not there': 1}
    with pytest.raises(ConfigError, match='face'): preprocess([videos], tmp_path/'other', config.replace(face='left'))


@pytest.mark.filterwarnings('ignore:This DataLoader will create:UserWarning')      # four workers on two cores, on purpose
def test_batches_are_the_same_for_any_number_of_workers(shards):
    "Processes share the steps among them; a damaged clip is one sentence from any of them."
    import torch
    from talking_face.data.episodes import stream_batches
    sampler = EpisodeSampler(shards, ModelConfig(image_size=32), 2, 2, (1, 4), cache_bytes=500_000)
    alone = list(stream_batches(sampler, 3, 12))
    for workers in (1, 4):
        for one, other in zip(alone, stream_batches(sampler, 3, 12, workers), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one[:5], other[:5])) and one[5:] == other[5:]

def test_a_damaged_clip_is_one_sentence_from_a_worker(shards, tmp_path):
    from talking_face.data.episodes import stream_batches
    copy = Path(shutil.copytree(shards, tmp_path/'copy'))
    sampler = EpisodeSampler(copy, ModelConfig(image_size=32), 6, 2, (1,))
    for tar in copy.glob('*.tar'): os.truncate(tar, 2000)
    for workers in (0, 1):
        with pytest.raises(DataError) as caught: list(stream_batches(sampler, 0, 4, workers))
        assert '.tar' in str(caught.value) and len(str(caught.value).splitlines()) == 1

def test_the_loader_needs_no_more_memory_the_longer_it_runs(shards):
    "Room for a tenth of the frames: 160 batches later (2,500 frames, of which 40 fit) nothing more is held."
    def resident() -> int: return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')
    if not Path('/proc/self/statm').exists(): pytest.skip('this system does not tell')
    sampler = EpisodeSampler(shards, ModelConfig(image_size=32), 2, 2, (4,), cache_bytes=500_000)
    for step in range(40): sampler.batch(step)
    before = resident()
    for step in range(40, 200): sampler.batch(step)
    assert sampler._stored.cache.used <= 500_000 and resident() - before < 8_000_000
