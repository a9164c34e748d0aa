"""Sound and recording: alignment, formats, exact times, faults while writing, memory."""
import os
from fractions import Fraction

import av, numpy as np, pytest

from made_clips import CLIP, SHARED, click_time, click_track, make, message, needs_shared, picture, run
from talking_face.core import MediaError
from talking_face.signals.media import iterate_video, list_media, probe_video
from talking_face.signals.recording import VideoWriter
from talking_face.signals.sound import read_audio, write_audio


# ---------------------------------------------------------------- sound

@pytest.mark.parametrize('suffix, codec, rate', [('.mp4', 'aac', 44100), ('.mov', 'pcm_s16le', 44100), ('.mkv', 'libopus', 48000), ('.mkv', 'flac', 44100),
                                                ('.mp4', 'libmp3lame', 44100), ('.ts', 'aac', 48000), ('.avi', 'pcm_s16le', 22050), ('.mkv', 'pcm_s16le', 11111)])
@pytest.mark.parametrize('video_start, audio_start', [(0.0, 0.0), (0.2, 0.0), (0.0, 0.3)])
def test_click_stays_in_place(tmp_path, suffix, codec, rate, video_start, audio_start):
    "A click one second after the first picture is there after reading, and again after writing with the sound copied or encoded anew."
    if suffix == '.avi' and (video_start or audio_start): pytest.skip('AVI has no start times')
    at = 1.0 + video_start - audio_start
    path = make(tmp_path/f'in{suffix}', 50, codec='mpeg4' if suffix == '.avi' else 'libx264', video_start=video_start, audio_codec=codec,
                audio=click_track(2.2, at, rate), audio_start=audio_start, audio_rate=rate)
    assert abs(click_time(read_audio(path)) - 1.0) < 0.0015
    with VideoWriter(tmp_path/'out.mp4', 25, audio_from=path) as writer:
        for frame in iterate_video(path): writer.write(frame.image, frame.time_s)
    with av.open(str(tmp_path/'out.mp4')) as container: assert container.streams.audio[0].codec_context.name == 'aac'
    sound = read_audio(tmp_path/'out.mp4')
    assert abs(click_time(sound) - 1.0) < 0.0015
    assert probe_video(tmp_path/'out.mp4').duration_s == 2.0 and len(sound) / 16000 <= 2.07


def test_sound_formats(tmp_path):
    rng = np.random.default_rng(0)
    loud = click_track(1.0, 0.5, 48000, 6) + 1e-3 * rng.standard_normal((6, 48000))
    for name, options in {'surround.mkv': dict(audio=loud, audio_codec='flac', channels=6, audio_rate=48000),
                          'stereo.mp4': dict(audio=click_track(1.0, 0.5, channels=2), channels=2),
                          'fragments.mp4': dict(audio=click_track(1.0, 0.5), options_=None)}.items():
        options.pop('options_', None)
        if name.startswith('frag'): options['container_options'] = {'movflags': 'frag_keyframe+empty_moov'}
        samples = read_audio(make(tmp_path/name, 25, **options))
        assert abs(click_time(samples) - 0.5) < 0.0015 and abs(len(samples) / 16000 - 1) < 0.05 and np.abs(samples).max() <= 1


def test_opposite_channels_cancel_and_equal_ones_keep_their_level(tmp_path):
    tone = 0.5 * np.sin(2 * np.pi * 500 * np.arange(44100) / 44100)
    for sign, level in ((1, 0.5), (-1, 0.0)):
        samples = read_audio(make(tmp_path/'two.mkv', 25, audio=np.stack([tone, sign * tone]), channels=2, audio_codec='flac'))
        assert abs(np.abs(samples[2000:-2000]).max() - level) < 0.01


def test_hole_in_the_sound_becomes_silence(tmp_path):
    path = tmp_path/'hole.mkv'
    with av.open(str(path), 'w') as container:
        sound = container.add_stream('pcm_s16le', rate=16000, layout='mono')
        for start, level in ((0, 8000), (32000, 16000)):          # half a second, a hole of 1.5 s, half a second
            frame = av.AudioFrame.from_ndarray(np.full((1, 8000), level, np.int16), 's16', 'mono')
            frame.sample_rate, frame.pts, frame.time_base = 16000, start, Fraction(1, 16000)
            container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    samples = read_audio(path)
    assert len(samples) == 40000 and np.allclose(samples[[4000, 20000, 36000]], [8000 / 32768, 0, 16000 / 32768], atol=1e-4)


def test_no_sound(tmp_path):
    silent = make(tmp_path/'silent.mp4', 10)
    with pytest.raises(MediaError, match='silent.mp4: has no sound'): read_audio(silent)
    with VideoWriter(tmp_path/'out.mp4', 25, audio_from=silent) as writer: writer.write(picture(0))
    assert not probe_video(tmp_path/'out.mp4').has_audio
    with pytest.raises(MediaError, match='no such file'):
        with VideoWriter(tmp_path/'other.mp4', 25, audio_from=tmp_path/'absent.wav'): pass
    assert sorted(os.listdir(tmp_path)) == ['out.mp4', 'silent.mp4']


def test_sound_from_a_wav(tmp_path):
    write_audio(tmp_path/'speech.wav', click_track(5.0, 0.7, 16000)[0], 16000)
    with VideoWriter(tmp_path/'out.mp4', Fraction(30000, 1001), audio_from=tmp_path/'speech.wav') as writer:
        for number in range(45): writer.write(picture(number))
    samples = read_audio(tmp_path/'out.mp4')
    assert abs(click_time(samples) - 0.7) < 0.0015 and abs(len(samples) / 16000 - 45 * 1001 / 30000) < 0.001
    data = (tmp_path/'speech.wav').read_bytes()
    (tmp_path/'cut.wav').write_bytes(data[:len(data) // 2])
    with pytest.raises(MediaError, match='cut.wav: is cut off'): read_audio(tmp_path/'cut.wav')


@needs_shared
def test_reenactment_keeps_count_rate_duration_and_sound_of_a_variable_rate_driver(tmp_path):
    driver = SHARED/'raw/vr_face1.mp4'
    before = probe_video(driver)
    with VideoWriter(tmp_path/'out.mp4', before.fps, audio_from=driver) as writer:
        for frame in iterate_video(driver): writer.write(frame.image[::8, ::8], frame.time_s)
    after = probe_video(tmp_path/'out.mp4')
    assert after[3:] == before[3:]
    assert [frame.time_s for frame in iterate_video(tmp_path/'out.mp4')] == [frame.time_s for frame in iterate_video(driver)]
    old, new = read_audio(driver), read_audio(tmp_path/'out.mp4')
    assert np.abs(new[:90000] - old[:90000]).max() < 1e-3 and np.abs(old).max() > 0.05   # copied packets, moved by 33 ms like the pictures
    assert abs(len(new) / 16000 - min(after.duration_s, len(old) / 16000)) < 0.03


def test_damaged_sound(tmp_path):
    "A bad packet is silence, many are an error; a writer that meets them while encoding leaves nothing."
    source = make(tmp_path/'driver.mov', 50, audio=click_track(2, 1), audio_codec='alac')
    with av.open(str(source)) as container: places = [(packet.pos, packet.size) for packet in container.demux(audio=0) if packet.size]
    for bad in (1, 20):
        data = bytearray(source.read_bytes())
        for position, size in places[5:5 + bad]: data[position:position + size] = b'\x55' * size
        source.write_bytes(data)
        if bad == 1: assert abs(click_time(read_audio(source)) - 1) < 0.0015
    assert 'sound is damaged' in message(source, read_audio)
    with pytest.raises(MediaError, match='driver.mov: its sound is damaged'):
        with VideoWriter(tmp_path/'out.mp4', 25, audio_from=source) as writer:
            for number in range(50): writer.write(picture(number))
    assert os.listdir(tmp_path) == ['driver.mov']


# ---------------------------------------------------------------- writing

@pytest.mark.parametrize('limit', [0, 100, 5_000, 20_000, 'exact'])
def test_full_disk_leaves_nothing(tmp_path, limit):
    "A limit on the file size stands in for a full disk: writes fail in the header, in the middle, or when the index is moved to the front."
    code = '''
        import resource, signal, sys, numpy as np
        from talking_face.core import MediaError
        from talking_face.signals.recording import VideoWriter
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        path, limit = sys.argv[1], int(sys.argv[2])
        if limit >= 0: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        random = np.random.default_rng(0)
        try:
            with VideoWriter(path, 25) as writer:
                for _ in range(20): writer.write(random.integers(0, 255, (64, 64, 3), np.uint8))
        except MediaError as error: print('MediaError', error)
        else: print('written')
    '''
    folder = tmp_path/'out'
    if limit == 'exact':  # everything fits but the last bytes
        assert run(code, folder/'clip.mp4', -1).stdout.strip() == 'written'
        limit = (folder/'clip.mp4').stat().st_size - 1
        (folder/'clip.mp4').unlink()
    result = run(code, folder/'clip.mp4', limit)
    assert result.stdout.startswith('MediaError') and 'clip.mp4' in result.stdout and 'free space' in result.stdout, result
    assert list(folder.iterdir()) == []


def test_an_exception_keeps_the_older_file(tmp_path):
    path = tmp_path/'clip.mp4'
    path.write_bytes(b'older')
    for fault in (KeyboardInterrupt, RuntimeError, GeneratorExit):
        with pytest.raises(fault):
            with VideoWriter(path, 25, audio_from=CLIP) as writer:
                for number in range(60): writer.write(picture(number))
                raise fault
        assert os.listdir(tmp_path) == ['clip.mp4'] and path.read_bytes() == b'older'


def test_wrong_use(tmp_path):
    with pytest.raises(MediaError, match='mp4'): VideoWriter(tmp_path/'clip.gif', 25)
    with pytest.raises(ValueError, match='crf'): VideoWriter(tmp_path/'clip.mp4', 25, crf=60)
    bad = [(picture(0).astype(float), None), (picture(0)[..., 0], None), (picture(0)[:20], None), (picture(0), Fraction(1))]
    for image, time_s in bad:
        with pytest.raises(ValueError):
            with VideoWriter(tmp_path/'clip.mp4', 25) as writer: writer.write(picture(0)); writer.write(image, time_s)
    for times in ((0, 0), (Fraction(1, 25), Fraction(2, 25)), (0, 1, Fraction(1, 2))):
        with pytest.raises(ValueError, match='times must start at 0 and grow'):
            with VideoWriter(tmp_path/'clip.mp4', 25) as writer:
                for number, time_s in enumerate(times): writer.write(picture(number), time_s)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('rate', [Fraction(25), Fraction(30000, 1001), Fraction(1350, 61), Fraction(12, 1), Fraction(7)])
@pytest.mark.parametrize('own_times', [False, True])
def test_written_timing_is_exact(tmp_path, rate, own_times):
    with VideoWriter(tmp_path/'clip.mp4', rate) as writer:
        for number in range(30): writer.write(picture(number), number / rate if own_times else None)
    info = probe_video(tmp_path/'clip.mp4')
    assert (info.fps, info.frame_count) == (rate, 30) and info.duration_s == pytest.approx(float(30 / rate), abs=1e-9)
    with av.open(str(tmp_path/'clip.mp4')) as container:
        stream = container.streams.video[0]
        assert abs(stream.duration * stream.time_base - 30 / rate) < Fraction(1, 1_000_000)
        assert stream.codec_context.pix_fmt == 'yuv420p' and stream.codec_context.name == 'h264'
    data = (tmp_path/'clip.mp4').read_bytes()
    assert data.find(b'moov') < data.find(b'mdat')                # faststart


def test_same_input_same_bytes(tmp_path):
    for name in ('a.mp4', 'b.mp4'):
        with VideoWriter(tmp_path/name, 25, audio_from=CLIP) as writer:
            for number in range(20): writer.write(picture(number))
    assert (tmp_path/'a.mp4').read_bytes() == (tmp_path/'b.mp4').read_bytes()


def test_odd_names(tmp_path):
    for name in ("a:b % d.mp4", "100%05d 'é' \".mp4", '-start.mp4'):
        with VideoWriter(tmp_path/'new'/name, 25, audio_from=CLIP) as writer: writer.write(picture(0))
        assert probe_video(tmp_path/'new'/name).frame_count == 1
    assert len(list_media([tmp_path], ('video',))) == 3


def test_memory_is_flat(tmp_path):
    "Peak memory of reading and writing 600 frames of 640 x 480 (0.55 GB as pictures) against 60 of them."
    code = '''
        import resource, sys
        from itertools import islice
        import numpy as np
        from talking_face.signals.media import iterate_video
        from talking_face.signals.recording import VideoWriter
        path, count = sys.argv[1], int(sys.argv[2])
        image = np.zeros((480, 640, 3), np.uint8)
        with VideoWriter(path, 25) as writer:
            for number in range(count): image[number % 480] += 40; writer.write(image)
        assert sum(1 for _ in iterate_video(path)) == count
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    '''
    short, long = (int(run(code, tmp_path/'clip.mp4', count).stdout) for count in (60, 600))
    assert long - short < 60, (short, long)


def test_the_number_of_cores_does_not_change_the_picture(tmp_path):
    import subprocess, sys
    code = """
import os, sys, numpy as np
os.sched_setaffinity(0, set(list(os.sched_getaffinity(0))[:int(sys.argv[2])]))
from talking_face.signals.recording import VideoWriter
generator = np.random.default_rng(0)
with VideoWriter(sys.argv[1], 25, crf=23) as writer:
    for frame in range(30): writer.write(np.roll(np.kron(np.arange(64).reshape(8, 8), np.ones((32, 32)))[..., None], frame, 1).repeat(3, 2).astype(np.uint8) * 3
                                         + generator.integers(0, 12, (256, 256, 3), np.uint8))
"""
    if len(os.sched_getaffinity(0)) < 2: pytest.skip('one core only')
    for cores in (1, 2): subprocess.run([sys.executable, '-c', code, tmp_path/f'{cores}.mp4', str(cores)], check=True, timeout=60)
    assert (tmp_path/'1.mp4').read_bytes() == (tmp_path/'2.mp4').read_bytes()
