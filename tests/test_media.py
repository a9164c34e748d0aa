"""Media: odd containers, timing, rotation, sound alignment, faults while reading and writing, fuzzing, memory."""
import os, random, subprocess, sys, textwrap
from fractions import Fraction
from pathlib import Path

import av, numpy as np, pytest
from PIL import Image

from talking_face.core import MediaError
from talking_face.signals.media import (VideoWriter, iterate_video, list_media, media_kind, probe_video, read_audio, read_image,
                                        read_video, write_audio, write_image)

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


# ---------------------------------------------------------------- reading

@pytest.mark.parametrize('degrees', [0, 90, 180, 270])
@pytest.mark.parametrize('mirror', [(False, False), (True, False), (False, True)])
def test_rotation_and_mirror(tmp_path, degrees, mirror):
    path = make(tmp_path/'turned.mp4', 3, rotation=(degrees, *mirror))
    expected = np.rot90(picture(0), degrees // 90)                # FFmpeg: counterclockwise, then the mirror
    if mirror[0]: expected = expected[:, ::-1]
    if mirror[1]: expected = expected[::-1]
    info, image = probe_video(path), next(iterate_video(path)).image
    assert (info.height, info.width) == image.shape[:2] == expected.shape[:2]
    assert np.abs(image.astype(int) - expected).mean() < 6        # all other turns of this picture differ by more than 30


@pytest.mark.parametrize('rate', [Fraction(25), Fraction(24), Fraction(30000, 1001), Fraction(24000, 1001), Fraction(15), Fraction(60)])
@pytest.mark.parametrize('suffix', ['.mp4', '.mkv', '.avi', '.ts', '.mov'])
def test_constant_rate_is_exact_in_every_container(tmp_path, rate, suffix):
    codec = 'mpeg4' if suffix == '.avi' else 'libx264'
    path = make(tmp_path/f'clip{suffix}', 40, rate, codec)
    info = probe_video(path)
    assert (info.fps, info.frame_count, info.variable_rate) == (rate, 40, False)
    assert [frame.time_s for frame in iterate_video(path)] == [k / rate for k in range(40)]


def test_b_frames_come_in_order_of_showing(tmp_path):
    frames = read_video(make(tmp_path/'b.mp4', 40, options={'bf': '3', 'g': '12'}))
    for number, frame in enumerate(frames): assert np.abs(frame.astype(int) - picture(number)).mean() < 6
    assert len({int(frame[24].mean(-1).argmax()) for frame in frames}) >= 20


def test_hidden_frames_of_vp8_are_not_counted(tmp_path):
    path = make(tmp_path/'alt.webm', 60, codec='libvpx', options={'auto-alt-ref': '1', 'lag-in-frames': '16', 'b': '200k'})
    assert probe_video(path).frame_count == 60 == sum(1 for _ in iterate_video(path))


@pytest.mark.parametrize('suffix', ['.mp4', '.mkv'])
def test_variable_rate_resampled_by_time_stamps(tmp_path, suffix):
    times = np.cumsum([0] + [40, 40, 120, 40, 40, 400, 40, 80, 40, 40, 40, 200] * 3)[:36] / Fraction(1000)
    path = make(tmp_path/f'vfr{suffix}', 36, 25, pts=list(times))
    info = probe_video(path)
    assert info.variable_rate and info.frame_count == 36
    assert [frame.time_s for frame in iterate_video(path)] == list(times)
    source = read_video(path)
    for fps in (Fraction(25), Fraction(10), Fraction(30000, 1001)):
        for index, frame in enumerate(iterate_video(path, fps)):
            seen = max(k for k in range(36) if times[k] <= index / fps)
            assert frame.time_s == index / fps and (frame.image == source[seen]).all()
        assert index == -(-info.frame_count / info.fps * fps // 1) - 1  # the same duration


def test_fps_argument(tmp_path):
    assert len(read_video(CLIP, 29.97)) == 90 and len(read_video(CLIP, fps=12.5)) == 38 and len(read_video(CLIP, maximum_frames=7)) == 7
    for fps in (0, -25, float('nan'), float('inf')):
        with pytest.raises(ValueError, match='fps'): iterate_video(CLIP, fps)


@needs_shared
def test_real_files_count_and_decode():
    files = sorted([*SHARED.glob('raw/*.mp4'), *SHARED.glob('grid/*.mpg')])
    assert len(files) == 11
    for path in files:
        info = probe_video(path)
        with av.open(str(path)) as container: assert info.frame_count == sum(1 for _ in container.decode(video=0)), path.name
    info = probe_video(SHARED/'raw/vr_face1.mp4')
    assert info.variable_rate and info.fps == Fraction(1350, 61) and info.frame_count == 135
    assert [probe_video(SHARED/f'raw/{name}.mp4').fps for name in ('lp_s18', 'lp_s29')] == [30, 30]
    assert probe_video(SHARED/'grid/bbaf2n.mpg')[1:] == (360, 288, Fraction(25), 75, 3.0, True, False)


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


# ---------------------------------------------------------------- bad input

def message(path, action=probe_video):
    with pytest.raises(MediaError) as caught: action(path)
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_bad_videos(tmp_path):
    (tmp_path/'empty.mp4').touch()
    (tmp_path/'notes.mp4').write_text('Dear diary,\n' * 100)
    (tmp_path/'folder.mp4').mkdir()
    write_image(tmp_path/'photo.jpg', picture(0))
    Image.fromarray(picture(0)).save(tmp_path/'still.mp4', 'PNG')
    write_audio(tmp_path/'speech.wav', np.zeros(16000), 16000)
    with av.open(str(tmp_path/'sound.mp4'), 'w') as container:
        stream = container.add_stream('aac', rate=16000, layout='mono')
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), 'fltp', 'mono'); frame.sample_rate = 16000
        container.mux(stream.encode(frame)); container.mux(stream.encode(None))
    for name, words in {'empty.mp4': '0 bytes', 'absent.mp4': 'no such file', 'notes.mp4': 'not a video', 'folder.mp4': 'is a folder', 'photo.jpg': 'is a picture',
                        'still.mp4': 'is a picture', 'speech.wav': 'sound but no video', 'sound.mp4': 'sound but no video', 'x' * 300: 'cannot be opened'}.items():
        for action in (probe_video, iterate_video, read_video): assert words in message(tmp_path/name, action), name
    os.mkfifo(tmp_path/'pipe.mp4')
    assert 'not an ordinary file' in message(tmp_path/'pipe.mp4')


def test_phone_picture_in_a_movie_box(tmp_path):
    data = make(tmp_path/'clip.mp4', 1).read_bytes()
    (tmp_path/'photo.heic').write_bytes(data[:8] + b'heic' + data[12:])
    assert media_kind(tmp_path/'photo.heic') == 'image' and 'is a picture' in message(tmp_path/'photo.heic')
    assert 'HEIC' in message(tmp_path/'photo.heic', read_image)


def test_playlists_do_not_open_other_files(tmp_path):
    target = CLIP.resolve()
    (tmp_path/'list.m3u8').write_text(f'#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:3,\n{target}\n#EXT-X-ENDLIST\n')
    (tmp_path/'join.mp4').write_text(f"ffconcat version 1.0\nfile '{target}'\n")
    for name in ('list.m3u8', 'join.mp4'): assert media_kind(tmp_path/name) == 'other' and message(tmp_path/name)


def test_animated_gif_is_a_video(tmp_path):
    images = [Image.fromarray(picture(number)) for number in range(5)]
    images[0].save(tmp_path/'moving.gif', save_all=True, append_images=images[1:], duration=40)
    images[0].save(tmp_path/'still.gif')
    assert [media_kind(tmp_path/name) for name in ('moving.gif', 'still.gif')] == ['video', 'image']
    assert probe_video(tmp_path/'moving.gif').frame_count == 5


@pytest.mark.parametrize('name, codec, options', [('fast.mp4', 'libx264', {'movflags': '+faststart'}), ('plain.mp4', 'libx264', {}), ('clip.mkv', 'libx264', {}),
                                                  ('clip.avi', 'mpeg4', {}), ('clip.mov', 'mpeg4', {'movflags': '+faststart'})])
@pytest.mark.parametrize('share', [0.3, 0.6, 0.9])
def test_cut_off_videos(tmp_path, name, codec, options, share):
    path = make(tmp_path/name, 100, codec=codec, options={'b': '400k', 'g': '10'} if codec == 'mpeg4' else {'crf': '5', 'g': '10'}, container_options=options)
    assert probe_video(path).frame_count == 100
    data = path.read_bytes(); path.write_bytes(data[:int(len(data) * share)])
    assert any(word in message(path) for word in ('cut off', 'damaged'))


def test_a_file_that_lost_only_its_last_frame(tmp_path):
    path = make(tmp_path/'fast.mp4', 50, options={'bf': '0', 'crf': '5'}, container_options={'movflags': '+faststart'})
    data = path.read_bytes(); path.write_bytes(data[:-5])
    assert 'cut off' in message(path)


def test_damage_in_the_middle_is_noticed(tmp_path):
    path = make(tmp_path/'clip.mp4', 100, options={'g': '100', 'crf': '5'}, container_options={'movflags': '+faststart'})
    data = bytearray(path.read_bytes())
    data[len(data) // 2:len(data) // 2 + 3000] = bytes(random.Random(0).randbytes(3000)); path.write_bytes(data)
    with pytest.raises(MediaError, match='clip.mp4'): sum(1 for _ in iterate_video(path))


def test_fuzzed_files_raise_only_media_errors(tmp_path):
    source = make(tmp_path/'source.mp4', 12, audio=click_track(0.4, 0.2), container_options={'movflags': '+faststart'}).read_bytes()
    chance, refused = random.Random(7), 0
    for trial in range(120):
        data, path = bytearray(source), tmp_path/'fuzzed.mp4'
        for _ in range(chance.choice((1, 4, 40))): data[chance.randrange(len(data) if trial % 2 else 3000)] = chance.randrange(256)
        if trial % 5 == 0: del data[chance.randrange(len(data)):]
        path.write_bytes(data)
        for action in (probe_video, lambda path: sum(1 for _ in iterate_video(path)), read_audio, media_kind):
            try: action(path)
            except MediaError: refused += 1
    assert 60 < refused < 480                                     # the damage was neither harmless nor always fatal


def test_fuzzed_pictures_raise_only_media_errors(tmp_path):
    chance, refused = random.Random(3), 0
    for suffix in ('.png', '.jpg', '.webp', '.bmp', '.tiff', '.gif'):
        Image.fromarray(picture(0)).save(tmp_path/f'source{suffix}')
        source = (tmp_path/f'source{suffix}').read_bytes()
        for trial in range(60):
            data = bytearray(source)
            for _ in range(chance.choice((1, 5, 30))): data[chance.randrange(min(len(data), 400))] = chance.randrange(256)
            if trial % 4 == 0: del data[chance.randrange(len(data)):]
            path = tmp_path/f'fuzzed{suffix}'; path.write_bytes(data)
            try: assert read_image(path).shape[2] == 3
            except MediaError: refused += 1
    assert 60 < refused < 360


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'I', 'I;16', 'F', 'LAB', 'HSV'])
def test_every_picture_mode(tmp_path, mode):
    grey = Image.fromarray(np.tile(np.linspace(0, 255, 32).astype(np.uint8), (16, 1)))
    if mode in ('I', 'I;16'): image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).convert(mode) if mode == 'I;16' else Image.fromarray(np.asarray(grey).astype(np.int32) * 257)
    elif mode == 'F': image = Image.fromarray(np.asarray(grey).astype(np.float32) / 255)
    elif mode in ('LAB', 'HSV'): image = Image.new(mode, (32, 16))
    else: image = grey.convert('RGB').convert(mode)
    try: image.save(tmp_path/'picture.tiff')
    except (OSError, KeyError): pytest.skip(f'Pillow does not write {mode}')
    result = read_image(tmp_path/'picture.tiff')
    assert result.shape == (16, 32, 3) and result.dtype == np.uint8
    if mode == 'P': grey = image.convert('RGB').convert('L')         # the palette has fewer greys
    if mode not in ('1', 'LAB', 'HSV'): assert np.abs(result.astype(int) - np.asarray(grey)[..., None]).max() <= 3


def test_colour_profile_is_honoured(tmp_path):
    from PIL import ImageCms
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile('XYZ'))  # an odd profile must not break the reading
    Image.fromarray(picture(0)).save(tmp_path/'odd.png', icc_profile=lab.tobytes())
    assert read_image(tmp_path/'odd.png').shape == (48, 64, 3)
    Image.fromarray(picture(0)).save(tmp_path/'srgb.png', icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes())
    assert np.abs(read_image(tmp_path/'srgb.png').astype(int) - picture(0)).max() <= 1


# ---------------------------------------------------------------- writing

def run(code, *arguments):
    return subprocess.run([sys.executable, '-c', textwrap.dedent(code), *map(str, arguments)], capture_output=True, text=True, timeout=60,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})


@pytest.mark.parametrize('limit', [0, 100, 5_000, 20_000, 'exact'])
def test_full_disk_leaves_nothing(tmp_path, limit):
    "A limit on the file size stands in for a full disk: writes fail in the header, in the middle, or when the index is moved to the front."
    code = '''
        import resource, signal, sys, numpy as np
        from talking_face.core import MediaError
        from talking_face.signals.media import VideoWriter
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
        from talking_face.signals.media import VideoWriter, iterate_video
        path, count = sys.argv[1], int(sys.argv[2])
        image = np.zeros((480, 640, 3), np.uint8)
        with VideoWriter(path, 25) as writer:
            for number in range(count): image[number % 480] += 40; writer.write(image)
        assert sum(1 for _ in iterate_video(path)) == count
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    '''
    short, long = (int(run(code, tmp_path/'clip.mp4', count).stdout) for count in (60, 600))
    assert long - short < 60, (short, long)
