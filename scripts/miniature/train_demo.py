"""Train a miniature video model in exactly the architecture of CogVideoX or Wan, on clips that are drawn as it trains.

    python -m scripts.miniature.train_demo --family cogvideox --minutes 5 --output runs/cogvideox       one GPU
    accelerate launch -m scripts.miniature.train_demo --family wan --minutes 5 --output runs/wan        several
    python -m scripts.miniature.train_demo --family wan --preset small --minutes 20 --output runs/wan   a CPU

On a CPU the small preset learns shapes that move.

First the VAE; then the text encoder by itself, in a few seconds: the embedding of each word has to tell all that its
phrase says; then transformer and text encoder together. The clock decides: whatever there is when the time is up is
saved, as averaged weights in half precision, in a folder that `from_pretrained` loads (OUTPUT/pipeline), with the
training curve beside it (OUTPUT/curve.json). Started again with the same OUTPUT, it goes on where it stopped.
"""

import argparse
import copy
import itertools
import json
import random
import sys
import time
from pathlib import Path


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("cogvideox", "wan"), required=True)
    parser.add_argument(
        "--preset", choices=("miniature", "small", "toy"), default="miniature", help="size of the model"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the pipeline, the curve and the state")
    parser.add_argument("--vae_minutes", type=float, default=1.0, help="of training the VAE (default: 1)")
    parser.add_argument("--minutes", type=float, default=4.0, help="of training the transformer (default: 4)")
    parser.add_argument("--init", type=Path, help="folder of a pipeline of this size whose weights to start from")
    parser.add_argument("--keep_vae", action="store_true", help="do not train the VAE of --init any further")
    parser.add_argument("--keep_text", action="store_true", help="nor its text encoder by itself")
    parser.add_argument("--new_text", action="store_true", help="take all of --init but the text encoder")
    parser.add_argument("--max_steps", type=int, help="stop each part after so many steps, whatever the clock says")
    parser.add_argument("--compile", action="store_true", help="compile the blocks: faster steps, a slower start")
    parser.add_argument("--learning_rate", type=float, help="highest one of the transformer (default: the preset's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="train on the CPU even if there is a GPU")
    parser.add_argument("--log_every", type=float, default=20.0, help="seconds between two lines (default: 20)")
    args = parser.parse_args(argv)
    if (args.keep_vae or args.keep_text or args.new_text) and args.init is None:
        parser.error("--keep_vae, --keep_text and --new_text mean something with --init only")
    if args.keep_text and args.new_text:
        parser.error("--keep_text and --new_text exclude each other")
    return args


def main(argv=None):
    args = parse(argv)
    import torch  # late: --help answers at once

    from .training import begin

    torch.set_float32_matmul_precision("high")
    training = Training(args, begin(args))
    training.train_vae()
    training.train_text()
    try:
        training.train_transformer()
    finally:  # whatever was learned before something went wrong
        training.finish()
    return 0


class Training:
    """One miniature: its parts, its clock, its curve."""

    def __init__(self, args, accelerator):
        import torch

        from . import model

        self.args, self.accelerator, self.device = args, accelerator, accelerator.device
        self.family, self.size = model.FAMILIES[args.family], model.SIZES[args.preset]
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.rng = random.Random(f"{args.seed} {accelerator.process_index}")
        self.generator = torch.Generator(self.device).manual_seed(args.seed * 1000 + accelerator.process_index)
        self.pipe = model.build_pipeline(self.family, self.size)
        self.path = args.output / "state.pt"
        self.state = torch.load(self.path, map_location="cpu", weights_only=True) if self.path.is_file() else {}
        self.curve = self.state.get("curve", [])
        self.masters = None
        if self.state:
            self.say(f"going on from {self.path}: {len(self.curve)} points of the curve")
        elif args.init is not None:
            start = type(self.pipe).from_pretrained(args.init)
            for name in ("vae", "transformer", *(() if args.new_text else ("text_encoder",))):
                getattr(self.pipe, name).load_state_dict(getattr(start, name).state_dict())
            self.pipe.vae.register_to_config(**{
                key: start.vae.config[key] for key in ("scaling_factor", "latents_mean", "latents_std")
                if start.vae.config.get(key) is not None
            })  # fmt: skip
            self.say(f"starting from {args.init}")

    def say(self, text):
        if self.accelerator.is_main_process:
            print(f"{self.args.family}: {text}", flush=True)

    def clips(self, number, *, frames, pixels):
        """Scenes, and the clips ``[B, 3, F, H, W]`` that show them."""
        from . import world

        scenes = [world.draw_scene(self.rng) for _ in range(number)]
        packed = {key: value.to(self.device) for key, value in world.pack(scenes, self.rng).items()}
        return scenes, world.render(packed, frames=frames, size=pixels)

    # --- the VAE

    def train_vae(self):
        import torch
        import torch.nn.functional as F

        from . import model
        from .training import Gradients, TrainingClock, set_rate

        vae = self.pipe.vae.to(self.device)
        if "vae" in self.state:
            vae.load_state_dict(self.state["vae"])
            vae.register_to_config(**self.state["vae_config"])
        if self.args.keep_vae or self.state.get("vae_done"):
            return
        vae.train()
        trained = model.AutoEncoder(vae)
        optimizer = torch.optim.AdamW(vae.parameters(), lr=1.0, betas=(0.9, 0.99), weight_decay=0.0)
        batches = self.size.vae_batches
        clock = TrainingClock(self, "vae", self.args.vae_minutes)

        def losses(video):
            with torch.autocast(self.device.type, self.dtype, enabled=self.device.type == "cuda"):
                restored, mean, kl = trained(video)
            restored, mean = restored.float(), mean.float()
            error = F.l1_loss(restored, video) + 2 * F.mse_loss(restored, video)
            # latents that a diffusion model likes: every channel around 0 with deviation 1
            moments = mean.mean((0, 2, 3, 4)).square().mean() + (mean.std((0, 2, 3, 4)) - 1).square().mean()
            return error + 1e-3 * kl + 0.02 * moments, error

        gradients = Gradients(losses, vae.parameters(), self.accelerator)
        for step in clock:
            pixels, frames, clips = batches[step % len(batches)]
            _, video = self.clips(clips, frames=frames, pixels=pixels)
            _, error = gradients(video)
            set_rate(optimizer, 3e-3 * clock.rate(warmup=50))
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            clock.note(error)
        vae.eval().requires_grad_(False)
        with torch.no_grad():
            videos = [self.clips(4, frames=self.size.frames, pixels=self.size.pixels)[1] for _ in range(8)]
            means = [vae.encode(video).latent_dist.mode() for video in videos]
            self.family.set_statistics(vae, torch.cat(means).float())
            restored = vae.decode(means[0]).sample
            psnr = -10 * torch.log10((restored - videos[0]).square().mean() / 4).item()
        self.curve.append({"part": "vae", "psnr": round(psnr, 2)})
        self.say(f"vae: PSNR {psnr:.1f} dB")
        self.state |= {"vae_done": True, "vae": vae.state_dict(), "vae_config": _statistics(vae)}
        self.save_state()

    # --- the text encoder by itself

    def train_text(self):
        """A transformer learns slowly which colour belongs to which shape when embeddings leave that to it."""
        import torch
        import torch.nn.functional as F

        from . import model, world
        from .training import Gradients, TrainingClock, set_rate

        if self.args.keep_text or "model" in self.state:
            return
        encoder = self.pipe.text_encoder.to(self.device).train()
        reader = torch.nn.Linear(encoder.config.d_model, len(world.FACTS)).to(self.device)
        weights = [*encoder.parameters(), *reader.parameters()]
        optimizer = torch.optim.AdamW(weights, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0)

        def read(ids):
            return reader(self.family.text(encoder, ids))

        def losses(ids, stated, words):
            errors = F.binary_cross_entropy_with_logits(read(ids), stated, reduction="none").sum(-1)
            return ((errors * words).sum() / words.sum(),)

        def batch(scenes):
            ids = model.token_ids([scene.prompt for scene in scenes], model.TEXT_TOKENS, self.pipe.tokenizer)
            return [x.to(self.device) for x in (ids, *model.facts(scenes, model.TEXT_TOKENS))]

        limit = min(self.size.text_steps, self.args.max_steps or self.size.text_steps)
        clock = TrainingClock(self, "text", 0, max_steps=limit)
        gradients = Gradients(losses, weights, self.accelerator)
        for _ in clock:
            (loss,) = gradients(*batch([world.draw_scene(self.rng) for _ in range(64)]))
            set_rate(optimizer, 2e-3 * clock.rate(warmup=50))
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            clock.note(loss)
        with torch.no_grad():
            ids, stated, words = batch(world.held_out_scenes(256))
            right = ((read(ids) > 0) == (stated > 0)).all(-1) | (words == 0)
        share = right.all(-1).float().mean().item()
        self.curve.append({"part": "text", "read": round(share, 4)})
        self.say(f"text: {share:.1%} of held-out prompts are read without an error")

    # --- transformer and text encoder

    def train_transformer(self):
        import torch

        from . import model
        from .training import Gradients, MasterWeights, TrainingClock, cast

        # a copy: rounding to half precision for speed must not reach what is saved
        vae = cast(copy.deepcopy(self.pipe.vae), self.dtype).to(self.device).eval().requires_grad_(False)
        denoiser = model.Denoiser(self.family, self.pipe.text_encoder, self.pipe.transformer)
        if self.args.compile:
            for block in getattr(self.pipe.transformer, "transformer_blocks", None) or self.pipe.transformer.blocks:
                block.compile(dynamic=False)
        masters = MasterWeights(denoiser.to(self.device), self.dtype, matrices=model.is_matrix)
        if "model" in self.state:
            masters.load_state(self.state)
        denoiser.train()
        peak = self.args.learning_rate or self.size.learning_rate
        clock = TrainingClock(self, "transformer", self.args.minutes)
        self.masters = masters
        extras, saved, pool = {}, time.monotonic(), []

        def losses(ids, noisy, timesteps, target):
            predicted = denoiser(ids, noisy.to(self.dtype), timesteps, extras[noisy.shape])
            return ((predicted.float() - target).square().mean(),)

        gradients = Gradients(losses, masters.weights, self.accelerator)
        for step in clock:
            pixels, clips = self.stage(clock.progress)
            # drawing and encoding clips costs as much as a step or more, so each batch serves several, with new noise
            if step % self.size.uses == 0 or not pool or pool[0][2] != pixels:
                scenes, video = self.clips(clips, frames=self.size.frames, pixels=pixels)
                with torch.no_grad():
                    latents = self.family.latents(vae, video.to(self.dtype))
                pool = [batch for batch in pool if batch[2] == pixels][1 - self.size.pool :]
                pool.append((scenes, latents, pixels))
            scenes, clean = self.rng.choice(pool)[:2]
            clean = clean.float()
            # the pipeline's own text length now and then, so that a call without arguments works
            long = step % 16 == 15
            ids = self.token_ids(scenes, self.family.default_text_tokens if long else None)
            with torch.no_grad():
                noise = torch.randn(clean.shape, generator=self.generator, device=self.device)
                noisy, timesteps, target = self.family.noised(self.pipe, clean, noise, self.generator)
                if clean.shape not in extras:
                    extras[clean.shape] = self.family.extras(self.pipe, clean)
            # not worth compiling once more
            with torch.compiler.set_stance("force_eager" if long else "default"):
                (loss,) = gradients(ids, noisy, timesteps, target)
            masters.step(peak * clock.rate(warmup=100))
            clock.note(loss)
            if time.monotonic() - saved > 60:
                self.save_state(clock)
                saved = time.monotonic()
        self.save_state(clock)

    def stage(self, progress):
        ends = itertools.accumulate(share for share, _, _ in self.size.stages)
        running = [stage for end, stage in zip(ends, self.size.stages, strict=True) if progress < end]
        return (running or self.size.stages[-1:])[0][1:]

    def token_ids(self, scenes, length):
        from . import model

        prompts = ["" if self.rng.random() < 0.1 else scene.prompt for scene in scenes]
        return model.token_ids(prompts, length or model.TEXT_TOKENS, self.pipe.tokenizer).to(self.device)

    # --- results

    def save_state(self, clock=None):
        import torch

        if clock is not None:
            self.state |= {**self.masters.state(), clock.part: clock.state()}
        self.state["curve"] = self.curve
        if self.accelerator.is_main_process:
            part = self.path.with_suffix(".part")
            torch.save(self.state, part)
            part.replace(self.path)

    def finish(self):
        import torch

        from psa_diffusers.cli.demo import write_hashes

        from .training import cast

        if not self.accelerator.is_main_process or self.masters is None:
            return
        self.masters.load_average()
        # the text encoder is small, and transformers would load it in the precision of its file
        for name, dtype in (("vae", torch.float16), ("transformer", torch.float16), ("text_encoder", torch.float32)):
            cast(getattr(self.pipe, name), dtype).cpu()
        self.pipe.save_pretrained(self.args.output / "pipeline")
        for file in ("model_index.json", "tokenizer/tokenizer_config.json"):
            path = self.args.output / "pipeline" / file
            # transformers 5 writes a name that 4 does not know; both know the older one
            text = path.read_text(encoding="utf-8").replace("TokenizersBackend", "PreTrainedTokenizerFast")
            path.write_text(text, encoding="utf-8")
        write_hashes(self.args.output / "pipeline")
        record = {
            "family": self.args.family,
            "preset": self.args.preset,
            "seed": self.args.seed,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU",
            "torch": torch.__version__,
            "curve": self.curve,
        }
        (self.args.output / "curve.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
        self.say(f"saved {self.args.output / 'pipeline'}")


def _statistics(vae):
    names = ("scaling_factor", "latents_mean", "latents_std")
    return {name: vae.config[name] for name in names if vae.config.get(name) is not None}


if __name__ == "__main__":
    sys.exit(main())
