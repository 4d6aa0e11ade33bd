"""Distil a CogVideoX miniature to four steps without guidance: a LoRA whose student runs pyramid sparse attention.

    python -m scripts.miniature.train_lora --model runs/cogvideox/pipeline --output runs/lora       one GPU, 4 minutes
    accelerate launch -m scripts.miniature.train_lora --model runs/cogvideox/pipeline --output runs/lora      several

Trajectory distillation. The teacher, dense and with guidance, runs DDIM from noise to video; kept are its states at the
four timesteps of the student and the end. The student, which sees no guidance, starts from the same noise and learns to
go, in one DDIM step each, from its own state (as it stands, no gradient through the steps before) to the teacher's next
one. First with dense attention, then with PSA; and, as a control, dense for as many more steps. The output:

    OUTPUT/psa/pytorch_lora_weights.safetensors      trained with PSA: for load_psa_lora(pipe, ..., few_steps=False)
    OUTPUT/dense/pytorch_lora_weights.safetensors    the control
    OUTPUT/curve.json                                losses, settings
"""

import argparse
import copy
import json
import random
import sys
import time
from pathlib import Path

STEPS = 4


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", required=True, help="folder of a CogVideoX pipeline of the miniature world, or `demo`"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for both LoRAs and the curve")
    parser.add_argument("--attention_preset", default="psa_4steps", help="of the student (default: psa_4steps)")
    parser.add_argument("--rank", type=int, default=48, help="of the LoRA (default: 48)")
    parser.add_argument("--rollout_minutes", type=float, default=0.8, help="of the teacher (default: 0.8)")
    parser.add_argument("--dense_minutes", type=float, default=0.9, help="of the dense student (default: 0.9)")
    parser.add_argument("--psa_minutes", type=float, default=1.3, help="of the sparse student (default: 1.3)")
    parser.add_argument("--teacher_steps", type=int, default=20, help="a multiple of 4 that divides 1000 (default: 20)")
    parser.add_argument("--guidance_scale", type=float, default=4.0, help="of the teacher (default: 4)")
    parser.add_argument("--batch", type=int, default=8, help="clips a step (default: 8)")
    parser.add_argument("--rollout_batch", type=int, default=64, help="clips of the teacher at a time (default: 64)")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--max_steps", type=int, help="stop each part after so many steps, whatever the clock says")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="train on the CPU even if there is a GPU")
    parser.add_argument("--log_every", type=float, default=20.0, help="seconds between two lines (default: 20)")
    args = parser.parse_args(argv)
    if args.teacher_steps % STEPS or 1000 % args.teacher_steps:
        parser.error(f"--teacher_steps must be a multiple of {STEPS} that divides 1000, got {args.teacher_steps}")
    if args.rank == 64:
        # load_psa_lora takes a LoRA of this form and rank 64 for the published one, which has another schedule
        parser.error("--rank 64 would be taken for the published LoRA; choose another")
    return args


def main(argv=None):
    args = parse(argv)
    from .training import begin  # late: --help answers at once

    distillation = Distillation(args, begin(args))
    distillation.roll_out()
    distillation.distil()
    return 0


class Distillation:
    """One teacher, its trajectories, and the students that follow them."""

    def __init__(self, args, accelerator):
        import torch

        from psa_diffusers import disable_psa, enable_psa
        from psa_diffusers.cli.generation import load_pipeline, resolve_model

        torch.set_float32_matmul_precision("high")
        self.args, self.accelerator, self.device = args, accelerator, accelerator.device
        self.state, self.curve = {}, []
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.pipe = load_pipeline(resolve_model(args.model), device=str(self.device))
        self.pipe.transformer.requires_grad_(False)
        self.pipe.text_encoder.requires_grad_(False)
        for part in (self.pipe.transformer, self.pipe.text_encoder):
            for weight in part.parameters():
                weight.data = weight.data.to(self.dtype)
        rank = accelerator.process_index  # every process has a teacher of its own
        self.rng = random.Random(f"{args.seed} lora {rank}")
        self.generator = torch.Generator(self.device).manual_seed(args.seed * 1000 + rank)
        scheduler = self.pipe.scheduler
        if type(scheduler).__name__ != "CogVideoXDDIMScheduler" or scheduler.config.prediction_type != "v_prediction":
            raise SystemExit(
                f"error: {args.model} is no CogVideoX miniature: its scheduler is {type(scheduler).__name__}"
            )
        try:  # before minutes have passed
            enable_psa(self.pipe, args.attention_preset, warmup_steps=0)
        except ValueError as error:
            raise SystemExit(f"error: {error}") from None
        disable_psa(self.pipe)
        scheduler.set_timesteps(STEPS, device=self.device)
        self.timesteps = scheduler.timesteps.tolist()
        alphas = scheduler.alphas_cumprod.double()
        self.alphas = [float(alphas[step]) for step in self.timesteps] + [float(scheduler.final_alpha_cumprod)]

    def say(self, text):
        if self.accelerator.is_main_process:
            print(f"lora: {text}", flush=True)

    # --- the teacher

    def roll_out(self):
        """Keep states ``[STEPS + 1, B, F, C, H, W]`` of the teacher, and the embeddings of the prompts."""
        import torch

        from . import model, world

        args, pipe = self.args, self.pipe
        family = model.FAMILIES["cogvideox"]
        config = pipe.transformer.config
        shape = ((config.sample_frames - 1) // 4 + 1, config.in_channels, config.sample_height, config.sample_width)
        states, texts = [], []
        began = told = time.monotonic()
        with torch.no_grad():
            empty = family.text(pipe.text_encoder, self.ids([""]))
            while True:
                scenes = [world.draw_scene(self.rng) for _ in range(args.rollout_batch)]
                text = family.text(pipe.text_encoder, self.ids([scene.prompt for scene in scenes]))
                both = torch.cat([empty.expand_as(text), text])
                x = torch.randn(len(text), *shape, generator=self.generator, device=self.device)
                self.extras = family.extras(pipe, x)
                pipe.scheduler.set_timesteps(args.teacher_steps, device=self.device)
                kept = [x]
                for number, step in enumerate(pipe.scheduler.timesteps):
                    without, with_text = self.predict(x.repeat(2, 1, 1, 1, 1), both, int(step)).chunk(2)
                    guided = torch.lerp(without, with_text, args.guidance_scale)
                    x = pipe.scheduler.step(guided, step, x, return_dict=False)[0].float()
                    if (number + 1) % (args.teacher_steps // STEPS) == 0:
                        kept.append(x)
                states.append(torch.stack(kept).half())  # finer than bfloat16: their differences are the targets
                texts.append(text)
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                now = time.monotonic()
                if now - told > args.log_every:
                    self.say(f"teacher: {sum(map(len, texts))} clips in {now - began:.0f} s")
                    told = now
                enough = args.max_steps is not None and len(states) >= args.max_steps
                if enough or now - began >= 60 * args.rollout_minutes:
                    break
        self.states, self.texts = torch.cat(states, 1), torch.cat(texts)
        self.say(f"teacher: {len(self.texts)} clips of {args.teacher_steps} steps")
        self.curve.append(
            {
                "part": "teacher",
                "clips": len(self.texts) * self.accelerator.num_processes,
                "seconds": round(time.monotonic() - began, 1),
            }
        )

    def ids(self, prompts):
        from . import model

        return model.token_ids(prompts, model.TEXT_TOKENS, self.pipe.tokenizer).to(self.device)

    def predict(self, x, text, step):
        """The transformer's v, float32."""
        import torch

        return self.pipe.transformer(
            hidden_states=x.to(self.dtype),
            encoder_hidden_states=text,
            timestep=torch.full((len(x),), step, device=self.device),
            return_dict=False,
            **self.extras,
        )[0].float()

    # --- the students

    def distil(self):
        import torch
        from peft import LoraConfig

        from psa_diffusers import disable_psa, enable_psa

        from .training import MasterWeights

        transformer = self.pipe.transformer
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        transformer.add_adapter(
            LoraConfig(r=self.args.rank, lora_alpha=self.args.rank, init_lora_weights=True, target_modules=targets)
        )
        transformer.train()
        masters = MasterWeights(transformer, self.dtype)
        self.train("dense", masters, self.args.dense_minutes, cooldown=False)
        shared = copy.deepcopy(masters.state())

        enable_psa(self.pipe, self.args.attention_preset, warmup_steps=0)
        steps = self.train("psa", masters, self.args.psa_minutes)
        disable_psa(self.pipe)
        self.save("psa", masters)

        masters.load_state(shared)
        self.train("control", masters, 60.0, max_steps=steps)
        self.save("dense", masters)
        if not self.accelerator.is_main_process:
            return
        record = {
            "processes": self.accelerator.num_processes,
            "settings": {key: str(value) for key, value in vars(self.args).items()},
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU",
            "timesteps": self.timesteps,
            "curve": self.curve,
        }
        (self.args.output / "curve.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
        self.say(f"saved {self.args.output / 'psa'} and {self.args.output / 'dense'}")

    def train(self, part, masters, minutes, *, cooldown=True, max_steps=None):
        """Follow the teacher until the time is up or the steps are done; return how many there were."""
        import torch

        from .training import Gradients, TrainingClock

        def losses(teacher, text):
            x, total = teacher[0], 0.0
            for number in range(STEPS):
                now, then = self.alphas[number], self.alphas[number + 1]
                predicted = self.predict(x, text, self.timesteps[number])
                # what the student takes for the clean video, and what would lead to the teacher's next state
                clean = now**0.5 * x - (1 - now) ** 0.5 * predicted
                keep = ((1 - then) / (1 - now)) ** 0.5
                add = then**0.5 - now**0.5 * keep
                target = (teacher[number + 1] - keep * x) / add
                total = total + (clean - target).square().mean() / STEPS
                x = keep * x + add * clean.detach()
            return (total,)

        clock = TrainingClock(self, part, minutes, max_steps=max_steps)
        gradients = Gradients(losses, masters.weights, self.accelerator)
        for _ in clock:
            chosen = torch.randint(
                self.states.shape[1], (self.args.batch,), generator=self.generator, device=self.device
            )
            (loss,) = gradients(self.states[:, chosen].float(), self.texts[chosen])
            rate = clock.rate(warmup=20) if cooldown else min(1.0, (clock.step + 1) / 20)
            masters.step(self.args.learning_rate * rate)
            clock.note(loss)
        return clock.step

    def save(self, name, masters):
        """Write the averaged LoRA in half precision, under the keys that published ones have."""
        import torch
        from diffusers import CogVideoXPipeline
        from peft import get_peft_model_state_dict

        from psa_diffusers.cli.demo import write_hashes

        if not self.accelerator.is_main_process:
            return
        with torch.no_grad():
            current = [weight.detach().clone() for weight in masters.weights]
            torch._foreach_copy_(masters.weights, masters.average.shadow_params)
            layers = {
                key: weight.detach().to("cpu", torch.float16).contiguous()
                for key, weight in get_peft_model_state_dict(self.pipe.transformer).items()
            }
            torch._foreach_copy_(masters.weights, current)
        CogVideoXPipeline.save_lora_weights(self.args.output / name, transformer_lora_layers=layers)
        write_hashes(self.args.output / name)


if __name__ == "__main__":
    sys.exit(main())
