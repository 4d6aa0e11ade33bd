"""The miniature world: small video models of the real architectures, trained and judged on clips that can be drawn.

Run as modules, from the root of the checkout:

- `train_demo`: from nothing to the folder of a pipeline, with its training curve;
- `train_lora`: from that folder to a LoRA for four steps, and a control;
- `evaluate`: from a folder, and presets, to a table of what is right in the clips, as JSON and as a contact sheet;
- `small_cogvideox`, `small_wan`: the folder of a pipeline with random weights whose attention is peaked.

`world` is the grammar of prompts and the renderer, `measure` reads from pixels what a clip shows, `model` has the sizes
and the families, `training` the steps that both trainings share, `small_parts` the parts that both small pipelines
share. Loading, generating, comparing videos and the hashes of weights are the package's: `psa_diffusers.cli`.
"""
