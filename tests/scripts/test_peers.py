"""Attentions of other projects, found in a checkout of theirs."""

import sys

import pytest

from scripts.benchmarks.peers import package_of


@pytest.fixture
def checkout(tmp_path):
    """A folder with a package whose parts import each other in both ways, and one that cannot be imported."""
    for name, text in {
        "peer_of_a_test/__init__.py": "from .kernel import attend\n",
        "peer_of_a_test/kernel.py": "from peer_of_a_test.sizes import SIZE\n\n\ndef attend():\n    return SIZE\n",
        "peer_of_a_test/sizes.py": "SIZE = 64\n",
        "broken_peer_of_a_test/__init__.py": "raise ImportError('needs a GPU')\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    yield tmp_path
    for name in [name for name in sys.modules if "peer_of_a_test" in name]:
        del sys.modules[name]


def test_a_package_is_found_in_its_checkout_and_the_path_stays(checkout):
    before = list(sys.path)
    package = package_of(checkout, "peer_of_a_test")
    assert package.attend() == 64
    assert package_of(checkout, "peer_of_a_test") is package
    assert sys.path == before


def test_a_package_that_is_not_there_is_named(checkout):
    with pytest.raises(ModuleNotFoundError, match="no package nothing_of_a_test in"):
        package_of(checkout, "nothing_of_a_test")


def test_a_package_that_cannot_be_imported_is_not_kept(checkout):
    for _ in range(2):
        with pytest.raises(ImportError, match="needs a GPU"):
            package_of(checkout, "broken_peer_of_a_test")
