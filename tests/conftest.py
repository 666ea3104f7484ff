"""What all tests share: one thread, so that times and sums repeat, and the same examples on every run."""

import os
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.pop("PYTHONUNBUFFERED", None)  # programs buffer what they print, as their users' do
if "PYTEST_XDIST_WORKER" in os.environ:  # there is one such process for each core
    os.environ.setdefault("MAESTRALE_THREADS", "1")

from hypothesis import HealthCheck, settings

# A shell starts what runs in its background deaf to Ctrl-C, and its children inherit that; some tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("explore", settings.get_profile("repeatable"), derandomize=False, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

SLOW = ("parallel", "train", "serve", "gpu", "deploy", "native_backend", "torch_backend", "conformance", "tests")


def pytest_collection_modifyitems(items):
    """Folders whose files take long go first, so that of several processes none is left with such a file at the end."""
    folders = {name: place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: folders.get(Path(item.path).parent.name, len(SLOW)))
