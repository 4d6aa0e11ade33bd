"""What the user chose: presets of attention, and the models that the commands load.

In comes the name of a preset, a YAML file, or changes by the names of the YAML. Out goes a `PSAPreset`: a frozen object
that has checked itself and that gives the settings of every step and layer. `configs/attention_config.yaml` holds the
presets by section, `configs/models.yaml` the entries of the commands. One loader lays a file of the user's over either.

    schema          `PSAPreset`, its parts and its key
    ratios          intervals of pooling factors
    changes         other settings for some steps and layers
    ranges          steps and layers as people write them
    ignored         keys of the original project that decide nothing here
    sections        from a section and a name to a preset
    model_entries   `ModelEntry`: checkpoint, size, steps, scheduler
    files           the loader of both YAML files
    plain           YAML text as plain values, with nothing looked up elsewhere
    values          plain values, their keys, and the way to a typed object

Nothing here knows tensors, denoisers or pipelines.
"""

from psa_diffusers.presets.model_entries import (
    LoraSource,
    ModelEntry,
    SchedulerChoice,
    list_model_entries,
    load_model_entry,
)
from psa_diffusers.presets.ranges import check_ranges, in_ranges
from psa_diffusers.presets.ratios import parse_mask_ratios
from psa_diffusers.presets.schema import BlockSize, PSAPreset, SimThresholds, preset_of_key
from psa_diffusers.presets.sections import Section, VideoScale, list_presets, load_preset, load_section
from psa_diffusers.presets.values import parse_overrides

__all__ = [
    "BlockSize",
    "LoraSource",
    "ModelEntry",
    "PSAPreset",
    "SchedulerChoice",
    "Section",
    "SimThresholds",
    "VideoScale",
    "check_ranges",
    "in_ranges",
    "list_model_entries",
    "list_presets",
    "load_model_entry",
    "load_preset",
    "load_section",
    "parse_mask_ratios",
    "parse_overrides",
    "preset_of_key",
]
