"""LoRAs: load one into a pipeline, checked first, and take it out again with all that it brought.

In: a pipeline of diffusers and the file of a LoRA. Out: the same pipeline with an active adapter. A LoRA that was
distilled to a few steps with PSA also sets the scheduler, the defaults of the call and the default preset.

- `load`: `load_psa_lora` and `unload_psa_lora`, the flow from a file to an active adapter and back
- `files`: find the file
- `content`: read it; nothing in it is trusted
- `check`: compare its keys, shapes and values with the denoisers
- `metadata`: the settings of peft in it that count, by the names of modules
- `restore`: the pipeline as it was, after a load that failed half-way
- `recipes`: the published few-step LoRAs, how they are recognised and what they need
- `adapters`: which adapters of peft there are, in the weights or beside them
- `undo`: what a few-step LoRA sets in a pipeline, and how it goes back
"""

from psa_diffusers.lora.check import check_lora
from psa_diffusers.lora.load import load_psa_lora, unload_psa_lora
from psa_diffusers.lora.recipes import Recipe
from psa_diffusers.lora.undo import recipe_of

__all__ = ["Recipe", "check_lora", "load_psa_lora", "recipe_of", "unload_psa_lora"]
