"""The commands: from a prompt to a file.

In: what the user typed, and the entries of `configs/models.yaml`. Out: videos with their records, tables of figures,
presets. Attention never imports this room, and no other room prints.

- `generate`, `compare`, `calibrate`: a command each, its options, its messages and its `main`
- `batch`: the prompts of one command, and the files of every prompt
- `generation`: load a pipeline, generate a video
- `classes`: classes of diffusers by name, the scheduler of an entry
- `prompts`: prompts out of text
- `outputs`: files that are finished when they have their name
- `opening`: the options for a model and its call that `compare`, `calibrate` and the benchmarks share
- `worklist`: many prompts over several processes
- `demo`: the models that ship with the package
- `published`: the choice of levels that ours is held against
"""
