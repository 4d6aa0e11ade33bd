"""What the training scripts share: the clock that ends a part, float32 weights behind half-precision ones, graphs."""

import math
import time

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel


def begin(args):
    """Seed everything and make the output folder, as the options say; return the accelerator."""
    accelerator = Accelerator(cpu=args.cpu)
    set_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    return accelerator


class TrainingClock:
    """Steps of one part until its time is up: what share of it has passed, what to write down and say.

    The time counts steps only, so that a run that was interrupted goes on with what is left.
    """

    def __init__(self, owner, part, minutes, *, max_steps=None):
        self.owner, self.part, self.budget = owner, part, minutes * 60
        before = owner.state.get(part, {})
        self.step, self.spent = before.get("step", 0), before.get("seconds", 0.0)
        self.limit = owner.args.max_steps if max_steps is None else max_steps
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
            if self.by_steps:
                self.progress = self.step / max(self.limit, 1)
            elif self.owner.accelerator.num_processes == 1:
                self.progress = self.spent / self.budget if self.budget else 1.0
            elif self.step % 10 == 0:
                self.progress = self._agreed(self.spent / self.budget if self.budget else 1.0)
            over = self.progress >= 1 or (self.limit is not None and self.step >= self.limit)
            now = time.monotonic()
            if self._count and (over or now - told >= self.owner.args.log_every or self._count >= 200):
                self._write(told, told_step, say=over or now - told >= self.owner.args.log_every)
                if over or now - told >= self.owner.args.log_every:
                    told, told_step = time.monotonic(), self.step
            if over:
                return
            yield self.step
            self.step += 1
            if self.step % 10 == 0 and self._sum is not None:
                self._sum.item()  # do not let the host run ahead of the device, or the clock means nothing

    def _agreed(self, progress):
        """All processes are in the same stage. Asking takes a synchronisation, so not every step."""
        value = torch.tensor(progress, device=self.owner.device)
        return self.owner.accelerator.reduce(value, "mean").item()

    def _write(self, told, told_step, *, say):
        loss = (self._sum / self._count).item()
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss of the {self.part} is {loss} before step {self.step}")
        self._sum, self._count = None, 0
        point = {"part": self.part, "step": self.step, "seconds": round(self.spent, 1), "loss": round(loss, 5)}
        self.owner.curve.append(point)
        if say:
            speed = (self.step - told_step) / max(time.monotonic() - told, 1e-6)
            memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else ""
            self.owner.say(
                f"{self.part} {100 * min(1, self.progress):3.0f} %, step {self.step}, loss {loss:.4f}, "
                f"{speed:.1f} steps/s{memory}"
            )


class Gradients:
    """Losses and gradients of a step, on a GPU as a CUDA graph for each shape of the inputs.

    A miniature's step is a thousand small kernels: launched one by one they leave the GPU idle for most of the time.
    With several processes each has clips of its own, and gradients are their mean, in one exchange after the graph.

    Args:
        function: Takes tensors, returns the loss and whatever else shall be known, all as tensors.
        weights: Get their gradients, in place of those they had. All processes have to begin with the same ones.
        accelerator: Says where, and in how many processes.
    """

    def __init__(self, function, weights, accelerator):
        self.function, self.weights, self.accelerator = function, list(weights), accelerator
        self.by_graph = accelerator.device.type == "cuda"
        self.graphs = {}

    def __call__(self, *inputs):
        if not self.by_graph:
            results = self._run(inputs)
            self._average([weight.grad for weight in self.weights])
            return results
        key = tuple(value.shape for value in inputs)
        if key not in self.graphs:
            self.graphs[key] = self._capture(inputs)
        graph, places, results, gradients = self.graphs[key]
        for place, value in zip(places, inputs, strict=True):
            place.copy_(value)
        graph.replay()
        self._average(gradients)
        return [result.clone() for result in results]

    def _average(self, gradients):
        if self.accelerator.num_processes > 1:
            used = [gradient for gradient in gradients if gradient is not None]
            mean = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in used]), "mean")
            parts = iter(mean.split([gradient.numel() for gradient in used]))
            gradients = [None if old is None else next(parts).view_as(old) for old in gradients]
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient

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
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads watch over exchanges
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


class Muon(torch.optim.Optimizer):
    """Muon as in `torch.optim.Muon` with `match_rms_adamw`, for many small matrices: equal shapes go together.

    One matrix at a time is two thousand launches a step here, which takes longer than the step.
    """

    COEFFICIENTS = 3.4445, -4.7750, 2.0315

    def __init__(self, weights, lr=1e-3, momentum=0.95, weight_decay=0.01):
        super().__init__(weights, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for weight in group["params"]:
                shapes.setdefault(weight.shape, []).append(weight)
            for shape, weights in shapes.items():
                grads = [weight.grad for weight in weights]
                for weight in weights:
                    if not self.state[weight]:
                        self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
                sums = [self.state[weight]["momentum_buffer"] for weight in weights]
                torch._foreach_lerp_(sums, grads, 1 - group["momentum"])
                ahead = torch.stack(torch._foreach_lerp(grads, sums, group["momentum"]))
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, list(self._orthogonal(ahead).to(ahead.dtype)), alpha=-rate)

    def _orthogonal(self, stack):
        """Five steps of Newton and Schulz towards the nearest orthogonal matrices ``[N, R, C]``."""
        a, b, c = self.COEFFICIENTS
        x = stack.bfloat16()
        tall = x.shape[1] > x.shape[2]
        if tall:
            x = x.mT
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.mT if tall else x


class MasterWeights:
    """Float32 copies of the weights of a model that computes in half precision, AdamW on them, and their average.

    Args:
        model: On its device, in float32; it is cast here.
        dtype: What to compute in.
        matrices: Says by name and weight which of them Muon takes instead.
    """

    def __init__(self, model, dtype, *, matrices=lambda name, weight: False):
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
        chosen = [matrices(name, weight) for name, weight in zip(self.names, self.weights, strict=True)]
        rest = [master for master, taken in zip(self.masters, chosen, strict=True) if not taken]
        taken = [master for master, taken in zip(self.masters, chosen, strict=True) if taken]
        self.optimizers = [torch.optim.AdamW(rest, lr=1.0, betas=(0.9, 0.95), weight_decay=0.01, fused=fused)]
        if taken:
            self.optimizers.append(Muon(taken))
        self.average = EMAModel(self.masters, decay=0.999, foreach=True)

    def step(self, rate):
        """Use the gradients of the model's weights, and clear them."""
        grads = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in self.weights]
        torch._foreach_copy_([master.grad for master in self.masters], grads)
        for weight in self.weights:
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0, foreach=True)
        for optimizer in self.optimizers:
            set_rate(optimizer, rate)
            optimizer.step()
        self.average.step(self.masters)
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)

    def state(self):
        model = dict(zip(self.names, self.masters, strict=True))
        return {
            "model": {name: weight.detach() for name, weight in model.items()},
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load_state(self, state):
        """Go back to what `state` returned."""
        with torch.no_grad():
            for name, master in zip(self.names, self.masters, strict=True):
                master.copy_(state["model"][name])
            torch._foreach_copy_(self.weights, self.masters)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.average.load_state_dict(state["average"])
        self.average.to(self.masters[0].device)

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
