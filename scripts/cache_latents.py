#!/usr/bin/env python3
"""Encode a training's pictures (and captions) ahead of it: `python scripts/cache_latents.py --base CONFIG.yaml --write CACHED.yaml`.

The data sets of the config become `ldm.data.latents.CachedLatents` over the config's own first stage, and with --text over its text
encoder too; CACHED.yaml is the config with these in place. A config that names CachedLatents already is only filled. Caches are found
again by content: pictures, sizes, and weights. They grow nowhere but in --out, and an interrupted run is gone on with.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.inference.cli import guarded, say

CACHED = "ldm.data.latents.CachedLatents"


def build_parser() -> argparse.ArgumentParser:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", nargs="+", required=True, type=Path, help="the training's configs, later ones win")
    parser.add_argument("--splits", nargs="+", default=["train"], choices=("train", "validation", "test"), help="data to encode (train)")
    parser.add_argument("--out", type=Path, default=Path("logs/latents"), help="folder of the caches (logs/latents)")
    parser.add_argument("--ckpt", type=Path, help="a whole model's weights, for both networks; default: those that the config names")
    parser.add_argument("--text", action="store_true", help="keep the captions' embeddings too")
    parser.add_argument("--batch_size", type=int, default=32, help="pictures encoded at a time (32)")
    parser.add_argument("--workers", type=int, default=1, help="processes that read pictures meanwhile (1)")
    parser.add_argument("--bf16", action="store_true", help="encode pictures in bfloat16 autocast")
    parser.add_argument("--device", default="auto", help="auto, cpu, mps, ... (auto: an accelerator when there is one)")
    parser.add_argument("--write", type=Path, help="new file for the config to train with")
    parser.add_argument("--trust", nargs="*", default=[], metavar="PACKAGE", help="packages whose classes the config may name")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as data.params.train.params.root=pictures")
    return parser


def cached(config: dict[str, Any], split: str, options: argparse.Namespace) -> dict[str, Any]:
    """The config of the cached form of a split."""
    from ldm.util import ConfigError

    entry = ((config.get("data") or {}).get("params") or {}).get(split)
    if entry is None:
        raise ConfigError(f"the config has no data.params.{split}: choose others with --splits")
    if entry.get("target") == CACHED:
        return entry
    model = (config.get("model") or {}).get("params") or {}
    if not isinstance(model.get("first_stage_config"), dict):
        raise ConfigError("the config's model has no first stage to encode with (model.params.first_stage_config)")
    params = {
        "dataset": entry,
        "first_stage": model["first_stage_config"],
        "cache_dir": str(options.out),
        "batch_size": options.batch_size,
        "workers": options.workers,
        "bf16": options.bf16,
        "device": options.device,
        "image_key": model.get("first_stage_key", "image"),
    }
    if options.ckpt:
        params["ckpt"] = str(options.ckpt)
    if options.text:
        if model.get("cond_stage_trainable"):
            raise ConfigError("--text: this config trains its text encoder (cond_stage_trainable), so embeddings would not stay right")
        if not isinstance(model.get("cond_stage_config"), dict):
            raise ConfigError("--text: the config's model has no text encoder (model.params.cond_stage_config)")
        params |= {"text_encoder": model["cond_stage_config"], "caption_key": model.get("cond_stage_key", "caption")}
    return {"target": CACHED, "params": params}


def main() -> int:
    """Parse, fill the caches, and write the config that uses them."""
    options = build_parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def run() -> None:
        import yaml

        from ldm.training.cli import merge_configs
        from ldm.util import UserError, instantiate_from_config, trust

        trust(*options.trust)
        if options.write and options.write.exists():
            raise UserError(f"{options.write} exists already: name a new file with --write")
        config = merge_configs(options.base, options.overrides)
        for split in options.splits:
            entry = cached(config, split, options)
            data = instantiate_from_config(entry)
            config["data"]["params"][split] = entry
            said = f", {len(data.texts.unique)} captions" if data.texts is not None else ""
            say(f"{split}: {len(data)} latents{said}, {data.path.parent}")
        if options.write:
            options.write.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
            say(f"train with: python main.py --base {options.write} -t")

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
