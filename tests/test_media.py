"""Media: odd containers, timing, rotation, faults while reading, fuzzing."""
import os, random
from fractions import Fraction

import av, numpy as np, pytest
from PIL import Image

from made_clips import CLIP, SHARED, click_track, make, message, needs_shared, picture
from talking_face.core import MediaError
from talking_face.signals.media import iterate_video, media_kind, probe_video, read_image, read_video, write_image
from talking_face.signals.sound import read_audio, write_audio


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


# ---------------------------------------------------------------- bad input

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
    assert 'not an ordinary file' in message(tmp_path/'pipe.mp4', probe_video)


def test_phone_picture_in_a_movie_box(tmp_path):
    data = make(tmp_path/'clip.mp4', 1).read_bytes()
    (tmp_path/'photo.heic').write_bytes(data[:8] + b'heic' + data[12:])
    assert media_kind(tmp_path/'photo.heic') == 'image' and 'is a picture' in message(tmp_path/'photo.heic', probe_video)
    assert 'HEIC' in message(tmp_path/'photo.heic', read_image)


def test_playlists_do_not_open_other_files(tmp_path):
    target = CLIP.resolve()
    (tmp_path/'list.m3u8').write_text(f'#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:3,\n{target}\n#EXT-X-ENDLIST\n')
    (tmp_path/'join.mp4').write_text(f"ffconcat version 1.0\nfile '{target}'\n")
    for name in ('list.m3u8', 'join.mp4'): assert media_kind(tmp_path/name) == 'other' and message(tmp_path/name, probe_video)


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
    assert any(word in message(path, probe_video) for word in ('cut off', 'damaged'))


def test_a_file_that_lost_only_its_last_frame(tmp_path):
    path = make(tmp_path/'fast.mp4', 50, options={'bf': '0', 'crf': '5'}, container_options={'movflags': '+faststart'})
    data = path.read_bytes(); path.write_bytes(data[:-5])
    assert 'cut off' in message(path, probe_video)


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
