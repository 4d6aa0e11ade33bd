"""Places on a disk are checked before the work, and a refusal touches nothing."""

import os

import pytest
from small_disk import largest_file, small_disk, somebody_else

from psa_diffusers.calibration.places import check_place, free_name, write_whole


@pytest.fixture
def earlier(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("earlier")
    return path


def test_a_place_is_checked_without_a_trace(earlier):
    check_place(earlier)
    check_place(earlier.with_name("new.yaml"))
    assert [each.name for each in earlier.parent.iterdir()] == ["a.yaml"]
    assert earlier.read_text() == "earlier"
    check_place(earlier.parent / "new" / "folder" / "b.yaml")
    assert list((earlier.parent / "new" / "folder").iterdir()) == []


def test_what_is_no_place_for_a_file_is_told(earlier):
    with pytest.raises(IsADirectoryError, match=r"is a folder: give the path of a file in it"):
        check_place(earlier.parent)
    for path in (earlier / "b.yaml", earlier / "c" / "b.yaml"):
        with pytest.raises(NotADirectoryError, match=r"a folder of that path is a file; give another path"):
            check_place(path)
    pipe = earlier.parent / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, type(pipe)("/dev/null")):
        with pytest.raises(FileExistsError, match="is a device or a pipe"):
            check_place(path)
    with pytest.raises(OSError, match=r"cannot write in .*: File name too long; give another path"):
        check_place(earlier.with_name("x" * 252))


def test_a_place_that_is_not_ours_is_told(tmp_path):
    for path in (tmp_path, *tmp_path.parents):
        if path == tmp_path or path.name.startswith(("pytest-", "popen-")):  # pytest lets nobody else in
            path.chmod(0o755)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "a.yaml").write_text("theirs")
    theirs.chmod(0o555)
    (theirs / "a.yaml").chmod(0o444)
    with somebody_else():
        with pytest.raises(PermissionError, match=r"a\.yaml is write-protected"):
            check_place(theirs / "a.yaml")
        with pytest.raises(PermissionError, match=r"cannot write in .*theirs: Permission denied"):
            check_place(theirs / "b.yaml")
        with pytest.raises(PermissionError, match=r"cannot make the folder .*new: Permission denied"):
            check_place(theirs / "new" / "b.yaml")


def test_a_full_disk_is_told(tmp_path):
    with small_disk(tmp_path / "disk", 16) as folder:
        with pytest.raises(OSError, match="No space left"):
            (folder / "big").write_bytes(bytes(2**20))
        with pytest.raises(OSError, match=r"cannot write in .*disk: No space left"):
            check_place(folder / "a.yaml")
        assert [each.name for each in folder.iterdir()] == ["big"]


def test_a_text_appears_whole_or_not_at_all(earlier):
    with largest_file(10_000), pytest.raises(OSError, match="too large"):
        write_whole(earlier, "x" * 20_000)
    assert earlier.read_text() == "earlier"
    assert [each.name for each in earlier.parent.iterdir()] == ["a.yaml"]
    write_whole(earlier, "now\n")
    assert earlier.read_text() == "now\n"


def test_free_names(earlier):
    names = []
    for _ in range(3):
        names.append(free_name(earlier, "old"))
        names[-1].touch()
    assert [name.name for name in names] == ["a.old.yaml", "a.old2.yaml", "a.old3.yaml"]
