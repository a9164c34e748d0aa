"""What goes wrong at users: bad files, bad folders, a full disk, Ctrl-C. One line that names the file, exit code 2, and nothing left behind."""
import json, os, re, shutil, signal, struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from helpers import (ADVERSARIAL, DLIB, MICRO, Job, Outcome, clip, everything_in, finished, frames_of, limit_file_size, make_film, real, shell,
                     speech, wait_for)

def assert_refused(outcome: Outcome, *words: str) -> None:
    "Exit code 2, nothing on stdout, one line on stderr beside progress; it starts with `error: ` and says each of `words`."
    assert outcome.code == 2 and outcome.output == '', outcome
    messages = outcome.messages()
    assert len(messages) == 1 and messages[0].startswith('error: '), outcome.errors
    for word in words: assert word in messages[0], messages[0]


# ---- films and pictures that cannot be used ----

def landscape(path: Path) -> Path:
    random = np.random.default_rng(0)
    hills = np.kron(random.integers(0, 255, (8, 8, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    return make_film(path, [hills] * 3)


def faststart(path: Path) -> Path:
    "A film whose index comes first."
    make_film(path, frames_of(clip('syn01'), 40, 128), sound=speech(1.6), faststart=True)
    assert path.read_bytes().index(b'moov') < path.read_bytes().index(b'mdat')
    return path


def cut(path: Path, share: float) -> Path:
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    return path


def bytes_of(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def two_people(path: Path) -> Path:
    return make_film(path, [np.hstack(pair) for pair in zip(frames_of(clip('syn01'), 3), frames_of(clip('syn11'), 3))])


BAD_DRIVERS = {     # name: (file name, maker, words of the message)
    'no face': ('hills.mp4', landscape, ['no face found', '3 frames']),
    'two faces': ('pair.mp4', two_people, ['2 faces found', '--face']),
    'sound only': ('song.mp4', lambda path: make_film(path, [], sound=speech(1)), ['sound but no video']),
    'cut in the middle': ('cut.mp4', lambda path: cut(faststart(path), .6), ['cut off']),
    'cut near the end': ('tail.mp4', lambda path: cut(faststart(path), .97), ['cut off']),
    'cut before its index': ('half.mp4', lambda path: bytes_of(path, clip('syn01').read_bytes()[:40_000]), ['damaged']),
    'zero bytes': ('zero.mp4', lambda path: bytes_of(path, b''), ['0 bytes']),
    'text': ('story.mp4', lambda path: bytes_of(path, b'Once upon a time ' * 500), ['not a video']),
    'noise': ('noise.mp4', lambda path: bytes_of(path, np.random.default_rng(0).bytes(50_000)), ['not a video']),
    'picture': ('still.png', lambda path: shutil.copy(path.parent.parent/'still.png', path), ['is a picture']),
    'picture called mp4': ('still.mp4', lambda path: shutil.copy(path.parent.parent/'still.png', path), ['is a picture']),
    'folder': ('videos', folder, ['is a folder']),
    'nothing': ('nowhere.mp4', lambda path: path, ['no such file'])}


@pytest.mark.parametrize('fault', BAD_DRIVERS)
def test_bad_driver(workshop, talking_face, tmp_path, fault):
    name, make, words = BAD_DRIVERS[fault]
    shutil.copy(workshop.photo, tmp_path/'still.png')
    (tmp_path/'in').mkdir(); (tmp_path/'out').mkdir()
    make(tmp_path/'in'/name)
    before = everything_in(tmp_path)
    outcome = talking_face('reenact', '--person', workshop.person, '--driving', tmp_path/'in'/name, '--out', tmp_path/'out/out.mp4', *DLIB)
    assert_refused(outcome, name, *words)
    assert everything_in(tmp_path) == before


def test_group_of_drivers_with_a_choice(workshop, talking_face, tmp_path):
    job, made = ['reenact', '--person', workshop.person, '--driving', two_people(tmp_path/'pair.mp4'), *DLIB], []
    for choice in ('0', '1'):
        assert talking_face(*job, '--out', tmp_path/f'{choice}.mp4', '--face', choice).code == 0
        made.append(np.stack(frames_of(tmp_path/f'{choice}.mp4')).astype(int))
    assert np.abs(made[0] - made[1]).mean() > .5
    assert_refused(talking_face(*job, '--out', tmp_path/'2.mp4', '--face', 2), 'pair.mp4', '--face 2')


BAD_PHOTOS = {
    'no face': ('hills.png', lambda path: shutil.copy(path.parent.parent/'hills.png', path), ['no face found']),
    'two faces': ('pair.png', lambda path: shutil.copy(path.parent.parent/'pair.png', path), ['2 faces found']),
    'text': ('story.jpg', lambda path: bytes_of(path, b'Once upon a time'), ['neither video, picture']),
    'zero bytes': ('zero.jpg', lambda path: bytes_of(path, b''), ['0 bytes']),
    'cut': ('cut.png', lambda path: cut(Path(shutil.copy(path.parent.parent/'pair.png', path)), .5), ['cut off']),
    'empty folder': ('photos', folder, ['found; the known names']),
    'nothing': ('nowhere.png', lambda path: path, ['no such file'])}


@pytest.mark.parametrize('verb', ['fine-tune', 'reenact'])
@pytest.mark.parametrize('fault', BAD_PHOTOS)
def test_bad_photo(workshop, talking_face, tmp_path, fault, verb):
    from PIL import Image
    name, make, words = BAD_PHOTOS[fault]
    Image.fromarray(np.hstack([frames_of(clip('syn01'), 1)[0], frames_of(clip('syn11'), 1)[0]])).save(tmp_path/'pair.png')
    Image.fromarray(frames_of(landscape(tmp_path/'hills.mp4'), 1)[0]).save(tmp_path/'hills.png')
    (tmp_path/'in').mkdir(); (tmp_path/'out').mkdir()
    make(tmp_path/'in'/name)
    before = everything_in(tmp_path)
    photos = [tmp_path/'in'/name] if fault == 'empty folder' else [workshop.photo, tmp_path/'in'/name]
    rest = ['--out', tmp_path/'out/person'] if verb == 'fine-tune' else ['--driving', clip('syn01'), '--out', tmp_path/'out/out.mp4']
    assert_refused(talking_face(verb, '--run', workshop.run, '--photos', *photos, *rest, *DLIB), name, *words)
    assert everything_in(tmp_path) == before


def test_photographs_without_a_person(workshop, talking_face, tmp_path):
    for name in ('noface_grass.jpg', 'several_faces_crop.jpg'):
        outcome = talking_face('fine-tune', '--run', workshop.run, '--photos', real(f'stills/{name}'), '--out', tmp_path/'person', *DLIB)
        assert_refused(outcome, name, 'no face found' if 'noface' in name else '3 faces found')
    assert everything_in(tmp_path) == {}


# ---- runs and persons that cannot be used ----

def checkpoint(folder: Path) -> Path:
    "The newest weights in a copied run or person."
    return max([*folder.glob('person.safetensors'), *folder.glob('checkpoints/step-??????.safetensors')])


def flip_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for place in range(8, 40): data[place] ^= 0xFF
    path.write_bytes(data)


def rewrite_header(path: Path, change: Callable[[dict], object]) -> None:
    "Change what a checkpoint says of itself, and nothing else. A safetensors file is: length of the header (8 bytes), JSON, tensors."
    data = path.read_bytes()
    length, = struct.unpack('<Q', data[:8])
    header = json.loads(data[8:8 + length])
    ours = json.loads(header['__metadata__']['talking_face'])
    change(ours)
    header['__metadata__']['talking_face'] = json.dumps(ours)
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    path.write_bytes(struct.pack('<Q', len(text)) + text + data[8 + length:])


def unknown_palette(header: dict) -> None:
    header['palette'] = header['config']['model']['palette'] = 'sketch-v9'


BAD_WEIGHTS = {
    'cut': (lambda path: cut(path, .7), ['damaged']),
    'cut in its header': (lambda path: bytes_of(path, path.read_bytes()[:300]), ['damaged']),
    'header flipped': (flip_header, ['damaged']),
    'zero bytes': (lambda path: bytes_of(path, b''), ['damaged']),
    'not a checkpoint': (lambda path: bytes_of(path, b'PK\x03\x04' + bytes(1000)), ['damaged']),
    'missing': (Path.unlink, ['']),
    'unknown palette': (lambda path: rewrite_header(path, unknown_palette), ['sketch-v9']),
    'palettes that disagree': (lambda path: rewrite_header(path, lambda header: header.update(palette='lines-v1')), ['palette']),
    'other widths': (lambda path: rewrite_header(path, lambda header: header['config']['model'].update(generator_width=8)), []),
    'newer format': (lambda path: rewrite_header(path, lambda header: header.update(format=99)), ['format 99']),
    'config without a value': (lambda path: rewrite_header(path, lambda header: header.pop('config')), ['config']),
    'unknown option': (lambda path: rewrite_header(path, lambda header: header['config']['model'].update(colour='red')), ['colour'])}


@pytest.mark.parametrize('kind', ['person', 'run'])
@pytest.mark.parametrize('fault', BAD_WEIGHTS)
def test_bad_weights(workshop, talking_face, tmp_path, kind, fault):
    damage, words = BAD_WEIGHTS[fault]
    face = Path(shutil.copytree(workshop.person if kind == 'person' else workshop.micro, tmp_path/'face'))
    if kind == 'run' and fault == 'missing': shutil.rmtree(face/'checkpoints')
    else: damage(checkpoint(face))
    name = 'face' if fault == 'missing' else checkpoint(face).name
    before = everything_in(tmp_path)
    chosen = ['--person', face] if kind == 'person' else ['--run', face, '--photos', workshop.photo]
    assert_refused(talking_face('reenact', *chosen, '--driving', clip('syn01'), '--out', tmp_path/'out.mp4', *DLIB), name, *words)
    assert everything_in(tmp_path) == before


def test_run_and_person_mistaken_for_each_other(workshop, talking_face, tmp_path):
    rest = ['--driving', clip('syn01'), '--out', tmp_path/'out.mp4', *DLIB]
    assert_refused(talking_face('reenact', '--person', workshop.run, *rest), str(workshop.run))
    assert_refused(talking_face('reenact', '--run', workshop.person, '--photos', workshop.photo, *rest), str(workshop.person), 'no checkpoint')
    weights = shutil.copytree(workshop.person, tmp_path/'run'/'checkpoints')/'person.safetensors'       # even under the other's file name
    weights.rename(weights.with_name('step-000001.safetensors'))
    assert_refused(talking_face('reenact', '--run', tmp_path/'run', '--photos', workshop.photo, *rest), 'step-000001.safetensors', 'person')
    assert_refused(talking_face('reenact', '--person', workshop.person, '--run', workshop.run, '--photos', workshop.photo, *rest), '--person')
    assert not (tmp_path/'out.mp4').exists()


# ---- data that cannot be trained on ----

def train(workshop, *options: object) -> list[object]:
    return ['train', '--data', workshop.shards, '--steps', 8, '--log-every', 1, '--checkpoint-every', 1, '--keep-checkpoints', 9, *MICRO, *options]


@pytest.mark.parametrize('options, words', [
    ([], []),                                                                            # without --resume
    (['--resume', '--preset', 'small'], ['preset']),
    (['--resume', '--model.palette', 'lines-v1'], ['model']),
    (['--resume', '--losses.pixel', 2], ['losses']),
    (['--resume', '--seed', 7], ['seed']),
    (['--resume', '--steps', 9], ['steps'])])
def test_run_is_not_continued_as_another(workshop, talking_face, tmp_path, options, words):
    run = Path(shutil.copytree(workshop.micro, tmp_path/'micro'))
    before = everything_in(tmp_path)
    assert_refused(talking_face('train', '--data', workshop.shards, '--out', run, *options), 'micro', *words)
    assert everything_in(tmp_path) == before


def lose_clip(manifest: Path) -> None: manifest.write_text(''.join(manifest.read_text().splitlines(keepends=True)[1:]))


def change_clip(manifest: Path) -> None: manifest.write_text(re.sub('"sha256": "....', '"sha256": "beef', manifest.read_text(), count=1))


@pytest.mark.parametrize('change', [lose_clip, change_clip])
def test_run_is_not_continued_with_other_data(workshop, talking_face, tmp_path, change):
    shards, run = (Path(shutil.copytree(source, tmp_path/name)) for source, name in ((workshop.shards, 'others'), (workshop.micro, 'micro')))
    change(shards/'manifest.jsonl')
    before = everything_in(tmp_path)
    assert_refused(talking_face('train', '--data', shards, '--out', run, '--resume'), 'others')
    assert everything_in(tmp_path) == before


def test_checkpoint_of_another_palette_is_not_resumed(workshop, talking_face, tmp_path):
    run = Path(shutil.copytree(workshop.micro, tmp_path/'micro'))
    def repaint(header: dict) -> None: header['palette'] = header['config']['model']['palette'] = 'lines-v1'
    for path in run.glob('checkpoints/step-??????.safetensors'): rewrite_header(path, repaint)
    assert_refused(talking_face('train', '--data', workshop.shards, '--out', run, '--resume'), checkpoint(run).name, 'another')


def lose_frame(shards: Path) -> None:
    "Overwrite the end of every JPEG in the first clip."
    row = json.loads((shards/'manifest.jsonl').read_text().splitlines()[0])
    data = bytearray((shards/row['shard']).read_bytes())
    place = row['offset']
    while (place := data.find(b'\xff\xd9', place, row['offset'] + row['length'])) >= 0: data[place:place + 2] = b'\0\0'
    (shards/row['shard']).write_bytes(data)


def tear_line(shards: Path) -> None:
    text = (shards/'manifest.jsonl').read_text()
    (shards/'manifest.jsonl').write_text(text[:20] + text[40:])


BAD_SHARDS = {
    'no manifest': (lambda shards: (shards/'manifest.jsonl').unlink(), 'shards'),
    'empty manifest': (lambda shards: bytes_of(shards/'manifest.jsonl', b''), 'shards'),
    'torn manifest': (tear_line, 'manifest.jsonl'),
    'no tar': (lambda shards: next(shards.glob('*.tar')).unlink(), '.tar'),
    'cut tar': (lambda shards: cut(next(shards.glob('*.tar')), .3), '.tar'),
    'zeros in the tar': (lambda shards: bytes_of(next(shards.glob('*.tar')), bytes(next(shards.glob('*.tar')).stat().st_size)), '.tar'),
    'damaged pictures': (lose_frame, '.tar')}


@pytest.mark.parametrize('fault', BAD_SHARDS)
def test_bad_shards(workshop, talking_face, tmp_path, fault):
    damage, name = BAD_SHARDS[fault]
    shards = Path(shutil.copytree(workshop.shards, tmp_path/'shards'))
    damage(shards)
    assert_refused(talking_face('train', '--data', shards, '--out', tmp_path/'run', '--steps', 8, *MICRO), name)
    assert not (tmp_path/'run').exists()


def test_missing_shards_and_clips(workshop, talking_face, tmp_path):
    assert_refused(talking_face('train', '--data', tmp_path/'nowhere', '--out', tmp_path/'run'), 'nowhere')
    assert_refused(talking_face('train', '--data', workshop.shards, '--out', tmp_path/'run', '--split', 'test'), 'test')
    photos = ['--photos', workshop.shards, '--clip', 'nobody']
    assert_refused(talking_face('fine-tune', '--run', workshop.micro, *photos, '--out', tmp_path/'person'), 'nobody')
    assert everything_in(tmp_path) == {}


# ---- a full disk ----

def test_full_disk_while_writing_a_film(workshop, tmp_path):
    out = tmp_path/'out'; out.mkdir()
    job = ['reenact', '--run', workshop.micro, '--photos', workshop.photo, '--driving', clip('syn01'), '--out', out/'film.mp4', *DLIB]
    assert_refused(Job(tmp_path/'full', *job, prepare=limit_file_size, details=(6000,)).outcome(), 'film.mp4', 'space')
    assert everything_in(out) == {}
    assert Job(tmp_path/'free', *job, prepare=limit_file_size, details=(10**6,)).outcome().code == 0     # so the limit was it
    assert os.listdir(out) == ['film.mp4']


def test_full_disk_while_writing_a_person(workshop, tmp_path):
    out = tmp_path/'out'; out.mkdir()
    job = ['fine-tune', '--run', workshop.micro, '--photos', workshop.photo, '--out', out/'person', '--epochs', 1, *DLIB]
    assert_refused(Job(tmp_path/'full', *job, prepare=limit_file_size, details=(6000,)).outcome(), 'person', 'space')
    assert everything_in(out) == {}


def test_full_disk_while_writing_a_checkpoint(workshop, talking_face, tmp_path):
    run = tmp_path/'run'; shutil.copytree(workshop.micro, run)
    for path in run.glob('checkpoints/step-00000[5-8]*'): path.unlink()
    before = everything_in(run/'checkpoints')
    outcome = Job(tmp_path/'full', *train(workshop, '--out', run, '--resume', *ADVERSARIAL), prepare=limit_file_size, details=(50_000,)).outcome()
    assert_refused(outcome, 'step-000005', 'space')
    assert everything_in(run/'checkpoints') == before and (run/'FAILED').read_text().startswith('MediaError')
    assert talking_face(*train(workshop, '--out', run, '--resume', *ADVERSARIAL)).code == 0 and not (run/'FAILED').exists()
    assert checkpoint(run).read_bytes() == checkpoint(workshop.micro).read_bytes()


# ---- stopped by the user ----

@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_while_writing_a_film(workshop, tmp_path, number, code):
    "20 s of film, stopped as soon as there are bytes of it: about a quarter is generated then."
    out = tmp_path/'out'; out.mkdir()
    faces = frames_of(clip('syn01'), 75, size=96)
    driver = make_film(tmp_path/'long.mp4', (faces[count % 75] for count in range(200)), fps=10)
    process = shell('reenact', '--run', workshop.run, '--photos', workshop.photo, '--driving', driver, '--out', out/'film.mp4', '--batch', 1, *DLIB)
    wait_for(lambda: any(path.stat().st_size for path in out.iterdir()), lambda: process.poll() is None)
    assert [path.name for path in out.iterdir()] != ['film.mp4']
    process.send_signal(number)
    outcome = finished(process)
    assert outcome.code == code and outcome.output == '' and everything_in(out) == {}
    assert 'Traceback' not in outcome.errors
    if number == signal.SIGINT: assert len(outcome.messages()) == 1 and outcome.messages()[0].startswith('error: '), outcome.errors
