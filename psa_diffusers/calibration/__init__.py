"""Calibration: look at the self-attentions of a running pipeline, and find the preset that meets a target.

In: a pipeline and prompts. Out: a file with q, k, v of its self-attentions, or a preset with the densities that each
layer needs in each part of the run.

- `tap`: hand q, k, v of the self-attentions to a function
- `record`: `record_qkv`, which writes them to a file; `writer` is that file, `journal` what a kill leaves of it
- `target`: `calibrate`, the flow from a target to a preset
- `measure`: the errors of a ladder of densities (`ladder`), layer by layer; `notebook` keeps them
- `search`: choose a density for each layer
- `assemble`: the preset of that choice, and its file
- `places`: where files can be written, and how they are written whole
"""

from psa_diffusers.calibration.record import Recording, record_qkv, recover_recording
from psa_diffusers.calibration.tap import Call, tap_qkv
from psa_diffusers.calibration.target import Calibration, calibrate

__all__ = ["Calibration", "Call", "Recording", "calibrate", "record_qkv", "recover_recording", "tap_qkv"]
