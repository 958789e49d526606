"""Complete training configurations, one function each; `opensora train NAME` runs them."""

from collections.abc import Callable

from opensora.errors import OpenSoraError
from opensora.recipes.distill import distill_toybox, distill_toybox_two, distill_v1_2
from opensora.recipes.lora import toybox_lora, v1_2_lora, v2_0_lora
from opensora.recipes.motion_encoder import motion_encoder
from opensora.recipes.overfit import overfit
from opensora.recipes.toybox import (
    toybox,
    toybox_base,
    toybox_bilingual,
    toybox_directions,
    toybox_finished,
    toybox_given,
    toybox_growth,
    toybox_iddpm,
    toybox_iddpm_finished,
    toybox_iddpm_given,
    toybox_iddpm_taught,
    toybox_settled,
)
from opensora.recipes.toybox_judge import toybox_judge
from opensora.recipes.toybox_text import (
    toybox_text,
    toybox_text_loud,
    toybox_text_louder,
    toybox_text_read,
    toybox_text_settled,
)
from opensora.recipes.toybox_vae import (
    toybox_vae_crisp,
    toybox_vae_decoders,
    toybox_vae_frames,
    toybox_vae_latents,
    toybox_vae_pixels,
)
from opensora.recipes.v1_0 import v1_0_16x256x256, v1_0_16x256x256_hq, v1_0_16x512x512, v1_0_64x512x512, v1_0_debug
from opensora.recipes.v1_1 import v1_1_debug, v1_1_image, v1_1_stage1, v1_1_stage2, v1_1_stage3
from opensora.recipes.v1_2 import (
    v1_2_adapt_flow,
    v1_2_adapt_images,
    v1_2_adapt_temporal,
    v1_2_debug,
    v1_2_stage1,
    v1_2_stage2,
    v1_2_stage3,
)
from opensora.recipes.v1_3 import (
    v1_3_adapt,
    v1_3_adapt_i2v,
    v1_3_debug,
    v1_3_stage1,
    v1_3_stage1_hq,
    v1_3_stage1_noise,
    v1_3_stage2,
)
from opensora.recipes.v2_0 import (
    v2_0_adapt_i2v,
    v2_0_dc_debug,
    v2_0_debug,
    v2_0_high_compression,
    v2_0_image,
    v2_0_stage1,
    v2_0_stage1_i2v,
    v2_0_stage2,
    v2_0_stage2_i2v,
)
from opensora.recipes.vae_small import vae_small_frames, vae_small_stage1, vae_small_stage2, vae_small_stage3
from opensora.recipes.vae_v1_2 import vae_debug, vae_v1_2_stage1, vae_v1_2_stage2, vae_v1_2_stage3
from opensora.recipes.vae_whole import (
    vae_v1_3,
    vae_v1_3_debug,
    vae_v2_0_dc_debug,
    vae_v2_0_dc_stage1,
    vae_v2_0_dc_stage2,
)
from opensora.settings import nearest_name
from opensora.training.config import Recipe

RECIPES: tuple[Callable[[], Recipe], ...] = (
    toybox_vae_frames,
    toybox_vae_latents,
    toybox_vae_pixels,
    toybox_vae_decoders,
    toybox_vae_crisp,
    toybox_judge,
    motion_encoder,
    toybox_base,
    toybox,
    toybox_given,
    toybox_iddpm,
    toybox_iddpm_given,
    toybox_text,
    toybox_text_read,
    toybox_bilingual,
    toybox_text_loud,
    toybox_directions,
    toybox_text_louder,
    toybox_growth,
    toybox_text_settled,
    toybox_settled,
    toybox_finished,
    toybox_iddpm_taught,
    toybox_iddpm_finished,
    toybox_lora,
    distill_toybox,
    distill_toybox_two,
    v1_0_16x256x256,
    v1_0_16x256x256_hq,
    v1_0_16x512x512,
    v1_0_64x512x512,
    v1_0_debug,
    v1_1_image,
    v1_1_stage1,
    v1_1_stage2,
    v1_1_stage3,
    v1_1_debug,
    v1_2_adapt_flow,
    v1_2_adapt_images,
    v1_2_adapt_temporal,
    v1_2_stage1,
    v1_2_stage2,
    v1_2_stage3,
    v1_2_lora,
    distill_v1_2,
    v1_2_debug,
    v1_3_adapt,
    v1_3_stage1,
    v1_3_stage1_hq,
    v1_3_stage1_noise,
    v1_3_stage2,
    v1_3_adapt_i2v,
    v1_3_debug,
    v2_0_image,
    v2_0_stage1,
    v2_0_stage1_i2v,
    v2_0_stage2,
    v2_0_stage2_i2v,
    v2_0_high_compression,
    v2_0_adapt_i2v,
    v2_0_lora,
    v2_0_debug,
    v2_0_dc_debug,
    overfit,
    vae_debug,
    vae_small_frames,
    vae_small_stage1,
    vae_small_stage2,
    vae_small_stage3,
    vae_v1_2_stage1,
    vae_v1_2_stage2,
    vae_v1_2_stage3,
    vae_v1_3_debug,
    vae_v1_3,
    vae_v2_0_dc_debug,
    vae_v2_0_dc_stage1,
    vae_v2_0_dc_stage2,
)


def find_recipe(name: str) -> Recipe:
    """The recipe of that name; dashes count as underscores.

    Raises:
        OpenSoraError: there is none.
    """
    by_name = {function.__name__: function for function in RECIPES}
    if name.replace("-", "_") not in by_name:
        raise OpenSoraError(f"unknown recipe {name!r}{nearest_name(name, by_name)}")
    return by_name[name.replace("-", "_")]()
