"""transformers' own models, filled with the tensors of an opened file under its names; only for comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from unimed_jax import config
from unimed_jax.convert.names import some
from unimed_jax.convert.source import Source
from unimed_jax.errors import DataError, UsageError


def _pretrained(cls: Any, state: Mapping[str, Any], source: Source, **settings: Any) -> Any:
    """A transformers model of the folder's config.json, which the tensors of the opened file fill completely.

    transformers would choose among the files of a folder itself, and might open another one.
    """
    import torch

    folder = source.path if source.path.is_dir() else source.path.parent
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"{folder} has no config.json, so transformers cannot open it", "convert without --verify"
        )
    build = {"output_loading_info": True, "attn_implementation": "eager", "dtype": torch.float32}
    try:
        c = cls.config_class.from_pretrained(str(folder), local_files_only=True, **settings)
        more = {"add_pooling_layer": False} if cls.__name__ == "BertModel" else {}
        model, info = cls.from_pretrained(None, config=c, state_dict=dict(state), **build, **more)
    except (OSError, ValueError, RuntimeError, TypeError) as e:
        raise DataError(
            f"transformers cannot open {folder}: {' '.join(str(e).split())[:300]}", "convert without --verify"
        ) from e
    bad = [*info["missing_keys"], *(k for k, *_ in info.get("mismatched_keys") or ())]
    bad = [k for k in bad if not k.endswith("mask_token")]  # stands for masked patches; never read here
    if bad:
        raise DataError(
            f"{source.path} does not fill {cls.__name__}: {some(sorted(bad))} missing or of another shape",
            "its config.json belongs to other weights; or convert without --verify",
        )
    return model.eval()


def clip(state: Mapping[str, Any], source: Source) -> tuple[Any, Any]:
    """`CLIPModel` and its towers: (image, text) encoders, None for a tower that is not there."""
    from transformers import CLIPTextModelWithProjection, CLIPVisionModel, CLIPVisionModelWithProjection

    # Configs of CLIPModel name the width of the embedding at the top; the towers' own may say something else.
    m, image, text = source.model, None, None
    if "vision" in source.towers and m.vision.proj == "none":
        bare = _pretrained(CLIPVisionModel, state, source)
        image = lambda pixels: bare(pixel_values=pixels).pooler_output
    elif "vision" in source.towers:
        vision = _pretrained(CLIPVisionModelWithProjection, state, source, projection_dim=m.embed_dim)
        image = lambda pixels: vision(pixel_values=pixels).image_embeds
    if "text" in source.towers:
        tower = _pretrained(CLIPTextModelWithProjection, state, source, projection_dim=m.embed_dim)
        text = lambda ids: tower(input_ids=ids).text_embeds
    return image, text


def bert(state: Mapping[str, Any], source: Source) -> tuple[Any, Any]:
    """`BertModel`, pooled as the source says."""
    from transformers import BertModel

    return None, pooled(_pretrained(BertModel, state, source), source.model.text)


def dinov2(state: Mapping[str, Any], source: Source) -> tuple[Any, Any]:
    """`Dinov2Model` at its class token."""
    from transformers import Dinov2Model

    model = _pretrained(Dinov2Model, state, source)
    return lambda pixels: model(pixel_values=pixels).last_hidden_state[:, 0], None


def pooled(bert: Any, t: config.Text) -> Callable[[Any], Any]:
    """A BertModel's output at [CLS], or the mean over real tokens."""

    def encode(ids):
        mask = (ids != t.pad_id).long()
        x = bert(input_ids=ids, attention_mask=mask).last_hidden_state
        if t.pool == "cls":
            return x[:, 0]
        return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    return encode
