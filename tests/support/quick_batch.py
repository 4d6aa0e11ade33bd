"""The command `generate` in processes of its own on a pipeline that draws noise: all but the model is real."""

import contextlib
import io
import json
import multiprocessing
from types import SimpleNamespace

import imageio_ffmpeg
import torch

from psa_diffusers.cli import generate

# fork: a fresh interpreter would load torch for each of them
FORK = multiprocessing.get_context("fork")
FRAMES = 5
PROMPTS = ["a red ball rolls", "two foxes in the snow", "rain on a window", "a ship at night"]


class Noise:
    """What a batch asks of a pipeline. Every call leaves a line in a log."""

    dtype = torch.float32

    def __init__(self, log):
        self.log = log
        self.scheduler = SimpleNamespace(config={"shift": 3.0})
        self.components = {}

    def __call__(self, prompt, generator, output_type="np", width=64, height=64, num_frames=FRAMES):
        with self.log.open("a") as log:
            log.write(f"{prompt}\n")
        return SimpleNamespace(frames=torch.rand(1, num_frames, height, width, 3, generator=generator).numpy())


class Run:
    """One process of a batch that writes to a folder; the log of its calls stands beside the folder."""

    def __init__(self, folder, *args, within=contextlib.nullcontext, pipe=Noise):
        self.log = folder.with_name("log")
        prompts = folder.with_name("prompts.txt")
        if not prompts.exists():
            prompts.write_text("\n".join(PROMPTS))
        argv = ["--model", "some/pipeline", "--prompt_file", prompts, "--output_dir", folder, "--device", "cpu", *args]
        self._end, end = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=self._work, args=([str(part) for part in argv], end, within, pipe))
        self.process.start()
        end.close()

    def _work(self, argv, end, within, pipe):
        generate.load_pipeline = lambda *args, **options: pipe(self.log)
        told = io.StringIO()
        # not where the tests write: a limit on files would count there as well
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told), within():
            status = generate.main(argv)
        end.send((status, told.getvalue()))

    def end(self):
        """Exit status, and what the process printed; a process that was killed has printed nothing."""
        try:
            return self._end.recv()
        except EOFError:
            return None, ""
        finally:
            self.process.join()

    @property
    def calls(self):
        return self.log.read_text().splitlines() if self.log.exists() else []


def finished(folder):
    """Prompts whose files have their names, after a look at every file: a name promises a whole file."""
    for video in folder.glob("[!.]*.mp4"):
        assert imageio_ffmpeg.count_frames_and_secs(video)[0] == FRAMES, video
    records = [json.loads(path.read_text(), parse_constant=_refuse) for path in folder.glob("[!.]*.json")]
    assert all((folder / record["video"]).is_file() for record in records)
    return {record["prompt"] for record in records}


def _refuse(constant):
    raise AssertionError(f"JSON knows no {constant}")
