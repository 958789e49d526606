"""What weights are, told by their names and shapes alone: no data is read, no configuration believed.

`identify` names the network that tensors belong to and as much of its configuration as shapes give away. What they do
not give away (a position scale, the order of two operations) is named too, with what the published models use, so that
nobody takes a default for a fact.
"""

from collections.abc import Mapping

from opensora.models.families import formats
from opensora.models.format import Identity, Kind, Shaped, TensorShapes

# Names that give away a network that this package cannot run, in the order in which they are looked for.
_FOREIGN: tuple[tuple[Kind, str, str, tuple[str, ...]], ...] = (
    ("transformer", "Latte", "Latte video transformer", ("blocks.0.adaLN_modulation.", "temp_embed")),
    ("transformer", "DiT", "DiT image transformer", ("blocks.0.adaLN_modulation.", "y_embedder.embedding_table.")),
    ("transformer", "PixArt", "PixArt image transformer", ("blocks.0.cross_attn.", "y_embedder.y_proj.", "t_block.")),
    ("transformer", "PixArt", "PixArt image transformer in diffusers' names", ("adaln_single.", "caption_projection.")),
)


def identify(tensors: Mapping[str, Shaped]) -> Identity | None:
    """Names the network that these tensors belong to.

    Args:
        tensors: name -> anything with a shape; no name needs to be there, a missing one leaves its keywords unsure.

    Returns:
        None for tensors of a network that nothing is known of.
    """
    shapes = TensorShapes(tensors)
    for family in formats():
        if (identity := family.identify(shapes)) is not None:
            return identity
    for kind, class_name, summary, prefixes in _FOREIGN:
        if shapes.has(*prefixes):
            return Identity(kind, f"{summary}, known but not supported yet", "", class_name)
    return None
