"""Many prompts over several processes: the shared list of work, and scripts/generate.py under accelerate launch."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import imageio
import numpy as np
import psutil
import pytest
import tiny
from command_options import SIZE, SMALL
from small_disk import small_disk

from psa_diffusers.cli import worklist
from psa_diffusers.cli.worklist import share_out

ROOT = Path(__file__).parents[2]
# fork: a fresh interpreter would load torch for each of them. Several threads are other tests' business
FORK = multiprocessing.get_context("fork")

pytestmark = [
    pytest.mark.usefixtures("short_waits"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # imageio-ffmpeg leaves its pipe to the garbage collector
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


def finished_by_file(folder):
    return lambda name: (folder / f"{name}.done").is_file()


def work_through(folder, names, seconds=0.002):
    """Do what there is to do; a piece leaves a line in a log for each time it is done."""
    for index in share_out(names, folder, finished_by_file(folder)):
        with (folder / "log").open("a") as log:
            log.write(f"{names[index]}\n")
        time.sleep(seconds)
        (folder / f"{names[index]}.done").touch()


def log_of(folder):
    return (folder / "log").read_text().split() if (folder / "log").is_file() else []


def assert_all_done_and_nothing_left(folder, names):
    assert sorted(path.name for path in folder.iterdir()) == sorted([*(f"{name}.done" for name in names), "log"])


def test_one_process_does_everything_in_order(tmp_path):
    names = ["a", "b", "c"]
    work_through(tmp_path, names)
    assert log_of(tmp_path) == names
    assert_all_done_and_nothing_left(tmp_path, names)
    work_through(tmp_path, names)
    assert log_of(tmp_path) == names, "what is finished is not done again"


def test_several_processes_do_every_piece_once(tmp_path):
    names = [f"piece-{index}" for index in range(60)]
    workers = [FORK.Process(target=work_through, args=(tmp_path, names)) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert sorted(log_of(tmp_path)) == sorted(names)
    assert_all_done_and_nothing_left(tmp_path, names)


def test_the_pieces_of_processes_that_die_are_done_by_those_that_live(tmp_path):
    """Killed at any moment: every piece is finished, and none that was finished is done a second time."""
    names = [f"piece-{index}" for index in range(12)]
    doomed = [FORK.Process(target=work_through, args=(tmp_path, names, 0.1)) for _ in range(3)]
    living = [FORK.Process(target=work_through, args=(tmp_path, names, 0.02)) for _ in range(2)]
    for worker in doomed:
        worker.start()
    while len(log_of(tmp_path)) < 3:
        time.sleep(0.005)
    finished = {path.stem for path in tmp_path.glob("*.done")}
    for worker in living:
        worker.start()
    for worker in doomed:
        os.kill(worker.pid, signal.SIGKILL)
        worker.join(60)  # until then it is a zombie, which still has its number
    for worker in living:
        worker.join(60)
        assert worker.exitcode == 0
    assert_all_done_and_nothing_left(tmp_path, names)
    assert set(log_of(tmp_path)) == set(names)
    assert len(log_of(tmp_path)) <= len(names) + len(doomed), "at most the pieces that were cut off are done again"
    assert all(log_of(tmp_path).count(name) == 1 for name in finished)


def test_a_piece_that_is_finished_while_its_claim_is_judged_leaves_nothing(tmp_path, monkeypatch):
    """The second claim is made after another process has finished the piece and removed the claims before it."""
    foreign_claim(tmp_path, "a", 1000)

    def is_stale(path, _):
        (tmp_path / "a.done").touch()
        path.unlink()
        return True

    monkeypatch.setattr(worklist, "_is_stale", is_stale)
    work_through(tmp_path, ["a"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.done"]


def test_claims_on_finished_pieces_are_swept_but_not_those_of_other_work(tmp_path):
    """A process can die between any two steps, so any claim can be left, whichever numbers are missing before it."""
    (tmp_path / "a.done").touch()
    for name in ("a.claim1", "a.claim3", "b.claim2"):
        (tmp_path / name).touch()
    work_through(tmp_path, ["a"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.done", "b.claim2"]


def test_a_piece_that_failed_is_left_for_others(tmp_path):
    names = ["a", "b"]
    work = share_out(names, tmp_path, finished_by_file(tmp_path))
    assert next(work) == 0
    with pytest.raises(KeyError):
        work.throw(KeyError)
    assert len(list(tmp_path.glob("a.claim*"))) == 1
    work_through(tmp_path, names)
    assert log_of(tmp_path) == names
    assert_all_done_and_nothing_left(tmp_path, names)


def foreign_claim(folder, name, age):
    """The claim of a process on another machine, without a sign of life for `age` seconds."""
    path = folder / f"{name}.claim1"
    path.write_text(json.dumps({"machine": "another", "process": os.getpid()}))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_the_claim_of_another_machine_holds_as_long_as_it_shows_signs_of_life(tmp_path):
    foreign_claim(tmp_path, "a", 1000)
    path = foreign_claim(tmp_path, "b", 1)
    work = share_out(["a", "b"], tmp_path, finished_by_file(tmp_path))
    assert next(work) == 0, "its process has been silent for long"
    (tmp_path / "a.done").write_text("")
    waiting = FORK.Process(target=work_through, args=(tmp_path, ["a", "b"]))
    waiting.start()
    time.sleep(0.3)
    assert log_of(tmp_path) == [], "somebody is at it"
    os.utime(path, (0, 0))
    waiting.join(60)
    assert log_of(tmp_path) == ["b"]
    assert list(work) == []


def test_a_claim_shows_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(worklist, "BEAT_SECONDS", 0.02)
    for _ in share_out(["a"], tmp_path, finished_by_file(tmp_path)):
        (path,) = tmp_path.glob("*.claim1")
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 60
        while path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert path.stat().st_mtime > 0
        (tmp_path / "a.done").write_text("")
    assert not list(tmp_path.glob("*.claim*"))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"\x00" * 200, id="zeros"),
        pytest.param('{"machine": "\xff"}'.encode("latin-1"), id="latin-1"),
        pytest.param('{"machine": "m", "process": 1}'.encode("utf-16"), id="utf-16"),
        pytest.param(b'"text"', id="text"),
        pytest.param(b"NaN", id="nan"),
        pytest.param(b"[" * 4000, id="deep"),
        pytest.param(b'{"machine": "m"', id="torn"),
        pytest.param(b'{"process": 1}', id="no-machine"),
        pytest.param(b'{"machine": null, "process": 1}', id="null"),
        *(
            pytest.param(f'{{"machine": "OURS", "process": {number}}}'.encode(), id=f"process {number}")
            for number in ("0", "-1", "true", "1.5", '"1"', "99999999999999999999")
        ),
        pytest.param(b'{"given_up": "perhaps"}', id="given-up"),
    ],
)
def test_a_claim_that_holds_something_else_is_stale_and_is_named_once(content, tmp_path, caplog):
    claim = tmp_path / "a.claim1"
    claim.write_bytes(content.replace(b"OURS", worklist._machine().encode()))
    work_through(tmp_path, ["a"])
    assert log_of(tmp_path) == ["a"]
    (warning,) = caplog.messages
    assert str(claim) in warning
    assert_all_done_and_nothing_left(tmp_path, ["a"])


@pytest.mark.parametrize(
    "make",
    [Path.mkdir, lambda path: path.symlink_to("nowhere"), lambda path: os.mkfifo(path)],
    ids=["folder", "link-to-nothing", "pipe"],
)
def test_a_claim_that_is_no_file_is_stale(make, tmp_path, caplog):
    make(tmp_path / "a.claim1")
    work_through(tmp_path, ["a"])
    assert log_of(tmp_path) == ["a"]
    assert "it is no file" in caplog.text


def test_a_claim_that_was_made_this_moment_is_not_junk(tmp_path, caplog):
    """Another process has created it, and has not yet written its name into it."""
    (tmp_path / "a.claim1").touch()
    assert not worklist._is_stale(tmp_path / "a.claim1", 60)
    os.utime(tmp_path / "a.claim1", (0, 0))
    assert worklist._is_stale(tmp_path / "a.claim1", 60)
    assert caplog.messages == []


@pytest.mark.parametrize("ahead", [120, 7200, 3 * 365 * 86400])
def test_a_claim_dated_in_the_future_is_not_waited_for(ahead, tmp_path, caplog):
    foreign_claim(tmp_path, "a", -ahead)
    work_through(tmp_path, ["a"])
    assert log_of(tmp_path) == ["a"]
    (warning,) = caplog.messages
    assert "a.claim1 is dated" in warning
    assert "in the future" in warning


def test_clocks_that_differ_a_little_take_no_claim_away(tmp_path):
    assert not worklist._is_stale(foreign_claim(tmp_path, "a", -30), 60)


def test_waiting_says_for_whom(tmp_path, capsys):
    (tmp_path / "a.claim1").write_text(json.dumps({"machine": "node-7 boot pid", "process": 4711}))
    (tmp_path / "b.claim1").touch()
    waiting = FORK.Process(target=work_through, args=(tmp_path, ["a", "b"]))
    out = tmp_path.with_name(f"{tmp_path.name}.out")
    with out.open("w") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        waiting.start()
    time.sleep(0.3)
    for name in "ab":
        (tmp_path / f"{name}.done").touch()
    waiting.join(60)
    assert out.read_text() == f"waiting for process 4711 on node-7, whoever made {tmp_path / 'b.claim1'}\n"


@pytest.mark.parametrize("part", ["boot", "space"])
def test_two_machines_of_one_name_and_image_do_not_take_each_other_for_dead(part, tmp_path):
    """The process of the claim is none of this machine: only its silence may end the claim."""
    gone = FORK.Process(target=time.sleep, args=(0,))
    gone.start()
    gone.join()
    node, boot, space = worklist._machine().split(" ")
    other = f"{node} {'0' * 36} {space}" if part == "boot" else f"{node} {boot} pid:[1]"
    claim = tmp_path / "a.claim1"
    claim.write_text(json.dumps({"machine": other, "process": gone.pid}))
    assert not worklist._is_stale(claim, 60)
    claim.write_text(json.dumps({"machine": worklist._machine(), "process": gone.pid}))
    assert worklist._is_stale(claim, 60)


def test_a_machine_that_cannot_be_known_shares_its_identity_with_nobody(monkeypatch):
    def unreadable(*args, **options):
        raise FileNotFoundError

    known = worklist._machine()
    monkeypatch.setattr(Path, "read_text", unreadable)
    assert worklist._machine() == worklist._machine() != known
    assert worklist._machine().split(" ")[1] == worklist._UNKNOWN


def test_a_claim_that_cannot_be_written_is_an_error_with_the_file(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(worklist.json, "dump", full)
    with pytest.raises(OSError, match=r"cannot claim a: No space left on device, writing .*a\.claim1"):
        work_through(tmp_path, ["a"])
    assert list(tmp_path.iterdir()) == []


def test_who_gives_up_on_a_full_disk_is_believed(tmp_path):
    with small_disk(tmp_path / "disk", 16) as folder:
        work = share_out(["a"], folder, finished_by_file(folder))
        assert next(work) == 0
        with suppress(OSError), (folder / "rest").open("wb") as file:
            while True:
                file.write(bytes(1024))
        with pytest.raises(KeyError):
            work.throw(KeyError)
        assert json.loads((folder / "a.claim1").read_text()) == {"given_up": True}
        assert worklist._is_stale(folder / "a.claim1", 60)


# the program


PROMPTS = ["a red ball rolls", "two foxes in the snow", "rain on a window", "a ship at night", "a clock"]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The program and its arguments, all but the folder to write to."""
    where = tmp_path_factory.mktemp("model")
    tiny.cogvideox().save_pretrained(where / "pipeline")
    (where / "prompts.txt").write_text("\n".join(PROMPTS))
    args = ["--model", where / "pipeline", "--prompt_file", where / "prompts.txt", *SIZE, *SMALL, "--use_psa"]
    return [str(part) for part in (ROOT / "scripts" / "generate.py", *args, "--device", "cpu", "--output_dir")]


def environment(**extra):
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        **extra,
    }


def launch(command, where, port):
    """`accelerate launch` with two processes, which is what --multi_gpu means; without a GPU they run on the CPU."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return subprocess.Popen(
        [*launcher, "--main_process_port", str(port), *command, str(where)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_all(process):
    """The launcher and its workers at once, as when a machine goes down."""
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in tree:
        each.kill()
    psutil.wait_procs(tree[1:])
    process.communicate()


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def records(where):
    return {path.stem: json.loads(path.read_text()) for path in sorted(where.glob("*.json"))}


def frames(path):
    with imageio.get_reader(path) as reader:
        return np.stack(list(reader.iter_data()))


@pytest.fixture(scope="module")
def one_process(command, tmp_path_factory):
    where = tmp_path_factory.mktemp("one")
    done = subprocess.run([sys.executable, *command, where], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return where


def assert_same_files(where, expected):
    assert sorted(path.name for path in where.iterdir()) == sorted(path.name for path in expected.iterdir())
    others = records(expected)
    for name, record in records(where).items():
        timeless = {"command", "result", "environment", "report"}
        assert {key: record[key] for key in record.keys() - timeless} == {
            key: others[name][key] for key in record.keys() - timeless
        }
        assert record["result"]["sparse_density"] == others[name]["result"]["sparse_density"]
        assert np.array_equal(frames(where / record["video"]), frames(expected / record["video"]))


def test_two_processes_make_the_same_files_as_one(command, one_process, tmp_path):
    process = launch(command, tmp_path, free_port())
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert_same_files(tmp_path, one_process)
    assert printed.count("prompt: ") == len(PROMPTS), "each was generated once"
    assert len(records(tmp_path)) == len(PROMPTS)


def test_killed_in_the_middle_it_goes_on_without_repeating(command, one_process, tmp_path):
    process = launch(command, tmp_path, free_port())
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    kill_all(process)
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert 0 < len(finished) < len(PROMPTS), "it must have been in the middle"
    assert list(tmp_path.glob("*.claim1")), "what it was at is still claimed"

    process = launch(command, tmp_path, free_port())
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert printed.count("prompt: ") == len(PROMPTS) - len(finished)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert_same_files(tmp_path, one_process)


def test_each_process_has_its_gpu(monkeypatch):
    import torch

    from psa_diffusers.cli.generation import device_of_process

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert device_of_process() == "cuda"
    for rank, device in (("0", "cuda:0"), ("1", "cuda:1"), ("2", "cuda:0")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert device_of_process() == device
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert device_of_process() == "cpu"
