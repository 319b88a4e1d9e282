"""Which name a tensor has in a file, and which in a model. Pure: knows names, shapes of lists, no files and no modules.

One canonical spelling: that of published latent-diffusion checkpoints. Known other spellings: the prefixes and levels of wrappers
(`module.`, `_orig_mod.`), and CLIP text encoders without the level `text_model.` (transformers since 5.6, and some converted files).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

from ldm.modules.diffusionmodules.schedule_names import LOSS, NOISING, POSTERIOR
from ldm.util import CheckpointError

T = TypeVar("T")

# Derived from the noise schedule, so always computed from the config.
SCHEDULE_BUFFERS = frozenset((*NOISING, *POSTERIOR, *LOSS))
# Empty tensors by which other tools mark a file: prediction of v, zero terminal SNR.
MARKERS = frozenset(("v_pred", "ztsnr"))
# (names of averaged weights, names of the weights they average); "" is a model that averages itself (an autoencoder).
EMA_PAIRS = (("model_ema.", "model."), ("model_ema.", ""), ("cond_stage_ema.", "cond_stage_model."))
_EMA_STATE = ("decay", "num_updates")
# Names that may be on one side only, because nothing that is drawn depends on them, or because they follow from the config.
_NOISED_STAGE = re.compile(r"(low_scale_model|noise_augmentor)\.")
_HARMLESS = re.compile(
    r"(^|\.)(position_ids|loss\..*|logvar|colorize|denoiser\.sigmas|model\.attn_mask|(model_ema|cond_stage_ema)\.(decay|num_updates)"
    r"|noise_augmentor\.data_(mean|std)"
    r"|transformer\.encoder\.embed_tokens\.weight"  # T5's second name of shared.weight
    # of a whole CLIP in the place of its text encoder, as merging programs write it
    r"|(cond_stage_model|conditioner\.embedders\.\d+)\.(transformer\.)?(logit_scale|(text|visual)_projection(\.weight)?|vision_model\..*))$"
)
_WRAPPERS = ("module.", "_forward_module.")  # of DDP and DeepSpeed, at the beginning
# Of torch.compile, sharding and activation checkpointing, anywhere.
_LEVELS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_BLOCK = re.compile(r"model\.transformer\.resblocks\.(\d+)\.")
_FLAT_CLIP = re.compile(r"(^|\.)transformer\.(?=(embeddings|encoder\.layers|final_layer_norm)\.)")


def is_harmless(name: str) -> bool:
    """May `name` be missing from a file, or be there in vain?"""
    return _NOISED_STAGE.sub("", name) in SCHEDULE_BUFFERS or name in MARKERS or _HARMLESS.search(name) is not None


def is_ema_state(name: str) -> bool:
    """Is it the decay or the counter of a moving average, rather than a weight?"""
    return any(name == prefix + state for prefix, _ in EMA_PAIRS for state in _EMA_STATE)


def is_loss(name: str) -> bool:
    """Does it belong to a training loss (discriminator, perceptual network)?"""
    return name.startswith("loss.") or ".loss." in name


def published(name: str) -> str:
    """The canonical spelling of `name`."""
    return _FLAT_CLIP.sub(r"\1transformer.text_model.", unwrapped(name))


def unwrapped(name: str) -> str:
    """`name` without the prefixes and levels that DDP, sharding and torch.compile add."""
    name = _LEVELS.sub("", name)
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return name.replace("_orig_mod", "") if name.startswith("model_ema.") else name  # an average's name has lost the dots


def spelled(tensors: Mapping[str, T]) -> dict[str, T]:
    """The same under published names. What has such a name already wins over what is only spelled otherwise."""
    return {published(name): value for name, value in tensors.items()} | {n: v for n, v in tensors.items() if n == published(n)}


def match(names: Iterable[str], own: Collection[str]) -> dict[str, str]:
    """Name in the file -> name in the model, for every name in the file; names the model does not know stay as they are."""
    found = {}
    for name in names:
        spellings = (name, unwrapped(name), published(name), unwrapped(name).replace("text_model.", ""))
        found[name] = next((s for s in spellings if s in own), published(name))
    return found


def prefix_of(own: Collection[str], names: Collection[str]) -> str:
    """Where the names of a model stand in the file of a larger one; "" when they stand there as they are, or nowhere.

    Raises CheckpointError when there are several places.
    """
    spellings = {published(name) for name in names}
    wanted = [published(name) for name in own if not is_harmless(name)]
    if not wanted or any(name in spellings for name in wanted) or any(name in names for name in own):
        return ""
    probe = max(wanted, key=len)  # the longest is the least likely to be somebody else's
    places = sorted(name[: -len(probe)] for name in spellings if name.endswith("." + probe))
    counts = {place: sum(place + name in spellings for name in wanted) for place in places}
    places = [place for place in places if counts[place] == max(counts.values()) > len(wanted) / 2]  # a CLIP's towers are alike
    if len(places) > 1:
        raise CheckpointError(f"the file has this model in several places: say prefix={' or '.join(map(repr, places))}")
    return places[0] if places else ""


def unused_in_tower(names: Iterable[str], blocks: int, projection: bool) -> set[str]:
    """Of an open_clip text tower (`model.*`): the last `blocks` blocks, the contrastive loss's temperature, on request the projection."""
    names = list(names)
    numbers = {name: int(match[1]) for name in names if (match := _BLOCK.match(name))}
    first = max(numbers.values(), default=-1) + 1 - blocks
    heads = {"model.logit_scale", *(["model.text_projection"] if projection else [])}
    return {name for name in names if name in heads or numbers.get(name, -1) >= first}


def shadows(names: Collection[str], ema_prefix: str, source_prefix: str) -> dict[str, str]:
    """Weight -> name of its moving average: the path without its dots (and without `text_model`, which live models may lack)."""
    table = {}
    for name in names:
        if name.startswith(source_prefix) and not any(name.startswith(prefix) for prefix, _ in EMA_PAIRS):
            path = name[len(source_prefix) :].replace("text_model.", "")
            table[name] = ema_prefix + path.replace(".", "")
    return table


def ema_tables(own: Collection[str], in_file: Collection[str]) -> list[dict[str, str]]:
    """For every moving average that the model or the file has: weight -> name of its average."""
    present = set(own) | set(in_file)
    weights = {n for n in present if not is_ema_state(n)}
    tables, done = [], set()
    for ema_prefix, source_prefix in EMA_PAIRS:
        if ema_prefix in done:
            continue
        table = {w: s for w, s in shadows(weights, ema_prefix, source_prefix).items() if s in present}
        if table:
            tables.append(table)
            done.add(ema_prefix)
    return tables


def summary(names: Collection[str], limit: int = 4) -> str:
    """`a, b, c, d and 12 more`."""
    listed = sorted(names)
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")


def likely_content(names: Mapping[str, object] | Collection[str]) -> str:
    """The first levels of the names in a file, most frequent first, to tell the user what the file holds."""
    counts: dict[str, int] = {}
    for name in names:
        counts[name.partition(".")[0]] = counts.get(name.partition(".")[0], 0) + 1
    return ", ".join(f"{k}.* ({n})" for k, n in sorted(counts.items(), key=lambda item: -item[1])[:4])
