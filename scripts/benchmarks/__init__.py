"""Measurements: speed on this machine, and the error of a choice of levels.

Run as modules, from the root of the checkout; each prints a table, and appends or writes JSON lines where --json says:

- `attention`: time and error of psa_attention beside dense attention and its peers, on drawn inputs;
- `levels`: error against density of presets and baselines, on drawn or recorded heads; its acceptance suite has bounds;
- `parallel`: a Wan denoiser on one GPU and over several, under torchrun;
- `tune_kernel`: launches of the Triton kernels, for the table in psa_diffusers/ops/triton/tuning.py.

`fields` draws the inputs, `peers` wraps the attentions of others, `mixes` are the choices of levels that are timed and
`timing` the clocks; `heads`, `methods` and `acceptance` are what `levels` judges on, what it judges, and the bounds.
The stages, the presets and the choice that was published (`psa_diffusers.cli.published`) are the package's.
"""
