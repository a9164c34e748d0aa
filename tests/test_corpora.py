"""The door for corpora: times and boxes fit the pictures whatever the copy's rate and size, tables move with their data, damaged annotations are named."""
import json, shutil
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile

from helpers import CLIPS, make_film, real
from talking_face.core import ConfigError, DataError
from talking_face.data.annotations import read_alignment, read_face_track, read_segments, read_speakers, read_word_time
from talking_face.data.corpora import CORPORA, import_corpus
from talking_face.data.shards import open_clip, read_manifest
from talking_face.data.sources import FaceBox, Label, Source, box_at, find_sources, machine_of, read_sources, thin_boxes, write_sources
from talking_face.signals.media import iterate_video, read_image, write_image

HEAD = 'Identity  : \t{identity}\nReference : \t{video}\nOffset    : \t-2\nFV Conf   : \t19.8\t(1)\nASD Conf  : \t4.1\n\nFRAME \tX \tY \tW \tH \n'
META2 = 'VoxCeleb2 ID ,VGGFace2 ID ,Gender ,Set \nid00012 ,n000012 ,m ,dev \nid00017 ,n000017 ,f ,test \n'
META1 = 'VoxCeleb1 ID\tVGGFace1 ID\tGender\tNationality\tSet\nid10001\tAda_Lovelace\tf\tUK\tdev\nid10270\tEve_Example\tf\tUSA\ttest\n'
VIDEO = '-_IE7Qvj-_0'


def film(path: Path) -> Path:
    "An empty file in the place of a film: importers look at names, not into films (but for the size, where boxes are in pixels)."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def track(identity: str, rows: list[tuple], video: str = VIDEO, separator: str = ' \t') -> str:
    lines = (f'{int(frame):06d}{separator}' + separator.join(f'{value:g}' for value in box) + ' \n' for frame, *box in rows)
    return HEAD.format(identity=identity, video=video) + ''.join(lines)


# ---- times and boxes ----

def square_at(seconds: float) -> tuple[float, float, float, float]:
    "Where the moving square of the test films is, in fractions of the frame: x, y, width, height."
    return 0.1 + 0.15 * seconds, 0.2 + 0.05 * np.sin(3 * seconds), 0.25, 0.4


def moving_square(times_s: list[float], width: int, height: int) -> list[np.ndarray]:
    frames = []
    for seconds in times_s:
        x, y, w, h = square_at(seconds)
        image = np.zeros((height, width, 3), np.uint8)
        image[round(y * height):round((y + h) * height), round(x * width):round((x + w) * width)] = 255
        frames.append(image)
    return frames


@pytest.mark.parametrize('rate, width, height', [(24, 640, 360), (25, 854, 480), (30, 640, 360), (Fraction(30000, 1001), 480, 360), (50, 320, 240), (60, 426, 240)])
@pytest.mark.parametrize('version', [1, 2])
def test_box_is_where_the_face_is(tmp_path, version, rate, width, height):
    "The text counts 25 frames a second, in pixels of 360 lines (version 1) or fractions (2); the film has its own rate and size."
    identity = 'id10001' if version == 1 else 'id00012'
    times = [number / rate for number in range(int(3 * rate))]
    (tmp_path/'videos').mkdir()
    make_film(tmp_path/f'videos/{VIDEO}.mp4', moving_square([float(at) for at in times], width, height),
              fps=rate if isinstance(rate, int) else 30, milliseconds=None if isinstance(rate, int) else [round(1000 * at) for at in times])
    unit = np.array([360 * width / height, 360] * 2) if version == 1 else np.ones(4)
    text(tmp_path/f'txt/{identity}/{VIDEO}/00001.txt', track(identity, [(frame, *(square_at(frame / 25) * unit)) for frame in range(10, 60)]))
    text(tmp_path/f'vox{version}_meta.csv', META1 if version == 1 else META2)
    (source,) = import_corpus(f'voxceleb{version}', tmp_path)
    assert (source.start_s, source.end_s, source.fault) == (Fraction(10, 25), Fraction(60, 25), '') and len(source.boxes) < 40
    seen = 0
    for frame in iterate_video(source.path):
        if not source.start_s <= frame.time_s < source.end_s: continue
        rows, columns = np.nonzero(frame.image[..., 0] > 127)
        box = box_at(source.boxes, frame.time_s)
        found = np.array([columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height])
        assert np.abs(found - box[1:]).max() < 0.01 + 0.15 / 25 + 1.5 / height      # what thinning may cost, a frame's motion, the pixels' edges
        seen += 1
    assert abs(seen - 2 * rate) <= 2


def test_thinned_boxes_are_faithful():
    "Random walks, pauses, jumps, gaps in time: no dropped box is missed by more than the tolerance, and the ends stay."
    for seed in range(40):
        random = np.random.default_rng(seed)
        frames = np.cumsum(random.choice([1, 1, 1, 2, 30], 120))
        walk = np.cumsum(random.normal(0, [0.0, 0.001, 0.02][seed % 3], (120, 2)), 0) + 0.3
        boxes = [FaceBox(Fraction(int(frame), 25), x, y, x + 0.2, y + 0.3) for frame, (x, y) in zip(frames, walk)]
        few = thin_boxes(boxes, 0.01)
        assert set(few) <= set(boxes) and (few[0], few[-1]) == (boxes[0], boxes[-1])
        assert max(abs(a - b) for box in boxes for a, b in zip(box_at(few, box.time_s)[1:], box[1:])) <= 0.01 + 1e-9
    assert len(thin_boxes([FaceBox(Fraction(frame, 25), 0.1, 0.1, 0.5, 0.5) for frame in range(20_000)])) == 2      # a quarter of an hour, in one pass


# ---- layouts ----

def voxceleb2(root: Path) -> Path:
    "The archives unpacked side by side: both subsets as mp4 and txt, sound that is not needed, and original videos for one utterance that has no mp4."
    for subset, identity in (('dev', 'id00012'), ('test', 'id00017')):
        for number in (1, 2):
            film(root/f'{subset}/mp4/{identity}/21Uxsk56VDQ/0000{number}.mp4')
            film(root/f'{subset}/aac/{identity}/21Uxsk56VDQ/0000{number}.m4a')
            text(root/f'{subset}/txt/{identity}/21Uxsk56VDQ/0000{number}.txt', track(identity, [(5, .1, .1, .5, .5), (6, .1, .1, .5, .5)], '21Uxsk56VDQ'))
    text(root/f'test/txt/id00017/{VIDEO}/00007.txt', track('id00017', [(250, .1, .1, .5, .5), (251, .1, .1, .5, .5)]))
    film(root/f'videos/{VIDEO}.webm')
    text(root/'vox2_meta.csv', META2)
    return root


def grid(root: Path) -> Path:
    for speaker, code in (('s1', 'bbaf2n'), ('s1', 'swwp2s'), ('s34', 'bbaf2n')):
        film(root/f'{speaker}/video/mpg_6000/{code}.mpg')
        words = 'sil bin blue at f two now sil'.split() if code == 'bbaf2n' else 'sil set white with p two soon sil'.split()
        text(root/f'{speaker}/align/{code}.align', ''.join(f'{9000 * number} {9000 * number + 9000} {word}\n' for number, word in enumerate(words)))
    return root


def lrw(root: Path) -> Path:
    for word in ('ABOUT', 'YEARS'):
        for part in ('train', 'val', 'test'):
            film(root/f'lipread_mp4/{word}/{part}/{word}_00001.mp4')
            text(root/f'lipread_mp4/{word}/{part}/{word}_00001.txt', 'Disk reference: 59\nChannel: BBC One HD\nClip start: 3\nDuration: 0.37 seconds\n')
    return root


def youtubers(root: Path, swapped: bool = True) -> Path:
    "Five consecutive numbers for each face, as in the full data: the picture is copied, the sounds differ."
    faces = [next(iterate_video(path)).image[60:200, 60:200] for path in sorted(CLIPS.rglob('*_c0.mp4'))[:4]]
    for number in range(20):
        folder = root/('train' if number < 15 else 'test')/'ada'
        folder.mkdir(parents=True, exist_ok=True)
        if number % 5 == 0: first = write_image(folder/f'cropped_face_frame_{number}.png', faces[number // 5][..., ::-1 if swapped else 1])
        else: shutil.copy(first, folder/f'cropped_face_frame_{number}.png')
        soundfile.write(folder/f'preprocessed_frame_{number}.wav', np.full(16000, number / 100, np.float32), 16000)
    return root


MAKERS = {'voxceleb2': voxceleb2, 'grid': grid, 'lrw': lrw, 'youtubers': youtubers}


@pytest.mark.parametrize('name', MAKERS)
def test_table_does_not_depend_on_the_place(tmp_path, name):
    "The same corpus elsewhere, in a deeper folder, with a Mac's hidden files: the same names, labels and facts; and the table moves with its data."
    first = import_corpus(name, MAKERS[name](tmp_path/'here'), tmp_path/'here/table.jsonl')
    for path in [path for path in (tmp_path/'here').rglob('*') if path.is_file()][:50]: path.with_name('._' + path.name).write_bytes(b'Mac OS X')
    shutil.copytree(tmp_path/'here', tmp_path/'far/away/there')
    again = import_corpus(name, tmp_path/'far/away/there')
    assert [source[1:4] + (source.facts, source.boxes) for source in again] == [source[1:4] + (source.facts, source.boxes) for source in first]
    moved = read_sources(tmp_path/'far/away/there/table.jsonl')
    assert moved == again and all(path.is_relative_to(tmp_path/'far') for source in moved for path in (source.path, *source.pictures, *source.sounds))
    above = import_corpus(name, tmp_path/'far')
    assert [source.label for source in above] == [source.label for source in first]
    assert read_sources(tmp_path/'here/table.jsonl') == first == [source for source in find_sources([tmp_path/'here/table.jsonl'])]
    for of in (2, 5): assert sum(len([source for source in first if machine_of(source, of) == shard]) for shard in range(of)) == len(first)


def test_voxceleb_tree(tmp_path):
    sources = {source.name: source for source in import_corpus('voxceleb2', voxceleb2(tmp_path))}
    assert len(sources) == 5 and Counter(source.label for source in sources.values()) == {('id00012', 'train'): 2, ('id00017', 'test'): 3}
    cut, part = sources['voxceleb2/dev/mp4/id00012/21Uxsk56VDQ/00001.mp4'], sources[f'voxceleb2/test/txt/id00017/{VIDEO}/00007']
    assert (cut.start_s, cut.boxes, cut.facts['gender'], cut.facts['av_offset_frames']) == (None, (), 'm', -2)
    assert (part.start_s, part.end_s, part.path.name) == (Fraction(250, 25), Fraction(252, 25), f'{VIDEO}.webm') and len(part.boxes) == 2
    assert 'do not redistribute' in cut.facts['licence'] and cut.facts['corpus'] == 'voxceleb2'
    assert 'Ada' not in json.dumps([source.facts for source in sources.values()])


def test_voxceleb1_without_its_table(tmp_path):
    "Its test people are a range of numbers; and a video of another size than the text measured in is no guess, but a fault."
    film(tmp_path/'elsewhere/abcdefghijk.mp4'); make_film(tmp_path/'pixels00000.mp4', [np.zeros((360, 640, 3), np.uint8)] * 3)
    for identity in ('id10269', 'id10270', 'id10309', 'id10310'):
        text(tmp_path/f'txt/{identity}/pixels00000/00001.txt', track(identity, [(1, 100, 50, 90, 90), (2, 101, 50, 90, 90)], 'pixels00000', ' '))
    text(tmp_path/'txt/id10001/pixels00000/00002.txt', track('id10001', [(1, 900, 500, 300, 300), (2, 900, 500, 300, 300)], 'pixels00000'))
    text(tmp_path/'txt/id10001/abcdefghijk/00001.txt', track('id10001', [(1, 90, 50, 30, 30)], 'abcdefghijk'))
    sources = {(source.label.identity, source.facts['video']): source for source in import_corpus('voxceleb1', tmp_path)}
    splits = {identity: source.label.split for (identity, _), source in sources.items()}
    assert splits == {'id10001': 'train', 'id10269': 'train', 'id10270': 'test', 'id10309': 'test', 'id10310': 'train'}
    assert 'outside a picture of 360 lines' in sources['id10001', 'pixels00000'].fault and 'cannot be decoded' in sources['id10001', 'abcdefghijk'].fault
    assert not sources['id10270', 'pixels00000'].fault and sources['id10270', 'pixels00000'].boxes[0].x0 == pytest.approx(100 / 640, abs=1e-4)
    again = {(source.label.identity, source.facts['video']): source for source in import_corpus('voxceleb1', tmp_path, lines='1080')}
    assert not again['id10001', 'pixels00000'].fault and again['id10001', 'pixels00000'].boxes[0].y1 == pytest.approx(800 / 1080, abs=1e-4)
    with pytest.raises(ConfigError, match='height in pixels'): import_corpus('voxceleb1', tmp_path, lines='high')


def test_first_voxceleb(tmp_path):
    "voxceleb1_txt/NAME/VIDEO.txt: the table of people turns names into identities, and must agree about the subset."
    body = 'POI\t{0}\nURL\tabcdefghijk\nDURATION\t100.0 s\nSET\t{1}\n\n{0}/abcdefghijk_0000001 10.0 14.5\n{0}/abcdefghijk_0000002 20.04 31\n'
    text(tmp_path/'voxceleb1_txt/Eve_Example/abcdefghijk.txt', body.format('Eve_Example', 'test'))
    film(tmp_path/'abcdefghijk.mp4')
    assert {source.label for source in import_corpus('voxceleb1', tmp_path)} == {Label('Eve_Example', 'test')}
    text(tmp_path/'vox1_meta.csv', META1)
    sources = import_corpus('voxceleb1', tmp_path)
    assert {source.label for source in sources} == {Label('id10270', 'test')} and not any('Eve' in source.name for source in sources)
    assert [(source.start_s, source.end_s) for source in sources] == [(10, Fraction(29, 2)), (Fraction(501, 25), 31)]
    text(tmp_path/'voxceleb1_txt/Eve_Example/abcdefghijk.txt', body.format('Eve_Example', 'dev'))
    with pytest.raises(DataError, match='says dev, and the table of people says test'): import_corpus('voxceleb1', tmp_path)


def test_grid_and_lrw(tmp_path):
    sources = {source.name: source for source in import_corpus('grid', grid(tmp_path/'grid'), split='unseen')}
    facts = sources['grid/s1/video/mpg_6000/swwp2s.mpg'].facts
    assert facts['sentence'] == 'set white with p two soon' and facts['words'][0] == dict(word='set', start_s=0.36, end_s=0.72) and facts['identity_known']
    assert {source.label.identity: source.label.split for source in sources.values()} == dict(grid_s1='test', grid_s34='train')
    words = import_corpus('lrw', lrw(tmp_path/'lrw'))
    assert Counter(source.label.split for source in words) == dict(train=2, validation=2, test=2) and len({source.label.identity for source in words}) == 6
    assert all(word['start_s'] == pytest.approx(0.395) and word['end_s'] == pytest.approx(0.765) for source in words for word in source.facts['words'])


def test_repeated_faces_are_one_source(tmp_path):
    sources = import_corpus('youtubers', youtubers(tmp_path/'swapped'))
    assert len(sources) == 4 and all(len(source.sounds) == 5 and source.swap_red_blue and source.pictures == (source.path,) for source in sources)
    assert Counter(source.label.split for source in sources) == dict(train=3, test=1)
    assert [source.facts['frame_numbers'] for source in sources if source.label.split == 'test'] == [[15, 16, 17, 18, 19]]
    levels = [round(100 * float(soundfile.read(sound)[0][0])) for sound in sorted(sources, key=lambda source: source.facts['frame_numbers'])[1].sounds]
    assert levels == [5, 6, 7, 8, 9]                                                             # its own sounds, in order
    assert not any(source.swap_red_blue for source in import_corpus('youtubers', youtubers(tmp_path/'natural', swapped=False)))
    assert all(source.swap_red_blue for source in import_corpus('youtubers', tmp_path/'natural', swap_red_blue='yes'))


# ---- one door ----

def test_everything_goes_in_together(tmp_path):
    "Tables of several corpora, a folder, a CSV and a single video in one call; a CSV of identities corrects a table without rejecting its other rows."
    for name, make in MAKERS.items(): import_corpus(name, make(tmp_path/name), tmp_path/f'{name}.jsonl')
    film(tmp_path/'own/ada/1.mp4'); film(tmp_path/'mine/eve/2.mp4')
    text(tmp_path/'mine/list.csv', '\ufefffile;identity;split;start_s;end_s;licence\r\neve/2.mp4;Eve;val;0.5;2;"CC0\nor else"\r\neve/2.mp4;Eve;val;2;;\r\n')
    inputs = [*(tmp_path/f'{name}.jsonl' for name in MAKERS), tmp_path/'own', tmp_path/'mine/list.csv', CLIPS/'syn01/syn01_c0.mp4']
    sources = find_sources(inputs)
    assert len(sources) == 5 + 3 + 6 + 4 + 1 + 2 + 1 and [source.name for source in sources] == sorted({source.name for source in sources})
    listed = [source for source in sources if source.label.identity == 'Eve']
    assert [(source.start_s, source.end_s, source.label.split) for source in listed] == [(Fraction(1, 2), 2, 'validation'), (2, None, 'validation')]
    assert listed[0].facts['licence'] == 'CC0\nor else'
    people = text(tmp_path/'people.csv', 'file,identity,split\ngrid/s1/video/mpg_6000/swwp2s.mpg,Someone,test\n')
    corrected = {source.name: source for source in find_sources([tmp_path/'grid.jsonl'], str(people))}
    assert corrected['grid/s1/video/mpg_6000/swwp2s.mpg'].label == ('Someone', 'test') and not any(source.fault for source in corrected.values())
    assert corrected['grid/s1/video/mpg_6000/bbaf2n.mpg'].label == ('grid_s1', '')


def test_wrong_folders_and_tables_are_named(tmp_path):
    film(tmp_path/'nothing/here.txt')
    for name, corpus in CORPORA.items():
        root = tmp_path/'nothing' if name != 'csv' else tmp_path/'nothing/here.txt'
        with pytest.raises(DataError) as caught: import_corpus(name, root, tmp_path/'out.jsonl')
        assert str(root) in str(caught.value) and (name == 'csv' or corpus.layout in str(caught.value))
    assert not (tmp_path/'out.jsonl').exists()
    with pytest.raises(DataError, match='none of their videos'):
        text(tmp_path/f'texts/txt/id00012/{VIDEO}/00001.txt', track('id00012', [(1, .1, .1, .1, .1)])); import_corpus('voxceleb2', tmp_path/'texts')
    import_corpus('grid', grid(tmp_path/'grid'), tmp_path/'grid.jsonl')
    shutil.rmtree(tmp_path/'grid')
    with pytest.raises(DataError, match='none of its 3 files is there'): find_sources([tmp_path/'grid.jsonl'])
    manifest = text(tmp_path/'manifest.jsonl', '{"key": "a", "identity": "b"}\n')
    with pytest.raises(DataError, match='line 1: is no source'): find_sources([manifest])


def test_some_files_of_a_table_are_gone(tmp_path):
    "They are faults, counted and named; and sources again when the files are back."
    import_corpus('grid', grid(tmp_path/'grid'), tmp_path/'grid.jsonl')
    lost = tmp_path/'grid/s34/video/mpg_6000/bbaf2n.mpg'
    lost.rename(tmp_path/'lost')
    sources = find_sources([tmp_path/'grid.jsonl'])
    assert [source.fault for source in sources] == ['', '', 'there is no such file']
    write_sources(tmp_path/'copy.jsonl', sources)
    (tmp_path/'lost').rename(lost)
    assert not any(source.fault for source in find_sources([tmp_path/'copy.jsonl']))


@pytest.mark.parametrize('reader, content', [
    (read_face_track, track('id00012', [(frame, .1, .2, .3, .4) for frame in range(20)])),
    (read_segments, 'POI\tAda\nURL\tabcdefghijk\nDURATION\t9 s\nSET\tdev\n\nAda/abcdefghijk_0000001 1.5 4\nAda/abcdefghijk_0000002 5 9.25\n'),
    (read_speakers, META1), (read_alignment, '0 5000 sil\n5000 9000 bin\n9000 12000 blue\n12000 74500 sil\n'),
    (lambda path: read_word_time(path, 'ABOUT'), 'Channel: BBC\nDuration: 0.53 seconds\n'), (read_sources, None),
    (lambda path: find_sources([path.rename(path.with_suffix('.csv'))]), 'file,identity,split,start_s\n1.mp4,ada,train,0.5\n1.mp4,ada,test,2\n')])
def test_damaged_annotations(tmp_path, reader, content):
    "300 texts with random bytes changed, cut or doubled: each is read, or refused by a message that names the file; never another error."
    path, random, refused = tmp_path/'table.jsonl', np.random.default_rng(8), 0
    film(tmp_path/'1.mp4')
    rest = '', Fraction(1, 3), None, (FaceBox(Fraction(1, 25), .1, .2, .3, .4),), dict(words=[dict(word='é', start_s=.5)])
    if content is None: content = write_sources(path, [Source(tmp_path/'1.mp4', name, Label('ada', 'test'), *rest) for name in 'abc']).read_text()
    for _ in range(300):
        data = bytearray(content.encode())
        for _ in range(random.integers(1, 4)):
            place = int(random.integers(len(data)))
            match random.integers(4):
                case 0: data[place] = int(random.choice(list(b'\x00\t\n ,;:{}["-.0129eNaxz\xff')))
                case 1: del data[place:place + int(random.integers(1, 30))]
                case 2: data[place:place] = data[max(0, place - 9):place]
                case _: del data[place:]
            if not data: break
        path.write_bytes(data)
        try: reader(path)
        except DataError as error:
            refused += 1
            assert 'table' in str(error), error
    assert 30 < refused < 300


# ---- preprocessing takes a table ----

def test_table_through_preprocessing(tmp_path, talking_face):
    "A clip knows what the corpus knew, words and rights included."
    shutil.copy(CLIPS/'syn01/syn01_c0.mp4', film(tmp_path/'grid/s1/bbaf2n.mpg'))
    text(tmp_path/'grid/s1/align/bbaf2n.align', '0 5000 sil\n5000 20000 bin\n20000 74500 sil\n')
    import_corpus('grid', tmp_path/'grid', tmp_path/'grid.jsonl')
    outcome = talking_face('preprocess', tmp_path/'grid.jsonl', '--out', tmp_path/'shards', '--size', 64, '--detector', 'dlib')
    assert outcome.code == 0, outcome
    (record,) = read_manifest(tmp_path/'shards').records
    clip = open_clip(record)
    assert (record.identity, record.source) == ('grid_s1', 'grid/s1/bbaf2n.mpg')
    facts = clip.info['facts']
    assert facts['sentence'] == 'bin blue at f two now' and facts['words'] == [dict(word='bin', start_s=0.2, end_s=0.8)] and facts['corpus'] == 'grid'
    assert clip.info['licence'].startswith('for research use')


# ---- the photographic samples, where they are ----

def test_real_grid(tmp_path):
    sources = import_corpus('grid', real('grid'), tmp_path/'grid.jsonl')
    assert len(sources) == 8 and not any(source.fault for source in sources)
    assert {source.path.stem: source.facts['sentence'] for source in sources}['id2_vcd_swwp2s'] == 'set white with p two soon'
    assert len({source.label.identity for source in sources}) == 8 and sum(source.facts['identity_known'] for source in sources) == 1
    again = read_sources(tmp_path/'grid.jsonl')
    assert [source[1:] for source in again] == [source[1:] for source in sources] and all(a.path.samefile(b.path) for a, b in zip(again, sources))


def test_real_clips(tmp_path):
    "The whole list, stills and sounds in it left out, with who is who and where it is from; the folder alone gives the same people."
    sources = import_corpus('csv', real('manifest.csv'), tmp_path/'clips.jsonl', columns='note=notes')
    clips = [source for source in sources if source.name.startswith('clips/')]
    assert len(clips) == 37 and len({source.label.identity for source in clips}) == 33 and not any(source.fault for source in sources)
    assert all(source.facts['licence'] for source in sources)
    assert [source[1:] for source in read_sources(tmp_path/'clips.jsonl')] == [source[1:] for source in sources]
    folder = import_corpus('folder', real('clips'))
    assert [(f'clips/{source.name}', source.label) for source in folder] == [(source.name, source.label) for source in clips]


def test_real_youtubers():
    sources = import_corpus('youtubers', real('youtubers'))
    assert Counter((source.label.identity, source.label.split) for source in sources) == {
        ('jaimealtozano', 'train'): 300, ('jaimealtozano', 'test'): 60, ('javiermuniz', 'train'): 300, ('javiermuniz', 'test'): 60}
    assert all(source.swap_red_blue and len(source.sounds) == 1 and not source.fault for source in sources)
    image = read_image(sources[0].pictures[0])[..., ::-1]
    assert np.median(image[..., 0].astype(int) - image[..., 2]) > 10                             # brown, not blue


def test_real_table_through_preprocessing(tmp_path, talking_face):
    table = tmp_path/'three.jsonl'
    sources = import_corpus('csv', real('manifest.csv'), columns='note=notes')
    write_sources(table, [source._replace(end_s=Fraction(1)) for source in sources if source.name in ('clips/id27/grid_bbaf2n.mp4', 'clips/id31/grid_lwbsza.mp4')])
    assert talking_face('preprocess', table, '--out', tmp_path/'shards', '--size', 64, '--detector', 'dlib').code == 0
    records = read_manifest(tmp_path/'shards').records
    assert {(record.identity, record.seconds) for record in records} == {('id27', 1.0), ('id31', 1.0)} and 'licence' in open_clip(records[0]).info
