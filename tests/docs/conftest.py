"""For the tests of the pages: the files that they tell one to write."""

import sys

import pytest
from docs_blocks import write_files


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The files of the pages in a folder, importable; experiments inherit from the shipped ones."""
    folder = tmp_path_factory.mktemp("my_checkout")
    write_files(folder)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("my_lab", "test_my_losses")]:
        del sys.modules[name]
