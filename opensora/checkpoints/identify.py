"""What a file of weights is, told by the names and shapes in it alone: no data is read, no configuration believed.

`read_header` lists the tensors of a file or folder, `identify` names the network they belong to and as much of its
configuration as shapes give away. What they do not give away (a position scale, the order of two operations) is named
too, with what the published models use, so that nobody takes a default for a fact.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from opensora.checkpoints.weights import first_line, read_pickle, weight_files
from opensora.errors import OpenSoraError
from opensora.models.families import formats
from opensora.models.format import Identity, Kind, Shaped, TensorShapes

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: its shape, and its dtype by torch's name ("bfloat16")."""

    shape: tuple[int, ...]
    dtype: str


# --- names, shapes and dtypes -----------------------------------------------------------------------------------------


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes of the tensors in a file or in a component's folder; their data stays on disk.

    Raises:
        OpenSoraError: nothing there, a damaged file, or a pickle that holds more than tensors.
    """
    header: dict[str, TensorInfo] = {}
    for file in weight_files(path):
        header |= _safetensors_header(file) if file.suffix == ".safetensors" else _header_of(read_pickle(file))
    if not header:
        raise OpenSoraError(f"{path} holds no tensors at all; get it again")
    return header


def _safetensors_header(path: Path) -> dict[str, TensorInfo]:
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}
            return {
                name: TensorInfo(tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), str(part.get_dtype())))
                for name, part in parts.items()
            }
    except (SafetensorError, OSError) as error:
        raise OpenSoraError(f"{path} is damaged ({first_line(error)}); get it again") from error


def _header_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in tensors.items()
    }


# --- what they are ----------------------------------------------------------------------------------------------------

# Names that give away a network that this package cannot run, in the order in which they are looked for.
_FOREIGN: tuple[tuple[Kind, str, str, tuple[str, ...]], ...] = (
    ("transformer", "STDiT3", "transformer of Open-Sora 1.3", ("spatial_blocks.0.", "x_embedder_cond.")),
    ("transformer", "MMDiT", "transformer of Open-Sora 2.0", ("double_blocks.0.", "cond_in.")),
    ("transformer", "Flux", "FLUX.1 image transformer", ("double_blocks.0.", "single_blocks.0.")),
    ("transformer", "Latte", "Latte video transformer", ("blocks.0.adaLN_modulation.", "temp_embed")),
    ("transformer", "DiT", "DiT image transformer", ("blocks.0.adaLN_modulation.", "y_embedder.embedding_table.")),
    ("transformer", "PixArt", "PixArt image transformer", ("blocks.0.cross_attn.", "y_embedder.y_proj.", "t_block.")),
    ("transformer", "PixArt", "PixArt image transformer in diffusers' names", ("adaln_single.", "caption_projection.")),
    ("autoencoder", "OpenSoraVAE_V1_3", "autoencoder of Open-Sora 1.3", ("encoder.down.0.", "encoder.conv_in.conv.")),
    ("autoencoder", "Hunyuan VAE", "autoencoder of Open-Sora 2.0", ("encoder.down_blocks.0.", "encoder.conv_in.conv.")),
    (
        "autoencoder",
        "DC-AE",
        "deep compression autoencoder of Open-Sora 2.0",
        ("encoder.project_in.", "encoder.stages."),
    ),
    ("autoencoder", "AutoencoderKL", "2D autoencoder in its first authors' names (LDM, FLUX)", ("encoder.down.0.",)),
    ("text_encoder", "CLIPTextModel", "CLIP text encoder", ("text_model.embeddings.token_embedding.",)),
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
