"""What sits in a denoiser: attention processors, and what they share while a pipeline runs.

In come the arguments of an attention module's call, and from a hook before each forward of the denoiser its inputs. Out
goes what the upstream processor would return, and a note for the report.

- `base`: a call from start to end, dense or sparse; the families override how they project and put out
- `sparse`: how the sparse half runs: without padding, with a kept schedule, over several GPUs
- `run`: `Run`, shared by the processors of a pipeline
- `calls`: how it hears of the calls of pipelines
- `site`: `Site`, what a forward of one denoiser tells
- `clock`: which denoising step is running
- `reuse`: schedules that serve several steps
- `ulysses`: one video over several GPUs
- `dense`: the fastest dense kernel, for calls that stay dense
- `choice`: from what the user asked for to a denoiser's preset
- `standalone`: `PSAProcessor`, which users hand to diffusers themselves
- `recorder`: the notes
"""
