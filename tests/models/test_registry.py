"""What is written down about families: their tiny pipelines, docs, presets, and the upstream code that they mirror."""

import hashlib
import inspect
from types import SimpleNamespace

import diffusers
import pytest
from tiny import ALL_CASES, MISSING, OTHER_CASES
from watch import find_class, mirrored

from psa_diffusers.models.registry import CANNOT_GAIN, families
from psa_diffusers.pipelines.enable import enable_psa
from psa_diffusers.presets import load_section
from scripts.docs.families import PAGE, page

IS_NEWEST = diffusers.__version__.startswith("0.42.")
"""Whether this is the newest diffusers that pyproject.toml allows; older ones have fewer families."""


def test_every_family_has_a_tiny_pipeline():
    without = {family.name for family in families()} - {case.family for case in (ALL_CASES | MISSING).values()}
    assert not without, f"add a tiny pipeline of {', '.join(sorted(without))} to tests/support/tiny_models"


def test_every_pipeline_that_is_listed_has_run():
    if not IS_NEWEST:
        pytest.skip(f"diffusers {diffusers.__version__} has not all of them")
    listed = {pipeline for family in families() for pipeline in family.pipelines}
    assert listed == {case.pipeline for case in (ALL_CASES | OTHER_CASES).values()}


def test_this_diffusers_has_every_pipeline():
    if MISSING:
        names = ", ".join(sorted({case.pipeline for case in MISSING.values()}))
        pytest.skip(f"diffusers {diffusers.__version__} has no {names}, or in another form")


def test_the_page_is_what_the_registry_says():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m scripts.docs.families"


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_denoisers_and_pipelines_of_a_family_exist(family):
    missing = [name for name in (*family.denoisers, *family.pipelines) if not hasattr(diffusers, name)]
    if missing and not IS_NEWEST:
        pytest.skip(f"diffusers {diffusers.__version__} has no {', '.join(missing)}")
    assert not missing


def test_denoisers_that_cannot_gain_are_refused_with_the_reason():
    latte = diffusers.LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=8, patch_size=2,
        cross_attention_dim=16, caption_channels=16,
    )  # fmt: skip
    pipe = SimpleNamespace(components={"transformer": latte})
    with pytest.raises(TypeError, match="cannot make LatteTransformer3DModel faster: its attention is split"):
        enable_psa(pipe)
    if IS_NEWEST:
        assert not [name for name in CANNOT_GAIN if not hasattr(diffusers, name)]
    assert not [name for name in CANNOT_GAIN if name in {each for family in families() for each in family.denoisers}]


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_every_section_of_a_family_exists(family):
    for rule in family.sections:
        assert load_section(rule.section).presets


@pytest.mark.parametrize("upstream", mirrored())
def test_upstream_processor_is_one_that_we_mirror(upstream):
    cls = find_class(upstream)
    if cls is None:
        pytest.skip(f"diffusers {diffusers.__version__} has no {upstream}")
    digest = hashlib.sha256(inspect.getsource(cls.__call__).encode()).hexdigest()[:12]
    assert digest in mirrored()[upstream], (
        f"{upstream}.__call__ is new in diffusers {diffusers.__version__} (digest {digest}). Compare it with the "
        "__call__ of our processor in psa_diffusers/models/: order of projection, norm and rotary embedding, fused "
        "projections, new arguments. Port what matters, then add the digest to UPSTREAM_DIGESTS."
    )
