"""Fixtures of the whole way: a small corpus, runs and a person, made once per session (by the worker that comes first), only read by tests."""
import os, shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from helpers import ADVERSARIAL, DLIB, MICRO, Outcome, clip, frames_of


class Workshop(NamedTuple):
    videos: Path    # syn01/syn01_c0.mp4, syn11/syn11_c0.mp4
    shards: Path    # the same, preprocessed at 128 px with dlib
    run: Path       # 30 steps of the tiny preset, 64 px
    micro: Path     # 8 adversarial steps of the smallest possible networks, 32 px
    photo: Path     # the first frame of syn11_c0 as PNG
    person: Path    # fine-tuned for 10 steps from `run` on 8 of the first 38 frames of syn11_c0


def quiet(*arguments: object) -> None:
    from talking_face.app.cli import main
    code = main([str(argument) for argument in arguments])
    assert code == 0, f'{arguments}: exit code {code}'


def build(folder: Path) -> None:
    import torch
    torch.set_num_threads(1)
    for identity in ('syn01', 'syn11'):
        (folder/'videos'/identity).mkdir(parents=True)
        shutil.copy(clip(identity), folder/'videos'/identity)
    Image.fromarray(frames_of(clip('syn11'), 1)[0]).save(folder/'photo.png')
    quiet('preprocess', folder/'videos', '--out', folder/'shards', '--size', 128, '--detector', 'dlib')
    train = ['train', '--data', folder/'shards', '--log-every', 1, '--out']
    quiet(*train, folder/'run', '--steps', 30, '--warmup-steps', 5, '--threads', 1, '--sample-every', 30)
    quiet(*train, folder/'micro', '--steps', 8, '--checkpoint-every', 1, '--keep-checkpoints', 9, *MICRO, *ADVERSARIAL)
    photos = ['--photos', folder/'videos/syn11/syn11_c0.mp4', '--seconds', 0, 1.5]
    quiet('fine-tune', '--run', folder/'run', *photos, '--out', folder/'person', '--epochs', 2, *DLIB)


@pytest.fixture(scope='session')
def workshop(tmp_path_factory) -> Workshop:
    from filelock import FileLock
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base)/'workshop'     # its workers share the parent folder
    with FileLock(f'{folder}.lock'):
        if not (folder/'complete').exists():
            folder.mkdir()
            build(folder)
            (folder/'complete').touch()
    return Workshop(**{name: folder/(f'{name}.png' if name == 'photo' else name) for name in Workshop._fields})


@pytest.fixture
def talking_face(capfd) -> Callable[..., Outcome]:
    "Run the command line in this process; everything it prints is caught, what C libraries print included."
    import torch
    from talking_face.app.cli import main
    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        try: code = main([str(argument) for argument in arguments])
        except SystemExit as stop: code = stop.code
        return Outcome(code, *capfd.readouterr())
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run
    torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    "The same numbers whatever ran before: one thread, seed 0."
    import torch
    before = torch.get_num_threads()
    torch.manual_seed(0); torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
