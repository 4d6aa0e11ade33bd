"""What the training scripts share: the clock that ends a part, float32 weights behind half-precision ones, graphs."""

import math
import time

import torch
from diffusers.training_utils import EMAModel


class Clock:
    """Steps of one part until its time is up: what share of it has passed, what to write down and say.

    The time counts steps only, so that a run that was interrupted goes on with what is left.
    """

    def __init__(self, job, part, minutes, *, max_steps=None):
        self.job, self.part, self.budget = job, part, minutes * 60
        before = job.state.get(part, {})
        self.step, self.spent = before.get("step", 0), before.get("seconds", 0.0)
        self.limit = job.args.max_steps if max_steps is None else max_steps
        self.by_steps = max_steps is not None
        self.progress = 0.0
        self._sum, self._count = None, 0

    def state(self):
        return {"step": self.step, "seconds": self.spent}

    def rate(self, warmup):
        """Share of the highest learning rate: up in `warmup` steps, level, and down to nothing in the second half."""
        cooldown = min(1.0, 2 * (1 - self.progress))
        return min(1.0, (self.step + 1) / warmup) * max(cooldown, 0.01)

    def note(self, loss):
        loss = loss.detach().float()
        self._sum, self._count = loss if self._sum is None else self._sum + loss, self._count + 1

    def __iter__(self):
        began, told, told_step = time.monotonic() - self.spent, time.monotonic(), self.step
        while True:
            self.spent = time.monotonic() - began
            self.progress = self._agreed(self.spent / self.budget if self.budget else 1.0)
            if self.by_steps:
                self.progress = self.step / max(self.limit, 1)
            over = self.progress >= 1 or (self.limit is not None and self.step >= self.limit)
            now = time.monotonic()
            if self._count and (over or now - told >= self.job.args.log_every or self._count >= 200):
                self._write(told, told_step, say=over or now - told >= self.job.args.log_every)
                if over or now - told >= self.job.args.log_every:
                    told, told_step = time.monotonic(), self.step
            if over:
                return
            yield self.step
            self.step += 1
            if self.step % 10 == 0 and self._sum is not None:
                self._sum.item()  # do not let the host run ahead of the device, or the clock means nothing

    def _agreed(self, progress):
        """All processes are in the same stage."""
        if self.job.accelerator.num_processes == 1:
            return progress
        value = torch.tensor(progress, device=self.job.device)
        return self.job.accelerator.reduce(value, "mean").item()

    def _write(self, told, told_step, *, say):
        loss = (self._sum / self._count).item()
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss of the {self.part} is {loss} before step {self.step}")
        self._sum, self._count = None, 0
        point = {"part": self.part, "step": self.step, "seconds": round(self.spent, 1), "loss": round(loss, 5)}
        self.job.curve.append(point)
        if say:
            speed = (self.step - told_step) / max(time.monotonic() - told, 1e-6)
            memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else ""
            self.job.say(
                f"{self.part} {100 * min(1, self.progress):3.0f} %, step {self.step}, loss {loss:.4f}, "
                f"{speed:.1f} steps/s{memory}"
            )


class Gradients:
    """Losses and gradients of a step, on one GPU as a CUDA graph for each shape of the inputs.

    A miniature's step is a thousand small kernels: launched one by one they leave the GPU idle for most of the time.

    Args:
        function: Takes tensors, returns the loss and whatever else shall be known, all as tensors.
        weights: Get their gradients, in place of those they had.
        accelerator: With several processes, or none of them on a GPU, steps run as they are written.
    """

    def __init__(self, function, weights, accelerator):
        self.function, self.weights, self.accelerator = function, list(weights), accelerator
        self.graphs = {}

    def __call__(self, *inputs):
        if self.accelerator.device.type != "cuda" or self.accelerator.num_processes > 1:
            return self._run(inputs)
        key = tuple(value.shape for value in inputs)
        if key not in self.graphs:
            self.graphs[key] = self._capture(inputs)
        graph, places, results, gradients = self.graphs[key]
        for place, value in zip(places, inputs, strict=True):
            place.copy_(value)
        graph.replay()
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient
        return [result.clone() for result in results]

    def _run(self, inputs):
        for weight in self.weights:
            weight.grad = None
        results = self.function(*inputs)
        self.accelerator.backward(results[0])
        return [result.detach() for result in results]

    def _capture(self, inputs):
        places = [value.clone() for value in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # what compiles or chooses, does so now
                self._run(places)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = self._run(places)
        return graph, places, results, [weight.grad for weight in self.weights]


def set_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate


def cast(module, dtype):
    """Cast the weights, and leave buffers alone: the rotary tables of Wan stay exact."""
    for weight in module.parameters():
        weight.data = weight.data.to(dtype)
    return module


class MasterWeights:
    """Float32 copies of the weights of a model that computes in half precision, AdamW on them, and their average.

    Args:
        model: On its device, in float32; it is cast here.
        dtype: What to compute in.
        average: State of the average to go on with.
    """

    def __init__(self, model, dtype, *, average=None):
        self.model = model
        self.names = [name for name, weight in model.named_parameters() if weight.requires_grad]
        self.masters = [
            torch.nn.Parameter(weight.detach().float().clone()) for weight in model.parameters() if weight.requires_grad
        ]
        cast(model, dtype)
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        fused = self.masters[0].device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.masters, lr=1.0, betas=(0.9, 0.95), weight_decay=0.01, fused=fused)
        self.average = EMAModel(self.masters, decay=0.999, foreach=True)
        if average is not None:
            self.average.load_state_dict(average)
            self.average.to(self.masters[0].device)

    def step(self, rate):
        """Use the gradients of the model's weights, and clear them."""
        set_rate(self.optimizer, rate)
        grads = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in self.weights]
        torch._foreach_copy_([master.grad for master in self.masters], grads)
        for weight in self.weights:
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0, foreach=True)
        self.optimizer.step()
        self.average.step(self.masters)
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)

    def state(self):
        model = dict(zip(self.names, self.masters, strict=True))
        return {
            "model": {name: weight.detach() for name, weight in model.items()},
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_average(self):
        """Put the averaged weights into the model, in float32."""
        cast(self.model, torch.float32)
        with torch.no_grad():
            for weight, mean in zip(
                (weight for weight in self.model.parameters() if weight.requires_grad),
                self.average.shadow_params,
                strict=True,
            ):
                weight.copy_(mean)
