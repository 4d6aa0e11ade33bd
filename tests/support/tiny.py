"""Small real diffusers pipelines with seeded random weights. Nothing is downloaded.

All of them by one import; the families themselves are in `tiny_models`, a file each.
"""

from __future__ import annotations

from tiny_models import ALL_CASES, CASES, MISSING, OTHER_CASES
from tiny_models.allegro import allegro
from tiny_models.case import DROP, GRID, TEXT_TOKENS, TINY_PRESET, Case
from tiny_models.cogvideox import COGVIDEOX, cogvideox, cogvideox_transformer
from tiny_models.consisid import consisid
from tiny_models.cosmos import COSMOS, Trusting, cosmos, cosmos2, cosmos_transfer, cosmos_vae
from tiny_models.easyanimate import EASYANIMATE, easyanimate, easyanimate_control
from tiny_models.framepack import framepack
from tiny_models.helios import helios
from tiny_models.hunyuan_video import (
    HUNYUAN_VIDEO,
    hunyuan_video,
    hunyuan_video_embeds,
    hunyuan_video_transformer,
    hunyuan_video_vae,
)
from tiny_models.hunyuan_video15 import hunyuan_video15
from tiny_models.kandinsky5 import kandinsky5
from tiny_models.ltx import LTX, ltx
from tiny_models.ltx2 import LTX2, ltx2
from tiny_models.mochi import mochi
from tiny_models.motif_video import motif_video
from tiny_models.parts import embedded, letters, picture, pictures, seeded, siglip, text_encoder, tokenizer
from tiny_models.skyreels_v2 import SKYREELS
from tiny_models.wan import WAN, wan, wan_i2v, wan_transformer, wan_vae
from tiny_models.wan_animate import wan_animate

_pictures = pictures
"""Under the name by which scripts outside the tests know it."""

__all__ = [
    "ALL_CASES",
    "CASES",
    "COGVIDEOX",
    "COSMOS",
    "DROP",
    "EASYANIMATE",
    "GRID",
    "HUNYUAN_VIDEO",
    "LTX",
    "LTX2",
    "MISSING",
    "OTHER_CASES",
    "SKYREELS",
    "TEXT_TOKENS",
    "TINY_PRESET",
    "WAN",
    "Case",
    "Trusting",
    "allegro",
    "cogvideox",
    "cogvideox_transformer",
    "consisid",
    "cosmos",
    "cosmos2",
    "cosmos_transfer",
    "cosmos_vae",
    "easyanimate",
    "easyanimate_control",
    "embedded",
    "framepack",
    "helios",
    "hunyuan_video",
    "hunyuan_video15",
    "hunyuan_video_embeds",
    "hunyuan_video_transformer",
    "hunyuan_video_vae",
    "kandinsky5",
    "letters",
    "ltx",
    "ltx2",
    "mochi",
    "motif_video",
    "picture",
    "pictures",
    "seeded",
    "siglip",
    "text_encoder",
    "tokenizer",
    "wan",
    "wan_animate",
    "wan_i2v",
    "wan_transformer",
    "wan_vae",
]
