"""What the tests of the whole way share: the command line in a process of its own, jobs that die on purpose, films made to order, an independent
reader of films.

Films are written and read with PyAV directly and sound is compared sample by sample: the package's own reader and writer are what is tested.
"""
import multiprocessing, os, re, resource, signal, subprocess, sys, time
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
COMMAND = Path(sys.executable).parent/'talking-face'
CLIPS, REAL = ROOT/'data/embedded/clips', ROOT/'../shared/data'
PROGRESS_LINE = re.compile(r'.+ \d+/\d+  \d+:\d\d.*')     # what Progress leaves where stderr is no terminal
MICRO = ['--model.image-size', '32', '--model.generator-downs', '2', '--model.generator-residuals', '1', '--model.embedding-size', '16',
         *(option for name in ('embedder-width', 'generator-width', 'generator-last', 'discriminator-width') for option in (f'--model.{name}', '4')),
         '--clips', '2', '--targets', '2', '--support', '1', '2', '--threads', '1', '--sample-every', '0']     # a step of it takes 20 ms
DLIB = ['--threads', 1, '--detector', 'dlib']
ADVERSARIAL = ['--losses.adversarial', '0.1', '--losses.feature-matching', '1', '--losses.match', '0.1']


def clip(identity: str, take: int = 0) -> Path:
    "An embedded clip: 75 frames of 256 x 256, 25 per second, 3 s, with sound."
    return CLIPS/identity/f'{identity}_c{take}.mp4'


def real(name: str) -> Path:
    "A file of the photographic sample data, which is not part of the repository."
    import pytest
    if not (REAL/name).exists(): pytest.skip(f'{name}: the photographic sample data is not here')
    return REAL/name


# ---- commands ----

class Outcome(NamedTuple):
    code: int
    output: str
    errors: str

    def messages(self) -> list[str]:
        "The lines on stderr that are not progress."
        return [line for line in self.errors.splitlines() if line and not PROGRESS_LINE.fullmatch(line)]


def environment() -> dict[str, str]:
    return os.environ | dict(OMP_NUM_THREADS='1', PYTHONUNBUFFERED='1')


def shell(*arguments: object) -> subprocess.Popen:
    "Start `talking-face ARGUMENTS` as a user would."
    return subprocess.Popen([COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell in the background makes its children ignore Ctrl-C


def finished(process: subprocess.Popen, timeout_s: float = 60) -> Outcome:
    try: output, errors = process.communicate(timeout=timeout_s)
    finally: process.kill()
    return Outcome(process.returncode, output, errors)


def everything_in(folder: Path) -> dict[str, bytes]:
    "All files below a folder, hidden ones too, with their content; folders as empty content."
    return {str(path.relative_to(folder)) + '/' * path.is_dir(): b'' if path.is_dir() else path.read_bytes() for path in sorted(folder.rglob('*'))}


# ---- jobs that can be hurt: forked from a server that has torch loaded, so that a start takes no seconds ----

def die_before(name: str, number: int, counted: str) -> None:
    "Kill this process, without any clearing up, before call `number` (from 0) of os.NAME, `replace` or `unlink`, for a path that contains `counted`."
    original, seen = getattr(os, name), []
    def call(*paths: os.PathLike, **options: object) -> None:
        if counted in str(paths[-1]):
            if len(seen) == number: os.kill(os.getpid(), signal.SIGKILL)
            seen.append(paths)
        original(*paths, **options)
    setattr(os, name, call)


def limit_file_size(size: int) -> None:
    "From now on no file of this process can grow beyond `size` bytes: what a full disk does, for one. Python ignores the signal: writing fails."
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _work(arguments: list[str], log: Path, prepare: Callable | None, details: tuple) -> None:
    with open(f'{log}.out', 'w') as out, open(f'{log}.err', 'w') as err: os.dup2(out.fileno(), 1); os.dup2(err.fileno(), 2)
    import torch
    from talking_face.app.cli import main
    torch.set_num_threads(1)
    if prepare: prepare(*details)
    raise SystemExit(main(arguments))


class Job:
    "A command in a forked process; its output goes to LOG.out and LOG.err."
    def __init__(self, log: Path, *arguments: object, prepare: Callable | None = None, details: tuple = ()):
        context = multiprocessing.get_context('forkserver')
        ours = [f'talking_face.{name}' for name in ('app.cli', 'few_shot.meta_learning', 'few_shot.reenactment')]
        context.set_forkserver_preload(['torch._dynamo', *ours])     # the first optimiser would load it, which takes a second
        before = os.environ.get('OMP_NUM_THREADS')
        os.environ['OMP_NUM_THREADS'] = '1'     # for the server, which this starts the first time: threads do not survive a fork
        self.log, self.process = log, context.Process(target=_work, args=([str(argument) for argument in arguments], log, prepare, details))
        self.process.start()
        if before is None: del os.environ['OMP_NUM_THREADS']
        else: os.environ['OMP_NUM_THREADS'] = before

    def outcome(self, timeout_s: float = 60) -> Outcome:
        self.process.join(timeout_s)
        if self.process.is_alive(): self.kill(); raise AssertionError(f'still at work after {timeout_s} s, see {self.log}.err')
        return Outcome(self.process.exitcode, *(Path(f'{self.log}.{end}').read_text() for end in ('out', 'err')))

    def kill(self) -> int:
        "kill -9; returns the exit code, -9 unless it was done already."
        self.process.kill(); self.process.join()
        return self.process.exitcode


def wait_for(condition: Callable[[], object], alive: Callable[[], bool], timeout_s: float = 60) -> None:
    "Wait until `condition()` is true; an error if the process ends before."
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert alive() and time.monotonic() < deadline, 'it ended, or took too long, before the moment came'
        time.sleep(0.002)


# ---- films ----

def frames_of(path: Path, count: int | None = None, size: int | None = None) -> list[np.ndarray]:
    "The first `count` frames of a film (H, W, 3), shrunk to `size` if given."
    frames = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            if len(frames) == count: break
            frames.append(frame.to_ndarray(format='rgb24', **dict(width=size, height=size) if size else {}))
    return frames


def speech(duration_s: float, rate_hz: int = 16000) -> np.ndarray:
    "Sound that can be aligned: noise in syllables of changing loudness."
    random, count = np.random.default_rng(5), int(duration_s * rate_hz)
    loudness = np.repeat(random.uniform(0, .4, count // 1000 + 1), 1000)[:count]
    return (loudness * random.normal(size=count).clip(-2, 2) / 2).astype(np.float32)


def make_film(path: Path, frames: Iterable[np.ndarray], fps: int = 25, milliseconds: list[int] | None = None, sound: np.ndarray | None = None,
              faststart: bool = False) -> Path:
    "An H.264 film; `milliseconds`: the frames' own time stamps; `sound`: mono at 16 kHz; `frames` may be empty."
    with av.open(str(path), 'w', options={'movflags': '+faststart'} if faststart else {}) as container:
        video, audio = None, None
        if sound is not None: audio = container.add_stream('aac', rate=16000, layout='mono')
        for number, image in enumerate(frames):
            if video is None:
                video = container.add_stream('libx264', rate=fps, options={'crf': '18', 'preset': 'veryfast', 'bf': '0'})
                video.height, video.width, video.pix_fmt = *image.shape[:2], 'yuv420p'
                video.codec_context.time_base = Fraction(1, 1000) if milliseconds else Fraction(1, fps)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), 'rgb24')
            frame.pts, frame.time_base = milliseconds[number] if milliseconds else number, video.codec_context.time_base
            container.mux(video.encode(frame))
        if video is not None: container.mux(video.encode(None))
        if audio is not None:
            block = av.AudioFrame.from_ndarray(sound[None], 'fltp', 'mono')
            block.sample_rate, block.pts, block.time_base = 16000, 0, Fraction(1, 16000)
            container.mux(audio.encode(block)); container.mux(audio.encode(None))
    return path


class Film(NamedTuple):
    "What a player would make of a file."
    codec: str
    pixels: str
    width: int
    height: int
    rate: Fraction
    times_s: list[Fraction]   # of the frames, from the first
    video_s: float            # until the last frame disappears
    sound: np.ndarray         # (S,) at 16 kHz, mono, from the first frame on; empty without sound


def watch(path: Path) -> Film:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stamps = [frame.pts for frame in container.decode(stream)]
        times = [(stamp - stamps[0]) * stream.time_base for stamp in stamps]
        codec, start_s, end_s = stream.codec_context, stamps[0] * stream.time_base, stream.duration * stream.time_base
        film = codec.name, codec.pix_fmt, stream.width, stream.height, stream.average_rate, times, float(end_s)
    return Film(*film, hear(path, start_s))


def hear(path: Path, start_s: Fraction) -> np.ndarray:
    "The sound of a file from `start_s` on: every decoded piece at its own time."
    sound = np.zeros(0, np.float32)
    with av.open(str(path)) as container:
        if not container.streams.audio: return sound
        resampler = av.AudioResampler('fltp', 'mono', 16000)
        for frame in container.decode(audio=0):
            for piece in resampler.resample(frame):
                samples, place = piece.to_ndarray()[0], round((piece.pts * piece.time_base - start_s) * 16000)
                sound = np.pad(sound, (0, max(0, place + len(samples) - len(sound))))
                if place + len(samples) > 0: sound[max(0, place):place + len(samples)] = samples[max(0, -place):]
    return sound


def lag_and_likeness(first: np.ndarray, second: np.ndarray, reach: int = 4000) -> tuple[int, float]:
    "How many samples `second` comes later than `first`, and their correlation there; looked for within +-0.25 s."
    count = min(len(first), len(second))
    spectrum = np.fft.rfft(first[:count], 2 * count).conj() * np.fft.rfft(second[:count], 2 * count)
    products = np.fft.irfft(spectrum)
    lags = np.arange(-reach, reach + 1)
    best = int(lags[np.argmax(products[lags])])
    return best, float(products[best] / np.sqrt((first[:count] ** 2).sum() * (second[:count] ** 2).sum()))
