"""Small files for the tests of media, sound and recording, made with PyAV directly and not with the package's own writer."""
import os, subprocess, sys, textwrap
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av, numpy as np, pytest

from talking_face.core import MediaError

CLIP = Path('data/embedded/clips/syn02/syn02_c0.mp4')
SHARED = Path('../shared/data')
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason='the shared development clips are not here')


def picture(number, height=48, width=64):
    "A grey frame with a bright square that moves with the number, and four coloured corners."
    image = np.full((height, width, 3), 90, np.uint8)
    image[:12, :12], image[:12, -12:], image[-12:, :12], image[-12:, -12:] = (220, 30, 30), (30, 220, 30), (30, 30, 220), (220, 220, 30)
    x = 16 + number % 24
    image[20:28, x:x + 8] = 250
    return image


def make(path, frames=50, rate=25, codec='libx264', video_start=0.0, audio=None, audio_codec='aac', audio_start=0.0, rotation=None,
         pts=None, options=None, audio_rate=44100, channels=1, **container_options):
    "A small file written with PyAV directly, independent of VideoWriter. `audio`: (channels, samples)."
    with av.open(str(path), 'w', **container_options) as container:
        video = container.add_stream(codec, rate=rate, options=options or {})
        video.width, video.height, video.pix_fmt = 64, 48, 'yuv420p'
        tick = Fraction(1, 90000) if pts is not None or video_start else 1 / Fraction(rate)
        if codec != 'mpeg4' and codec != 'mpeg2video': video.codec_context.time_base = tick
        else: tick = 1 / Fraction(rate)
        if rotation: video.set_display_rotation(*rotation)
        if audio is not None:
            sound = container.add_stream(audio_codec, rate=audio_rate, layout={1: 'mono', 2: 'stereo', 6: '5.1'}[channels])
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number), 'rgb24')
            seconds = pts[number] if pts is not None else Fraction(number) / Fraction(rate) + Fraction(video_start)
            frame.pts, frame.time_base = round(seconds / tick), tick
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None:
            block = av.AudioFrame.from_ndarray(np.ascontiguousarray(audio.astype(np.float32)), 'fltp', sound.layout.name)
            block.sample_rate, block.pts, block.time_base = audio_rate, round(audio_start * audio_rate), Fraction(1, audio_rate)
            container.mux(sound.encode(block))
            container.mux(sound.encode(None))
    return path


def click_track(seconds, at, rate=44100, channels=1):
    "A short burst (2 ms of 3 kHz) at the time `at`, else silence."
    track = np.zeros((channels, round(seconds * rate)))
    burst = np.sin(2 * np.pi * 3000 * np.arange(rate // 500) / rate) * np.hanning(rate // 500)
    start = round(at * rate) - len(burst) // 2
    track[:, start:start + len(burst)] = 0.8 * burst
    return track


def click_time(samples, rate=16000):
    "The centre of gravity of the sound's energy near its peak, seconds."
    energy = samples.astype(float) ** 2
    peak = int(energy.argmax())
    window = slice(max(0, peak - 80), peak + 81)
    assert energy[peak] > 0.02, 'the click is gone'
    return float((np.arange(len(samples))[window] * energy[window]).sum() / energy[window].sum() / rate)


def message(path: Path, action: Callable) -> str:
    "The sentence with which `action(path)` is refused: one line that names the file."
    with pytest.raises(MediaError) as caught: action(path)
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def run(code: str, *arguments) -> subprocess.CompletedProcess:
    "Run `code` in a Python of its own."
    return subprocess.run([sys.executable, '-c', textwrap.dedent(code), *map(str, arguments)], capture_output=True, text=True, timeout=60,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})
