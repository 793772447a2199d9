"""Settings and real assets that the whole suite shares."""

from __future__ import annotations

import os

# Before torch is imported: the suite shares few cores among many processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import shutil  # noqa: E402
import signal  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

from fusemega.fixtures import data as assets  # noqa: E402
from fusemega.fixtures.packages import AssetMissing  # noqa: E402

# A shell's background job ignores SIGINT, and so would what it starts: tests that press Ctrl-C would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The real SmolLM2-135M-Instruct as a Hugging Face folder; skips, naming the asset, where it cannot be had.

    Also where temporary files have no room for a few copies of it.
    """
    if shutil.disk_usage(tempfile.gettempdir()).free < 2 << 30:
        pytest.skip(f"SmolLM2-135M-Instruct: less than 2 GiB free for its copies in {tempfile.gettempdir()}")
    try:
        return assets.smollm2()
    except AssetMissing as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def chat_files() -> assets.ChatData:
    """Real chat text, `train` and `held_out` JSONL; skips, naming the asset, where it cannot be had."""
    try:
        return assets.chat_data()
    except AssetMissing as error:
        pytest.skip(str(error))


# Files that take a minute or more each. `make test` gives every worker whole files: these begin first, so that none
# is left to one worker at the end.
LONGEST = ("test_readme", "test_training", "test_weights", "test_world_sizes", "test_families", "test_methods")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not hasattr(config, "workerinput"):
        return  # one process: the order of the folders
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))  # stable: a file's tests keep their order
