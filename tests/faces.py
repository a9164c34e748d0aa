"""What the tests of landmarks and of the other detectors share: the sample data, a detector, a frame, a distance."""
from pathlib import Path

import numpy as np, pytest

from talking_face.signals.landmarks import DlibDetector, interocular_distance
from talking_face.signals.media import read_video

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT/'../shared/data'
EMBEDDED = ROOT/'data/embedded/clips'
real_data = pytest.mark.skipif(not SHARED.is_dir(), reason='needs the real sample data beside the repository (../shared/data)')


@pytest.fixture(scope='module')
def dlib_detector(): return DlibDetector()


@pytest.fixture(scope='module')
def frame(): return read_video(EMBEDDED/'syn01/syn01_c0.mp4', maximum_frames=1)[0]


def percent(points, truth):
    "Mean distance in percent of the inter-ocular distance."
    return float(np.nanmean(np.linalg.norm(points - truth, axis=-1) / np.expand_dims(interocular_distance(truth), -1)) * 100)
