"""Preprocessing that survives: 1,000 clips killed 20 times, every fault by itself and all of them together, long films, full and read-only disks."""
import contextlib, hashlib, itertools, json, os, random, shutil, signal, subprocess, sys, tempfile, time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from helpers import Job, clip, frames_of, limit_file_size, make_film, speech
from talking_face.config import PreprocessConfig
from talking_face.core import DataError
from talking_face.data.clip_making import ClipMaker, process_source
from talking_face.data.preprocessing import preprocess
from talking_face.data.shards import open_clip, read_manifest, verify
from talking_face.data.sources import FaceBox, Label, Source, find_sources, machine_of, write_sources

ROOT = Path(__file__).parent.parent
FILMS, KILLS = (1000, 20) if os.environ.get('TALKING_FACE_WHOLE') else (150, 6)      # the whole measure takes a minute

def content(folder): return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}

def rows(folder, name): return [json.loads(line) for path in sorted(Path(folder).glob(f'{name}*.jsonl')) for line in path.read_text().splitlines()]


# ---- killed, again and again ----

TINY = PreprocessConfig(size=32, minimum_face=8, minimum_frames=4, shard_megabytes=0.5, jobs=2)
FACE = np.random.default_rng(0).uniform((8, 6), (26, 28), (68, 2)).astype(np.float32)

def constant_points(path: Path) -> np.ndarray:
    "The same points in every frame of a tiny film; at module level, because worker processes import it."
    return np.tile(FACE, (10, 1, 1))

def tiny_film(path: Path, number: int) -> None:
    "Ten frames of a slowly brightening pattern; every seventh film has a cut in the middle. Only one has sound: each worker would load libraries for it."
    random = np.random.default_rng(number)
    rooms = random.integers(0, 200, (2, 4, 4, 3))
    frames = [np.kron(rooms[int(number % 7 == 0 and place >= 5)] + 2 * place, np.ones((8, 8, 1))).astype(np.uint8) for place in range(10)]
    with av.open(str(path), 'w') as container:
        video, audio = container.add_stream('mpeg4', rate=25), container.add_stream('pcm_s16le', rate=16000, layout='mono') if number == 3 else None
        video.width = video.height = 32
        for place, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, 'rgb24')
            frame.pts, frame.time_base = place, Fraction(1, 25)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None:
            block = av.AudioFrame.from_ndarray(random.integers(-9999, 9999, (1, 6400)).astype(np.int16), 's16', 'mono')
            block.sample_rate, block.pts, block.time_base = 16000, 0, Fraction(1, 16000)
            container.mux(audio.encode(block)); container.mux(audio.encode(None))

@pytest.fixture(scope='module')
def films(tmp_path_factory) -> Path:
    "Many tiny films of fifty people; every 25th is broken, every 40th a copy of the first."
    folder = tmp_path_factory.mktemp('films')
    for number in range(FILMS):
        path = folder/f'person{number % 50:02d}'/f'{number:04d}.mov'
        path.parent.mkdir(exist_ok=True)
        if number and number % 40 == 0: shutil.copy(folder/'person00/0000.mov', path)
        else: tiny_film(path, number)
        if number % 25 == 24: os.truncate(path, path.stat().st_size // 2)
    return folder

@pytest.fixture(scope='module')
def undisturbed(films, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('undisturbed')/'shards'
    report = preprocess([films], out, TINY, landmarks=constant_points)
    broken, copies = FILMS // 25, len([number for number in range(40, FILMS, 40) if number % 25 != 24])
    cuts = len([number for number in range(FILMS) if number % 7 == 0 and number % 25 != 24 and (number % 40 or not number)])
    assert report.rejected_files == {'cannot be decoded': broken, 'duplicate': copies} and report.clips == FILMS - broken - copies + cuts
    return out

CHILD = '''
import sys
sys.path.insert(0, {tests!r})
from test_preprocess_survival import TINY, constant_points
from talking_face.data.clip_making import ClipMaker, process_source
from talking_face.data.preprocessing import preprocess
if __name__ == '__main__': preprocess([{films!r}], {out!r}, TINY, landmarks=constant_points)
'''

def test_killed_at_random_moments_ends_as_if_nothing_had_been(films, undisturbed, tmp_path):
    "kill -9 of the whole process group: some at any moment of the start, the others spread over the whole work, each up to 30 ms after a receipt."
    out, script, generator, killed = tmp_path/'shards', tmp_path/'child.py', random.Random(7), []
    script.write_text(CHILD.format(tests=str(ROOT/'tests'), films=str(films), out=str(out)))
    def receipts() -> int: return (out/'finished.jsonl').read_bytes().count(b'\n') if (out/'finished.jsonl').exists() else 0
    for number in range(KILLS):
        child = subprocess.Popen([sys.executable, str(script)], start_new_session=True)
        if number % 5 == 4: time.sleep(generator.uniform(0, 1.5))
        else:
            goal, deadline = (number + generator.random()) * FILMS / (KILLS + 1), time.monotonic() + 60
            while receipts() < goal and child.poll() is None and time.monotonic() < deadline: time.sleep(0.002)
            time.sleep(generator.uniform(0, 0.03))
        with contextlib.suppress(ProcessLookupError): os.killpg(child.pid, signal.SIGKILL)
        if child.wait() == -signal.SIGKILL: killed.append(receipts())
    assert len(killed) == KILLS and killed[-1] < FILMS, killed
    print(f'{FILMS} films, killed {KILLS} times after {killed} receipts')
    begun = time.perf_counter()
    report = preprocess([films], out, TINY, landmarks=constant_points)
    print(f'{report.processed} films were left for the last run ({time.perf_counter() - begun:.1f} s)')
    assert content(out) == content(undisturbed)                                        # shards, manifest, rejections, receipts: every byte
    keys = [row['key'] for row in rows(out, 'manifest')]
    assert len(keys) == len(set(keys)) == report.clips and not verify(read_manifest(out))
    assert len(rows(out, 'finished')) == FILMS

def test_two_machines_make_the_union(films, undisturbed, tmp_path):
    """Equal: every row of the manifest but for the place in the tars, so every sample's bytes (by SHA-256), and every rejection. Not equal: which tar
    a clip lies in, and the order of the receipts."""
    for shard in (0, 1): preprocess([films], tmp_path/'out', TINY.replace(shard=shard, of=2), landmarks=constant_points)
    def sets(folder): return [Counter(json.dumps({key: value for key, value in row.items() if key not in ('shard', 'offset') and (name != 'finished' or
                              not key.endswith(('_index', '_bytes')))}) for row in rows(folder, name)) for name in ('manifest', 'rejected', 'finished')]
    assert sets(tmp_path/'out') == sets(undisturbed) and not verify(read_manifest(tmp_path/'out'))
    shares = [len(rows(tmp_path/'out', f'finished-{shard:03d}')) for shard in (0, 1)]
    assert min(shares) > 0.35 * FILMS and read_manifest(tmp_path/'out').sha256 == read_manifest(undisturbed).sha256


# ---- every fault, alone and all together ----

CONFIG = PreprocessConfig(size=64, detector='dlib', minimum_frames=5)

def face(name: str = 'syn01', count: int = 12, size: int = 192) -> list[np.ndarray]: return frames_of(clip(name), count, size)

def encoded(path: Path, frames, codec: str = 'libx264', pixels: str = 'yuv420p', rate=25, turned: bool = False, sound=None, sound_rate: int = 16000) -> None:
    "A film in any codec and pixel format; no frames: a stream without a packet. `sound`: (channels, samples)."
    tick = 1 / Fraction(rate)
    with av.open(str(path), 'w') as container:
        video = container.add_stream(codec, rate=Fraction(rate), options={'crf': '18', 'bf': '0'} if codec == 'libx264' else {})
        video.height, video.width, video.pix_fmt = *(frames[0].shape[:2] if len(frames) else (64, 64)), pixels
        video.codec_context.time_base = tick
        if turned: video.set_display_rotation(90)
        audio = container.add_stream('aac', rate=sound_rate, layout='mono' if len(sound) == 1 else 'stereo') if sound is not None else None
        container.start_encoding()
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), 'rgb24')
            frame.pts, frame.time_base = number, tick
            container.mux(video.encode(frame))
        if len(frames): container.mux(video.encode(None))
        if audio is not None:
            block = av.AudioFrame.from_ndarray(sound, 'fltp', audio.layout.name)
            block.sample_rate, block.pts, block.time_base = sound_rate, 0, Fraction(1, sound_rate)
            container.mux(audio.encode(block)); container.mux(audio.encode(None))

def tones(channels: int, seconds: float, rate: int) -> np.ndarray:
    return np.stack([.3 * np.sin(np.arange(int(seconds * rate)) / (9 + channel)) for channel in range(channels)]).astype(np.float32)

def halved(path: Path) -> None: os.truncate(make_film(path, face(), faststart=True), path.stat().st_size * 6 // 10)

def scrambled(path: Path) -> None:
    data = bytearray(make_film(path, face(count=25), faststart=True).read_bytes())
    begin = data.index(b'mdat') + 200
    data[begin:] = np.random.default_rng(0).bytes(len(data) - begin)
    path.write_bytes(data)

def leaving(path: Path) -> None:
    "A face that stays for twenty frames and then runs out of the picture to the right."
    places = [10] * 20 + [10 + step * step for step in range(20)]
    wide = [np.full((192, 400 + 192, 3), 110, np.uint8) for _ in places]
    for room, place, image in zip(wide, places, itertools.cycle(face(count=20))): room[:, place:place + 192] = image[:, :592 - place]
    make_film(path, [room[:, :400] for room in wide])

def uneven(path: Path) -> None: make_film(path, face(count=15), milliseconds=[40 * number + 15 * (number % 3) for number in range(15)])

def pair(path: Path) -> None: make_film(path, [np.hstack(two) for two in zip(face(), face('syn11'))])

def hills(path: Path) -> None:
    make_film(path, [np.kron(np.random.default_rng(0).integers(0, 255, (8, 8, 3)), np.ones((20, 20, 1))).astype(np.uint8)] * 12)

def still(path: Path) -> None:
    from PIL import Image
    Image.fromarray(face(count=1)[0]).save(path)

BAD = ([], {'cannot be decoded': 'file'})
CASES = {     # file: (maker, (frames of each clip, {reason: frames left out, or 'file' for all of it}))
    'halved.mp4': (halved, BAD),
    'scrambled.mp4': (scrambled, BAD),
    'empty.mp4': (lambda path: path.touch(), BAD),
    'story.mp4': (lambda path: path.write_text('Once upon a time ' * 300), BAD),
    'sound only.mp4': (lambda path: make_film(path, [], sound=speech(1)), BAD),
    'no frames.mkv': (lambda path: encoded(path, [], 'mpeg4'), BAD),
    'still.png': (still, ([], {'a picture, not a video': 'file'})),
    'hills.mp4': (hills, ([], {'no face': 'file'})),
    'leaves.mp4': (leaving, None),     # by itself below: where exactly the detector gives up is its own affair
    'pair.mp4': (pair, ([12], {})),
    'cut.mp4': (lambda path: make_film(path, [*face(count=11), *face('syn11', 9)]), ([11, 9], {})),
    'cut, too short.mp4': (lambda path: make_film(path, [*face(count=13), *face('syn11', 4)]), ([13], {'too few usable frames': 4})),
    'phone.mp4': (lambda path: encoded(path, [np.rot90(image, -1) for image in face()], turned=True), ([12], {})),
    'uneven.mp4': (uneven, ([15], {})),
    **{f'rate {name}.mp4': ((lambda rate: lambda path: encoded(path, face(), rate=rate))(rate), ([12], {})) for name, rate in
       (('24', 24), ('25', 25), ('29.97', Fraction(30000, 1001)), ('30', 30), ('50', 50), ('60', 60))},
    'stereo.mp4': (lambda path: encoded(path, face(), sound=tones(2, .48, 44100), sound_rate=44100), ([12], {})),
    'long sound.mp4': (lambda path: encoded(path, face(), sound=tones(1, 3, 16000)), ([12], {})),
    'odd.mp4': (lambda path: encoded(path, [image[:187, :189] for image in face()], pixels='yuv444p'), ([12], {})),
    'grey.mkv': (lambda path: encoded(path, face(), 'ffv1', 'gray'), ([12], {})),
    'deep grey.mkv': (lambda path: encoded(path, face(), 'ffv1', 'gray16le'), ([12], {})),
    'deep colour.mkv': (lambda path: encoded(path, face(), 'ffv1', 'gbrp16le'), ([12], {})),
    'ten bits.mp4': (lambda path: encoded(path, face(), pixels='yuv420p10le'), ([12], {})),
    'Zoë – take 1 (最終).mp4': (lambda path: make_film(path, face('syn11')), ([12], {})),
    'twin a.mp4': (lambda path: make_film(path, face('syn05')), ([12], {})),
    'twin b.mp4': (lambda path: make_film(path, face('syn05')), ([], {'duplicate': 'file'}))}

@pytest.fixture(scope='module')
def zoo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('zoo')/'all of them'
    folder.mkdir()
    for name, (make, _) in CASES.items(): make(folder/name)
    return folder

@pytest.fixture(scope='module')
def together(zoo, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('together')/'shards'
    report = preprocess([zoo], out, CONFIG)
    files, frames = Counter(), Counter()
    for name, (_, expected) in CASES.items():
        for reason, count in (expected or outcome(out, name))[1].items():
            if count == 'file': files[reason] += 1
            else: frames[reason] += count
    assert report.rejected_files == files and report.rejected_frames == frames and report.processed == report.sources == len(CASES)
    assert report.clips == sum(len((expected or outcome(out, name))[0]) for name, (_, expected) in CASES.items()) and not verify(read_manifest(out))
    return out

def outcome(out: Path, name: str) -> tuple[list[int], dict]:
    lost = Counter()
    for row in rows(out, 'rejected'):
        if row['file'] == name: lost[row['reason']] = 'file' if row['first'] is None else lost[row['reason']] + row['frames']
    return [row['frames'] for row in rows(out, 'manifest') if row['source'] == name], dict(lost)

@pytest.fixture(scope='module')
def maker(tmp_path_factory):
    from talking_face.signals.detectors import make_detector
    return ClipMaker(CONFIG, make_detector('dlib'), None, tmp_path_factory.mktemp('alone'))

@pytest.mark.parametrize('name', CASES)
def test_a_fault_alone_and_among_others(zoo, together, maker, name):
    "Alone or among the others, a file has the same outcome, and its clips have the same bytes."
    stored, lost = outcome(together, name)
    assert CASES[name][1] in (None, (stored, lost)) and sum(row['source'] == name for row in rows(together, 'finished')) == 1
    if name == 'twin b.mp4': return                             # alone it is no duplicate
    source, = [source for source in find_sources([zoo]) if source.name == name]
    result = process_source(maker, source)
    assert result.rejected == [row for row in rows(together, 'rejected') if row['file'] == name]
    with open(result.fragment, 'rb') if result.clips else contextlib.nullcontext() as file: samples = [file.read(length) for _, length in result.clips]
    assert [hashlib.sha256(data).hexdigest() for data in samples] == [row['sha256'] for row in rows(together, 'manifest') if row['source'] == name]

def test_a_face_that_walks_out(together):
    "Twenty frames stand still and are stored with those after them that still fit the square; then the reasons follow each other; every frame is in the books."
    (stored,), lost = outcome(together, 'leaves.mp4')
    ranges = sorted((row['first'], row['last'], row['reason']) for row in rows(together, 'rejected') if row['file'] == 'leaves.mp4')
    assert 20 <= stored <= 32 and stored + sum(lost.values()) == 40 and set(lost) == {'face outside the square', 'no face'}
    assert ranges[0][0] >= 20 and ranges[-1][1:] == (39, 'no face')

def test_what_is_stored_is_right(together):
    "Rates are exact, sound has the length of the clip, a turned film is upright, a name in any script is kept, both sides of a cut are there."
    clips = {}
    for record in read_manifest(together): clips.setdefault(record.source, []).append((record, open_clip(record)))
    for name, rate in (('24', 24), ('25', 25), ('29.97', Fraction(30000, 1001)), ('30', 30), ('50', 50), ('60', 60)):
        (record, clip_), = clips[f'rate {name}.mp4']
        assert record.fps == rate and (clip_.positions == range(12)).all() and record.seconds == float(12 / Fraction(rate))
    for name in ('stereo.mp4', 'long sound.mp4'): assert abs(len(clips[name][0][1].audio()) - .48 * 16000) <= 400, name
    assert not clips['rate 25.mp4'][0][0].has_audio and clips['uneven.mp4'][0][1].info['variable_rate']
    upright, turned = (clips[name][0][1] for name in ('rate 25.mp4', 'phone.mp4'))
    assert np.abs(upright.landmarks - turned.landmarks).max() < 4 and np.abs(upright.frame(5).astype(int) - turned.frame(5)).mean() < 6
    for name in ('grey.mkv', 'deep grey.mkv'): assert np.ptp(clips[name][0][1].frame(3).astype(int), axis=-1).max() <= 12, name        # JPEG's rounding
    assert np.abs(clips['deep colour.mkv'][0][1].frame(3).astype(int) - upright.frame(3)).mean() < 6
    (_, before), (_, after) = clips['cut.mp4']
    assert (before.info['scene'], after.info['scene'], after.info['first_frame']) == (0, 1, 11)
    (_, other), = clips['Zoë – take 1 (最終).mp4']
    assert np.abs(after.frame(0).astype(int) - other.frame(0)).mean() < 8 < np.abs(before.frame(0).astype(int) - other.frame(0)).mean()
    duplicate, = [row for row in rows(together, 'rejected') if row['reason'] == 'duplicate']
    assert (duplicate['file'], duplicate['detail']) == ('twin b.mp4', 'of twin a.mp4')

def test_two_people_are_refused_or_chosen(zoo, tmp_path):
    "`largest` takes one of them (above); `one` refuses the file, or only the scene in which there are two; a number takes that one."
    inputs = tmp_path/'in'; inputs.mkdir()
    shutil.copy(zoo/'pair.mp4', inputs)
    alone = [np.pad(image, ((0, 0), (96, 96), (0, 0)), 'edge') for image in face('syn05')]
    make_film(inputs/'then one.mp4', [*(np.hstack(two) for two in zip(face(), face('syn11'))), *alone])
    preprocess([inputs], tmp_path/'one', CONFIG.replace(face='one'))
    assert outcome(tmp_path/'one', 'pair.mp4') == ([], {'several faces': 'file'}) and outcome(tmp_path/'one', 'then one.mp4') == ([12], {'several faces': 12})
    preprocess([inputs], tmp_path/'second', CONFIG.replace(face='1'))
    assert outcome(tmp_path/'second', 'then one.mp4') == ([12], {'the chosen face is not there': 12})
    right = next(open_clip(record) for record in read_manifest(tmp_path/'second') if record.source == 'pair.mp4')
    assert right.info['crop']['centre'][0] > 192

def test_duplicates_over_machines_and_time(tmp_path):
    "Every machine knows the first of two equal files without asking the others; what is stored already stays."
    def run(out: str, *names: str, **options: int) -> None:
        preprocess([tmp_path/name for name in names], tmp_path/out, TINY.replace(jobs=1, **options), landmarks=constant_points)
    for name in ('a.mov', 'i.mov', 'c.mov'): tiny_film(tmp_path/name, 1 + (name == 'c.mov'))
    for shard in (1, 0): run('two', 'a.mov', 'i.mov', 'c.mov', shard=shard, of=2)
    assert [machine_of(source, 2) for source in find_sources([tmp_path/'a.mov', tmp_path/'i.mov'])] == [0, 1]      # one each, or this would prove little
    assert [outcome(tmp_path/'two', name) for name in ('a.mov', 'i.mov', 'c.mov')] == [([10], {}), ([], {'duplicate': 'file'}), ([10], {})]
    run('late', 'i.mov'); run('late', 'a.mov', 'i.mov')
    assert outcome(tmp_path/'late', 'i.mov') == ([10], {}) and outcome(tmp_path/'late', 'a.mov') == ([], {'duplicate': 'file'})

def test_a_table_of_parts_boxes_and_absent_files(zoo, tmp_path):
    "Parts of one file are sources of their own; boxes choose the person; a file that is not there yet is looked for again the next time."
    path, label = tmp_path/'in/pair.mp4', Label('ada')
    path.parent.mkdir(); shutil.copy(zoo/'pair.mp4', path)
    def person(side: str) -> tuple[FaceBox, ...]:
        left = 0. if side == 'left' else .5
        return tuple(FaceBox(Fraction(moment), left + .1, .1, left + .4, .9) for moment in (0, 1))
    table = write_sources(tmp_path/'in/table.jsonl', [Source(path, f'pair {side}', label, boxes=person(side), facts=dict(licence='CC0 1.0', words=[side])) for side in ('left', 'right')]
                          + [Source(path, 'pair end', label, start_s=Fraction(1, 5), end_s=Fraction(9, 20)), Source(path, 'after it', label, start_s=Fraction(9)),
                             Source(path.with_name('later.mp4'), 'later', label), Source(path, 'sky', label, boxes=(FaceBox(Fraction(0), .4, 0., .6, .1),))])
    report = preprocess([table], tmp_path/'out', CONFIG)
    assert report.rejected_files == {'there is no such file': 1, 'cannot be decoded': 1, 'no face': 1} and report.clips == 3
    clips = {record.source: open_clip(record) for record in read_manifest(tmp_path/'out')}
    assert clips['pair left'].info['crop']['centre'][0] < 192 < clips['pair right'].info['crop']['centre'][0]
    assert clips['pair left'].info['licence'] == 'CC0 1.0' and clips['pair left'].info['facts'] == dict(words=['left'])
    assert clips['pair end'].info['first_frame'] == 5 and len(clips['pair end']) == 7
    shutil.copy(zoo/'twin a.mp4', path.with_name('later.mp4'))
    report = preprocess([table], tmp_path/'out', CONFIG)
    assert (report.processed, report.clips) == (1, 4) and 'there is no such file' not in report.rejected_files


# ---- long films, full and read-only disks ----

LONG = """
import resource, sys
sys.path.insert(0, {tests!r})
from test_preprocess_survival import TINY, standing_face
from talking_face.data.preprocessing import preprocess
for film in sys.argv[1:]:
    report = preprocess([film], film + '.shards', TINY.replace(jobs=1, maximum_seconds=2), landmarks=standing_face)
    print(report.frames, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""

def standing_face(path: Path) -> np.ndarray: return np.tile(FACE * 4, (int(path.stem), 1, 1))

def test_memory_does_not_grow_with_the_film(tmp_path):
    "A minute of film after four seconds of it, in one process: its frames would take 74 MB."
    rooms = [np.kron(np.random.default_rng(seed).integers(0, 255, (8, 8, 3)), np.ones((16, 16, 1))).astype(np.uint8) for seed in (0, 1)]
    films = [make_film(tmp_path/f'{count}.mp4', (rooms[number // 500 % 2] for number in range(count)), sound=speech(count / 25)) for count in (100, 1500)]
    done = subprocess.run([sys.executable, '-c', LONG.format(tests=str(ROOT/'tests')), *map(str, films)], capture_output=True, text=True, timeout=120)
    (few, before), (many, after) = ([int(word) for word in line.split()] for line in done.stdout.splitlines())
    print(f'peak memory: {before / 1024:.0f} MB after {few} frames, {after / 1024:.0f} MB after {many} more')
    assert (few, many) == (100, 1500) and after - before < 20_000       # KB

def small_disk(folder: Path, kilobytes: int) -> bool:
    "Mount a file system of this size, if this user may."
    folder.mkdir()
    command = shutil.which('mount')
    return bool(command) and subprocess.run([command, '-t', 'tmpfs', '-o', f'size={kilobytes}k', 'none', str(folder)], capture_output=True).returncode == 0

def test_a_full_disk_is_one_sentence_and_no_loss(films, undisturbed, tmp_path):
    "A real one, 600 KB; afterwards the folder is moved to a larger disk and finished there."
    disk, out = tmp_path/'disk', tmp_path/'out'
    if not small_disk(disk, 600): pytest.skip('this user may not mount a file system')
    try:
        for jobs in (1, 2):
            with pytest.raises(DataError, match='No space left') as caught: preprocess([films], disk/'shards', TINY.replace(jobs=jobs), landmarks=constant_points)
            assert len(str(caught.value).splitlines()) == 1 and not list((disk/'shards').glob('.work*'))
        shutil.copytree(disk/'shards', out)
    finally: subprocess.run(['umount', str(disk)], check=True)
    begun = len(rows(out, 'finished'))
    report = preprocess([films], out, TINY, landmarks=constant_points)
    assert 0 < begun < FILMS and report.processed == FILMS - begun and content(out) == content(undisturbed)

def test_a_file_that_cannot_grow(zoo, talking_face, tmp_path):
    "The same through the command line: exit code 2, one line; then it goes on."
    (tmp_path/'in').mkdir()
    for name in ('rate 25.mp4', 'twin a.mp4', 'cut.mp4'): shutil.copy(zoo/name, tmp_path/'in')
    job = ['preprocess', tmp_path/'in', '--out', tmp_path/'out', '--size', 64, '--minimum-frames', 5, '--detector', 'dlib']
    failed = Job(tmp_path/'full', *job, prepare=limit_file_size, details=(60_000,)).outcome()
    assert failed.code == 2 and len(failed.messages()) == 1 and 'space' in failed.messages()[0] and not list((tmp_path/'out').glob('.work*'))
    assert talking_face(*job).code == 0 and len(read_manifest(tmp_path/'out')) == 4

def test_a_read_only_folder_is_one_sentence(films):
    "Also for root, who may write everywhere: for this test it becomes nobody."
    base = Path(tempfile.mkdtemp())
    try:
        base.chmod(0o755)
        (base/'in/ada').mkdir(parents=True); (base/'sealed').mkdir()
        shutil.copy(films/'person01/0001.mov', base/'in/ada/film.mov')
        preprocess([base/'in'], base/'open', TINY.replace(jobs=1), landmarks=constant_points)
        shutil.copytree(base/'open', base/'sealed/begun')
        for path in [*(base/'sealed').rglob('*'), base/'sealed']: path.chmod(0o555 if path.is_dir() else 0o444)
        if os.geteuid() == 0: os.seteuid(65534)
        for out in ('sealed/new', 'sealed/begun'):
            with pytest.raises(DataError, match=f'{out}.*Permission denied'): preprocess([base/'in'], base/out, TINY.replace(jobs=1), landmarks=constant_points)
    finally:
        os.seteuid(os.getuid())
        for path in [base/'sealed', base/'sealed/begun']: path.chmod(0o755) if path.exists() else None
        shutil.rmtree(base)
