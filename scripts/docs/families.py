"""Write docs/models.md, the page of the denoiser families, from the registry.

python -m scripts.docs.families
"""

from __future__ import annotations

from pathlib import Path

from psa_diffusers import models
from psa_diffusers.models.registry import CANNOT_GAIN, Family, families
from psa_diffusers.presets import load_section

PAGE = Path(__file__).parents[2] / "docs" / "models.md"

HEAD = """# Model families

What `enable_psa` knows. `python -m scripts.docs.families` writes this page from the registry; a test keeps it current.

A family is a denoiser architecture. Any pipeline works that has such a denoiser among its components; those of
diffusers are listed. Text refiners, cross-attention and attention over sound always stay as they are. Whatever the
family, these calls are dense too, and the report says why: warm-up steps, calls with an attention mask, tokens that do
not fill the grid, head dimensions that are no multiple of 8 from 16 to 256, dtypes other than float32, float16 and
bfloat16, and ring attention.

Every family is tested on small pipelines with random weights: that it is exact where everything is read at full
resolution, that only video self-attentions change, and that all comes back. Every pipeline in the lists has run so.
(`EasyAnimateControlPipeline` of diffusers 0.42.1 fails while it encodes the prompt, with or without PSA; the test mends
that.) Presets of families without published values are the same three of our own everywhere; they have not been tuned
to the model. `calibrate` does that.

The presets of a section are in `configs/attention_config.yaml`; the section follows from the size of the denoiser.
[Adding a model](developer/adding_a_model.md) shows how to register a family of your own.
"""

CANNOT = """
## Models that cannot gain

`enable_psa` refuses them with a `TypeError` that gives the reason.

| denoiser | reason |
|---|---|
"""


def page() -> str:
    """Return the page."""
    known = sorted(own_families(), key=lambda family: family.name.casefold())
    return (
        HEAD
        + "".join(map(describe, known))
        + CANNOT
        + "".join(f"| {denoiser} | {reason} |\n" for denoiser, reason in sorted(CANNOT_GAIN.items()))
    )


def own_families() -> list[Family]:
    """The families of the package, without what others have registered."""
    return [family for family in families() if family.processor.__module__.startswith(models.__name__ + ".")]


def describe(family: Family) -> str:
    """Return the part of the page that is about one family."""
    sections = {rule.section: load_section(rule.section) for rule in family.sections if rule.section != "demo"}
    presets = "; ".join(
        f"`{name}` (default `{section.default_attention}`, {warmup_of(section)} warm-up steps)"
        for name, section in sections.items()
    )
    lines = [
        f"\n## {family.name}\n",
        f"- **denoiser**: {', '.join(family.denoisers)}",
        f"- **pipelines**: {', '.join(family.pipelines)}",
        f"- **sparse**: {family.sparse}",
        *([f"- **dense**: {family.dense}"] if family.dense else []),
        f"- **presets**: {presets}",
    ]
    return "\n".join(lines) + "\n"


def warmup_of(section) -> int:
    return section.presets[section.default_attention].warmup_steps


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
