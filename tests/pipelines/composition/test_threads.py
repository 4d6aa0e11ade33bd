"""PSA and the moment at which it is switched on, and several threads."""

from __future__ import annotations

import threading

import torch
from cells import BIT, alone, build, calls, composes, run, switch_on


@composes(orders=())
def test_enabling_inside_a_call(name):
    pipe = build(name)

    def callback(pipeline, step, timestep, kwargs):
        switch_on(pipeline, "sparse")
        return kwargs

    try:
        run(pipe, name, callback_on_step_end=callback)
    finally:
        assert torch.equal(run(pipe, name), alone(name, "dense")[0])


@composes(orders=())
def test_enabling_from_another_thread(name):
    pipe = build(name)
    is_in_step, may_go_on = threading.Event(), threading.Event()

    def callback(pipeline, step, timestep, kwargs):
        is_in_step.set()
        may_go_on.wait(60)
        return kwargs

    videos = []
    thread = threading.Thread(target=lambda: videos.append(run(pipe, name, callback_on_step_end=callback)))
    with torch.no_grad():
        thread.start()
    assert is_in_step.wait(60)
    try:
        switch_on(pipe, "sparse")
    finally:
        may_go_on.set()
        thread.join()
        assert torch.equal(videos[0], alone(name, "dense")[0])


@composes(orders=())
def test_threads(name):
    expected = {which: alone(name, which) for which in ("sparse", "one")}
    pipes = {which: build(name) for which in expected}
    for which, pipe in pipes.items():
        switch_on(pipe, which)
    start = threading.Barrier(len(pipes))
    videos = {which: [] for which in pipes}

    def work(which):
        start.wait(60)
        with torch.no_grad():  # a thread has its own
            for _ in range(3):
                videos[which].append((run(pipes[which], name), calls(pipes[which])))

    threads = [threading.Thread(target=work, args=(which,)) for which in pipes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which, (video, made) in expected.items():
        assert len(videos[which]) == 3
        for each in videos[which]:
            assert torch.equal(each[0], video)
            assert each[1] == made
    return BIT
