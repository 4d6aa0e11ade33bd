"""What sits on a pipeline: switching PSA on and off, and the report of what ran.

In comes a pipeline and a choice of preset. Out goes the same pipeline, with processors in its denoisers, hooks on them,
and a call that tells the clock which step is running; `disable_psa` takes all of it back.

- `enable`: `enable_psa`, `disable_psa`, and finding the denoisers
- `callback`: the call of an enabled pipeline
- `state`: what is kept on a pipeline, one typed object
- `report`: `psa_report`
- `host`: every trick that is played on diffusers and torch, with its reason and its undoing
"""
