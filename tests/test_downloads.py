"""Downloads against a local server that misbehaves: what is fetched is whole, what is gone is known, and a kill costs the film on the way."""
import functools, http.server, json, re, subprocess, sys, threading, types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from helpers import clip, environment, make_film, wait_for
from talking_face.core import ConfigError, DataError
from talking_face.data import downloads
from talking_face.data.corpora import import_corpus
from talking_face.data.downloads import DownloadTable, FetchFault, download_videos, fetch_http, fetch_youtube, mark_faceless, plan_downloads

FILM = clip('syn01').read_bytes()
PAGE = b'<!doctype html><title>Before you continue</title>'.ljust(3000)
NAMES = [f'film{number:07d}' for number in range(12)]


class Site:
    "A server on this machine. `answers`: path -> what to do, one after the other, the last for ever; `asked`: the paths in order."

    def __init__(self):
        self.answers, self.asked, self.half_way, self.go_on = {}, [], threading.Event(), threading.Event()
        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Visit, self))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f'http://127.0.0.1:{self.server.server_port}/{{}}'

    def close(self) -> None: self.go_on.set(); self.server.shutdown(); self.server.server_close()


class Visit(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def __init__(self, site: Site, *arguments): self.site = site; super().__init__(*arguments)

    def log_message(self, *arguments) -> None: pass

    def do_GET(self) -> None:
        name = self.path[1:]
        self.site.asked.append(name)
        answers = self.site.answers.get(name, ['404'])
        do = answers.pop(0) if len(answers) > 1 else answers[0]
        self.close_connection = True
        if do.split()[0].isdigit():
            self.send_response(int(do.split()[0]))
            if len(do.split()) > 1: self.send_header('Retry-After', do.split()[1])
            return self.end_headers()
        self.send_response(200)
        body = {'page': PAGE}.get(do, FILM)
        if do == 'chunks cut': self.send_header('Transfer-Encoding', 'chunked')
        elif do not in ('endless', 'endless cut'): self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if do == 'chunks cut': self.wfile.write(b'%x\r\n' % len(body) + body[:9000])
        elif do in ('cut', 'endless cut'): self.wfile.write(body[:-700])
        elif do == 'hang':
            self.wfile.write(body[:len(body) // 2]); self.wfile.flush()
            self.site.half_way.set(); self.site.go_on.wait(30)
        else: self.wfile.write(body)


@pytest.fixture
def site() -> Iterator[Site]:
    server = Site()
    yield server
    server.close()


def fetch_all(folder: Path, site: Site, names: list[str] = NAMES, **options):
    return download_videos(names, folder, fetch_http, site.address, **dict(sleep=lambda seconds: None) | options)


def files(folder: Path) -> dict[str, bytes]:
    "What is there, but the table and its lock."
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name not in ('downloads.jsonl', '.downloads.lock')}


# ---- what a site can do ----

def test_every_answer(tmp_path, site):
    "Each fault once, then the film: everything that can be had is there, whole; each was asked as often as it must be."
    faults = ['cut', 'chunks cut', 'endless cut', 'page', '503', '500', '429 1', '403', '302']
    site.answers = {name: [fault, 'film'] for name, fault in zip(NAMES, faults)} | {NAMES[9]: ['410'], NAMES[10]: ['endless'], NAMES[11]: ['451']}
    report = fetch_all(tmp_path, site)
    assert report.states == {'done': 10, 'gone': 2} and (report.tried, report.fetched) == (12, 10)
    assert files(tmp_path) == {f'{name}.mp4': FILM for name in [*NAMES[:9], NAMES[10]]}
    assert Counter(site.asked) == {name: 2 if name in NAMES[:9] else 1 for name in NAMES}
    assert fetch_all(tmp_path, site).tried == 0 and len(site.asked) == 21                            # nothing is asked for again


def test_never_gets_through(tmp_path, site):
    "Bounded tries; the reason is noted; another day it is tried again, and then it works."
    site.answers = {NAMES[0]: ['cut'], NAMES[1]: ['page'], NAMES[2]: ['film']}
    assert fetch_all(tmp_path, site, NAMES[:3], attempts=4).states == {'todo': 2, 'done': 1} and len(site.asked) == 9
    with DownloadTable(tmp_path) as table:
        assert re.search(r'\d+ of \d+ bytes came', table.rows[NAMES[0]]['error']) and 'no whole video' in table.rows[NAMES[1]]['error']
        assert table.rows[NAMES[0]]['attempts'] == 4
    site.answers = dict.fromkeys(NAMES[:3], ['film'])
    assert fetch_all(tmp_path, site, NAMES[:3]).states == {'done': 3} and list(files(tmp_path)) == [f'{name}.mp4' for name in NAMES[:3]]


def test_pauses_double_and_follow_the_site(tmp_path, site):
    site.answers, pauses = {NAMES[0]: ['503', '503 25', '503 9999', '503']}, []
    fetch_all(tmp_path, site, NAMES[:1], attempts=5, pause_s=10, sleep=pauses.append)
    assert pauses == [10, 25, 600, 80]


def test_site_that_closes_its_door(tmp_path, site):
    "A run of failures ends the run, nothing is taken for gone, and the successes before are kept; successes in between start the count anew."
    site.answers = dict.fromkeys(NAMES, ['429']) | dict.fromkeys((NAMES[0], NAMES[4]), ['film'])
    with pytest.raises(DataError, match='5 videos in a row.*429'): fetch_all(tmp_path, site, give_up=5, attempts=2)
    assert len(site.asked) == 2 + 2 * 8
    with DownloadTable(tmp_path) as table: assert Counter(map(table.state, NAMES)) == dict(done=2, todo=10)
    site.close()
    with pytest.raises(DataError, match='3 videos in a row.*refused'): fetch_all(tmp_path, site, give_up=3, attempts=1)


def test_silent_and_dripping_sites(tmp_path, site):
    "Neither a site that stops speaking nor one that speaks too slowly holds a run for ever."
    site.answers = {'a': ['hang'], 'b': ['film']}
    with pytest.raises(FetchFault, match='timed out'): fetch_http(site.address.format('a'), tmp_path/'a', timeout_s=0.3)
    with pytest.raises(FetchFault, match='not finished after 0 s'): fetch_http(site.address.format('b'), tmp_path/'b', total_s=0.0)


def test_limit_goes_on_where_it_ended(tmp_path, site):
    site.answers = dict.fromkeys(NAMES, ['film'])
    for done in (5, 10, 12): assert fetch_all(tmp_path, site, limit=5).states.get('done') == done
    assert site.asked == NAMES


def test_disk_decides(tmp_path, site):
    "A film that somebody put there is done, one that somebody removed is to do, a lost table is found again; other containers count, too."
    site.answers = dict.fromkeys(NAMES, ['film'])
    (tmp_path/f'{NAMES[0]}.webm').write_bytes(FILM)
    fetch_all(tmp_path, site, NAMES[:4])
    assert site.asked == NAMES[1:4]
    (tmp_path/f'{NAMES[2]}.mp4').unlink(); (tmp_path/'downloads.jsonl').unlink()
    assert fetch_all(tmp_path, site, NAMES[:4]).states == {'done': 4} and site.asked[3:] == [NAMES[2]]


# ---- kills, locks, full disks ----

RUN = '''
import sys
from talking_face.data.downloads import download_videos, fetch_http
download_videos(sys.argv[3:], sys.argv[1], fetch_http, sys.argv[2], sleep=lambda seconds: None)
'''


def start(folder: Path, site: Site) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, '-c', RUN, folder, site.address, *NAMES], env=environment(), stderr=subprocess.PIPE, text=True)


def test_killed_again_and_again(tmp_path, site):
    "kill -9 in the middle of four films: the outcome is that of an undisturbed run, and each kill costs one request more."
    hurt = [NAMES[number] for number in (0, 3, 4, 11)]
    site.answers = {name: ['hang', 'film'] if name in hurt else ['film'] for name in NAMES}
    for _ in hurt:
        job = start(tmp_path, site)
        wait_for(site.half_way.is_set, lambda: job.poll() is None)
        with pytest.raises(DataError, match='another process'): fetch_all(tmp_path, site)           # and nobody else may write here meanwhile
        job.kill(); job.wait()
        assert any(path.name.endswith('.partial') for path in tmp_path.iterdir()) and all(path.read_bytes() == FILM for path in tmp_path.glob('*.mp4'))
        site.half_way.clear()
    job = start(tmp_path, site)
    assert job.wait(30) == 0, job.stderr.read()
    assert files(tmp_path) == {f'{name}.mp4': FILM for name in NAMES} and Counter(site.asked) == {name: 2 if name in hurt else 1 for name in NAMES}
    rows = [json.loads(line) for line in (tmp_path/'downloads.jsonl').read_text().splitlines()]
    assert [row['video'] for row in rows] == NAMES and {row['state'] for row in rows} == {'done'}


@pytest.mark.parametrize('moment', ['before the name', 'before the line', 'within the line'])
def test_killed_at_the_worst_moments(tmp_path, site, moment, monkeypatch):
    "Between the film and its line, and within the line."
    site.answers = dict.fromkeys(NAMES, ['film'])
    class Killed(BaseException): pass
    def die(*arguments, **facts): raise Killed
    with monkeypatch.context() as patched:
        if moment == 'before the name': patched.setattr(downloads.os, 'replace', die)
        else: patched.setattr(DownloadTable, 'set', die)
        with pytest.raises(Killed): fetch_all(tmp_path, site, NAMES[:1])
    if moment == 'within the line': (tmp_path/'downloads.jsonl').write_bytes(f'{{"video": "{NAMES[0]}", "sta'.encode())
    assert fetch_all(tmp_path, site, NAMES[:2]).states == {'done': 2}
    assert len(site.asked) == (3 if moment == 'before the name' else 2) and files(tmp_path) == {f'{name}.mp4': FILM for name in NAMES[:2]}
    assert [json.loads(line)['state'] for line in (tmp_path/'downloads.jsonl').read_text().splitlines()] == ['done'] * 2


def test_full_disk(tmp_path, site):
    "The run ends and says why; what was there stays there; with space again the rest follows."
    site.answers = dict.fromkeys(NAMES, ['film'])
    fetch_all(tmp_path, site, limit=2)
    limited = f'import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, ({len(FILM) // 2},) * 2)'
    outcome = subprocess.run([sys.executable, '-c', limited + RUN, tmp_path, site.address, *NAMES], env=environment(), capture_output=True, text=True, timeout=60)
    assert outcome.returncode == 1 and re.search(r'DataError: .*cannot be written \(File too large\); check the free space', outcome.stderr)
    assert list(files(tmp_path)) == [f'{name}.mp4' for name in NAMES[:2]] and fetch_all(tmp_path, site).states == {'done': 12}


def test_table_that_cannot_be_written(tmp_path, site, monkeypatch):
    site.answers = dict.fromkeys(NAMES, ['film'])
    with monkeypatch.context() as patched:
        def refuse(*arguments):
            if sys._getframe(1).f_code.co_name == 'set': raise OSError(28, 'No space left on device')
        patched.setattr(downloads.os, 'fsync', refuse)
        with pytest.raises(DataError, match='downloads.jsonl: cannot be written'): fetch_all(tmp_path, site, NAMES[:1])
    assert fetch_all(tmp_path, site, NAMES[:1]).states == {'done': 1}
    (tmp_path/'file').write_text('')
    with pytest.raises(DataError, match='cannot be written'): DownloadTable(tmp_path/'file')


@pytest.mark.parametrize('content', ['{"video": "a"}\n', 'nonsense\n', '[1]\n', '{"video": "a", "state": "lost"}\n'])
def test_damaged_table(tmp_path, content):
    (tmp_path/'downloads.jsonl').write_text(content)
    with pytest.raises(DataError, match='downloads.jsonl.*delete it'): DownloadTable(tmp_path)
    assert (tmp_path/'downloads.jsonl').read_text() == content
    (tmp_path/'downloads.jsonl').unlink()
    DownloadTable(tmp_path).__exit__()                                                               # the refusal left no lock behind


def test_table_stays_small(tmp_path):
    "However often states change: at each start at most two lines for every video and a hundred more; and nothing is lost by writing it anew."
    expected = {}
    for round_ in range(3):
        with DownloadTable(tmp_path) as table:
            assert table.rows == expected
            assert len(table.path.read_text().splitlines()) <= 2 * max(1, len(expected)) + 100
            for number in range(150): table.set(f'v{number % 20}', 'todo', attempts=round_ * 150 + number)
            expected = dict(table.rows)


# ---- YouTube, by a stand-in for yt-dlp ----

@pytest.fixture
def yt_dlp(monkeypatch) -> types.ModuleType:
    "A module with the few names that are used of yt-dlp; `module.behave(url, options)` is what a download does."
    module = types.ModuleType('yt_dlp')
    module.utils = types.SimpleNamespace(YoutubeDLError=type('YoutubeDLError', (Exception,), {}))
    class YoutubeDL:
        def __init__(self, options): self.options = options
        def __enter__(self): return self
        def __exit__(self, *exception): pass
        def download(self, urls):
            for url in urls: module.behave(url, self.options)
    module.YoutubeDL = YoutubeDL
    monkeypatch.setitem(sys.modules, 'yt_dlp', module)
    return module


def test_youtube(tmp_path, yt_dlp):
    "Gone, for now, and there; the file goes where it is told, whatever is in its name; a downloader that wrote nothing did not succeed."
    says = {NAMES[0]: '\x1b[0;31mERROR:\x1b[0m [youtube] a: Private video. Sign in if you have been granted access',
            NAMES[1]: 'ERROR: [youtube] b: Sign in to confirm you\u2019re not a bot'}
    seen = []
    def behave(url, options):
        name = url.removeprefix('https://www.youtube.com/watch?v=')
        seen.append(name)
        if name in says: raise yt_dlp.utils.YoutubeDLError(says[name])
        if name != NAMES[2]: Path(options['outtmpl'] % {}).write_bytes(FILM)
    yt_dlp.behave = behave
    report = download_videos(NAMES[:4], tmp_path/'50% {done}', sleep=lambda seconds: None)
    assert report.states == {'todo': 2, 'done': 1, 'gone': 1} and seen == [NAMES[0], *[NAMES[1]] * 3, *[NAMES[2]] * 3, NAMES[3]]
    with DownloadTable(tmp_path/'50% {done}') as table: assert table.rows[NAMES[0]]['error'] == '[youtube] a: Private video. Sign in if you have been granted access'
    assert files(tmp_path/'50% {done}') == {f'{NAMES[3]}.mp4': FILM}


def test_youtube_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'yt_dlp', None)
    with pytest.raises(ConfigError, match='pip install yt-dlp'): download_videos(NAMES, tmp_path)
    assert files(tmp_path) == {}


# ---- from the texts of a corpus to the note that a film is useless ----

def test_from_texts_to_faceless(tmp_path, site, talking_face, monkeypatch):
    "Plan, fetch, import, preprocess, note: the film without a face is not fetched again, the others stay."
    root, landscape = tmp_path/'vox', make_film(tmp_path/'landscape.mp4', [np.full((120, 160, 3), 20 * number, np.uint8) for number in range(10)])
    names = ['film-a-face', 'film-a-hill', 'is-gone-now']
    rows = ''.join(f'{frame:06d} \t0.05 \t0.05 \t0.9 \t0.9 \n' for frame in range(10))
    for name in names:
        (root/f'txt/id00012/{name}').mkdir(parents=True)
        (root/f'txt/id00012/{name}/00001.txt').write_text(f'Identity  : \tid00012\nReference : \t{name}\n\nFRAME \tX \tY \tW \tH \n{rows}')
    (root/'vox2_meta.csv').write_text('VoxCeleb2 ID ,VGGFace2 ID ,Gender ,Set \nid00012 ,n000012 ,m ,dev \n')
    assert plan_downloads(root) == sorted(names)
    site.answers = {names[0]: ['film'], names[1]: ['film']}
    def fetch(url: str, path: Path) -> None:
        fetch_http(url, path)
        if url.endswith(names[1]): path.write_bytes(landscape.read_bytes())
    def run(): return download_videos(plan_downloads(root), root/'videos', fetch, site.address, sleep=lambda seconds: None)
    assert run().states == {'done': 2, 'gone': 1}
    sources = import_corpus('voxceleb2', root, root/'table.jsonl')
    assert talking_face('preprocess', root/'table.jsonl', '--out', tmp_path/'shards', '--size', 64, '--detector', 'dlib').code == 0
    assert mark_faceless(root/'videos', sources, tmp_path/'shards') == [names[1]]
    (root/f'videos/{names[1]}.mp4').unlink()
    assert run().states == {'done': 1, 'gone': 1, 'no face': 1} and site.asked.count(names[1]) == 1
    with pytest.raises(DataError, match='no manifest'): mark_faceless(root/'videos', sources, root)
