#!/usr/bin/env python3
"""Teach the Shapes model a word for a combination it has never seen, by every method of fine-tuning, and count before and after.

For each method the config `configs/finetune/METHOD-shapes.yaml` is trained as it stands, on eight pictures of the combination, whose
captions call it by a word that the model does not know (and, but for textual inversion, by its shape: "sks heart"); then the same
prompts are drawn as before it, through the steps of `scripts/txt2img.py`, and read back by the oracle: prompts with the word alone and
beside another object, and prompts of the training world, which must not be forgotten. How often the untrained model obeys the
combination's plain name is counted, too. Writes `table.md` and `results.json` into --outdir, and with --docs the table into
docs/finetuning.md. What is there of an earlier run with the same settings is used again: trainings that are finished, and counts.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ldm.inference.cli import guarded, say

CONFIG, SHIPPED = ROOT / "models" / "shapes" / "config.yaml", ROOT / "models" / "shapes" / "model.safetensors"
METHODS = {"lora": "LoRA", "textual_inversion": "textual inversion", "dreambooth": "DreamBooth"}
RARE, LEARNT = "sks", "<mine>"  # the words of the configs: before the name of the shape, and for both
MARKS = ("<!-- table -->", "<!-- /table -->")  # in docs/finetuning.md


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--combination", nargs=2, metavar=("COLOR", "SHAPE"), default=["purple", "heart"], help="one that is held out")
    parser.add_argument("--ckpt", default=str(SHIPPED), help="weights to start from, of the shapes model (those that ship)")
    parser.add_argument("--n", type=int, default=32, help="prompts of each of the three groups (32)")
    parser.add_argument("--steps", type=int, help="of each training (the configs')")
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="key=value", help="further changes of the configs")
    parser.add_argument(
        "--draw", nargs=argparse.REMAINDER, default=[], help="the rest of the line: flags of txt2img.py, such as --steps 10"
    )
    parser.add_argument("--outdir", type=Path, default=Path("outputs/finetune-table"))
    parser.add_argument("--docs", action="store_true", help="put the table into docs/finetuning.md")
    return parser


# ---------------------------------------------------------------------------------------------------------------- prompts
def prompts_of(color: str, shape: str, n: int) -> dict[str, list[Any]]:
    """`EvalPrompt`s by group: the combination alone, beside another object, and prompts of the training world."""
    import numpy as np

    from ldm.data.shapes import EvalPrompt, caption, evaluation_prompts, sample_scene, spec_of
    from ldm.data.shapes_world import HELD_OUT_COMBINATIONS
    from ldm.util import UserError

    if (color, shape) not in HELD_OUT_COMBINATIONS:
        raise UserError(f"{color} {shape} is no held-out combination; these are {', '.join(' '.join(c) for c in HELD_OUT_COMBINATIONS)}")
    groups: dict[str, list[Any]] = {"alone": [], "beside": []}
    rng = np.random.default_rng(77)
    while min(map(len, groups.values())) < n:
        kind = ("single", "pair", "relation")[int(rng.integers(3))]
        group = groups["alone" if kind == "single" else "beside"]
        scene = sample_scene(rng, kind, held_out=True)
        if len(group) < n and (color, shape) in {(o.color, o.shape) for o in scene.objects}:
            spec = spec_of(scene, rng)
            group.append(EvalPrompt(caption(spec), spec, kind, unseen=True))
    return {**groups, "others": evaluation_prompts(n, seed=77)}


# ---------------------------------------------------------------------------------------------------------------- drawing
def draw(records: Sequence[Any], flags: Sequence[str], look: tuple[str, str], word: tuple[str, str] | None) -> list[tuple[bool, bool]]:
    """Whether each prompt's picture is right, and whether it shows an object of this color and shape; says how far it is.

    word: (name, the learnt word to say in its place).
    """
    import dataclasses

    from ldm.inference.args import parse
    from ldm.inference.session import Session
    from ldm.metrics.shapes import judge

    texts = [r.prompt.replace(*word) if word else r.prompt for r in records]
    options = parse("txt2img", ["--prompt", texts[0], "--safety", "off", "--watermark", "none", "--n_samples", "8", *flags])
    session = Session(dataclasses.replace(options, prompts=texts, n_iter=1))
    found: list[tuple[bool, bool]] = []
    for number, batch in enumerate(session.batches(), 1):
        pictures = session.pictures(batch)
        for picture in pictures:
            verdict = judge(picture.image, records[len(found)].spec)
            found.append((verdict.correct, look in {(o.color, o.shape) for o in verdict.reading.objects}))
        if number % 4 == 0 or len(found) == len(records):
            say(f"  drawn {len(found)} of {len(records)}, {sum(right for right, _ in found)} right")
    return found


def count(groups: dict[str, list[Any]], flags: Sequence[str], look: tuple[str, str], word: tuple[str, str] | None = None) -> dict[str, int]:
    """Right pictures by group, and as `shown` those that show the combination where it is asked for."""
    drawn = iter(draw([record for group in groups.values() for record in group], flags, look, word))
    verdicts = {name: [next(drawn) for _ in group] for name, group in groups.items()}
    found = {name: sum(right for right, _ in group) for name, group in verdicts.items()}
    return {**found, "shown": sum(shown for name in ("alone", "beside") for _, shown in verdicts[name])}


# ---------------------------------------------------------------------------------------------------------------- training
def train(method: str, args: argparse.Namespace, folder: Path) -> tuple[Path, float]:
    """Run of one method, and its seconds; one that is finished is not run again."""
    from ldm.training.cli import main
    from ldm.util import UserError

    done, settings = folder / "done.json", settings_of(args)
    if done.is_file():
        found = json.loads(done.read_text(encoding="utf-8"))
        if found["settings"] != settings:
            raise UserError(f"{folder} holds a training from other weights or settings: remove it, or choose another --outdir")
        return next(folder.glob("*_run*")), found["seconds"]
    color, shape = args.combination
    words = [f"ckpt={args.ckpt}", f"color={color}", f"shape={shape}", *args.overrides]
    words += [] if method == "textual_inversion" else [f"word={RARE} {shape}"]
    words += [f"lightning.trainer.max_steps={args.steps}"] if args.steps else []
    if folder.exists():
        raise UserError(f"{folder} holds a run that did not finish: remove it, or go on with it by main.py --resume")
    began = time.perf_counter()
    code = main(["--base", f"configs/finetune/{method}-shapes.yaml", "-t", "-n", "run", "-l", str(folder), *words])
    if code:
        raise UserError(f"the training of {method} ended with exit code {code}")
    seconds = time.perf_counter() - began
    done.write_text(json.dumps({"seconds": seconds, "settings": settings}), encoding="utf-8")
    return next(folder.glob("*_run*")), seconds


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a training depends on beside its config; weights count by content."""
    from ldm.data.store import file_digest

    weights = file_digest(Path(args.ckpt)).hex()[:16]
    return {"combination": list(args.combination), "steps": args.steps, "set": list(args.overrides), "weights": weights}


def result_of(method: str, run: Path) -> Path:
    """The file with what a run has learnt."""
    if method != "dreambooth":
        return run / ("lora.safetensors" if method == "lora" else "embedding.safetensors")
    from ldm.inference.weights.prune import prune

    model = run / "model.safetensors"
    if not model.is_file():
        prune(run / "checkpoints" / "last.ckpt", model, dtype="float16")
    return model


def flags_with(method: str, result: Path, ckpt: str) -> list[str]:
    """The flags of txt2img.py that draw with it."""
    model = ["--config", str(CONFIG), "--ckpt", str(result) if method == "dreambooth" else ckpt]
    return model + {"lora": ["--lora", str(result)], "textual_inversion": ["--embedding", str(result)]}.get(method, [])


# ---------------------------------------------------------------------------------------------------------------- table
def table(results: dict[str, Any], args: argparse.Namespace) -> str:
    """Markdown."""
    name = " ".join(results["combination"])
    lines = [
        f"| method | a {name} is shown | alone, all right | beside another object, all right | training world "
        "| values trained | file | time |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]

    def shares(found: dict[str, int]) -> str:
        of = {"shown": 2 * results["n"], **dict.fromkeys(("alone", "beside", "others"), results["n"])}
        return " | ".join(f"{found[group] / total:.0%}" for group, total in of.items())

    lines.append(f"| none, called *{name}* | {shares(results['named'])} | | | |")
    lines.append(f"| none, called *{RARE} {results['combination'][1]}* | {shares(results['before'])} | | | |")
    for method, found in results["methods"].items():
        size = f"{found['bytes'] / 2**10:.0f} KiB" if found["bytes"] < 2**20 else f"{found['bytes'] / 2**20:.0f} MiB"
        lines.append(f"| {METHODS[method]} | {shares(found)} | {found['values']:,} | {size} | {found['seconds'] / 60:.0f} min |")
    lines.append("")
    drawing = " ".join(results["draw"]) or "default flags"
    steps = ", ".join(f"{METHODS[method]} {found['steps']}" for method, found in results["methods"].items())
    lines.append(
        f"{results['n']} prompts of each kind, and the same seeds in each row. *Shown*: some object of the picture has color and shape; "
        f"*all right*: background, sizes, places and counts, too. Eight pictures to learn from; updates: {steps}; drawn with {drawing}."
    )
    return "\n".join(lines) + "\n"


def trained_values(run: Path) -> tuple[int, int]:
    """(values that the optimizer has, updates) of a run."""
    import torch

    state = torch.load(run / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True, mmap=True)
    return sum(entry["exp_avg"].numel() for entry in state["optimizer_states"][0]["state"].values()), state["global_step"]


def earlier(args: argparse.Namespace) -> dict[str, Any]:
    """What an earlier run of the same settings has counted, without methods that are not asked for."""
    fresh: dict[str, Any] = {**settings_of(args), "n": args.n, "draw": list(args.draw), "methods": {}}
    path = args.outdir / "results.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if any(found.get(key) != value for key, value in fresh.items() if key != "methods"):
        return fresh
    return {**found, "methods": {name: counts for name, counts in found["methods"].items() if name in args.methods}}


def save(results: dict[str, Any], args: argparse.Namespace) -> None:
    """Write what is counted so far."""
    (args.outdir / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


def run(args: argparse.Namespace) -> None:
    """Count, train, count again, write."""
    from ldm.util import UserError

    if args.n < 1:
        raise UserError(f"--n {args.n} must be at least 1")
    color, shape = args.combination
    groups = prompts_of(color, shape, args.n)
    args.outdir.mkdir(parents=True, exist_ok=True)
    results = earlier(args)
    look, name = (color, shape), f"{color} {shape}"
    base = [*flags_with("", SHIPPED, args.ckpt), *args.draw]
    for row, word in (("named", None), ("before", (name, f"{RARE} {shape}"))):
        if row not in results:
            say(f"{row}: drawing {3 * args.n} pictures")
            results[row] = count(groups, base, look, word)
            save(results, args)
        say(f"{row}: {results[row]} of {args.n}")
    for method in args.methods:
        if method in results["methods"]:
            continue
        say(f"{METHODS[method]}: training")
        folder, seconds = train(method, args, args.outdir / method)
        result = result_of(method, folder)
        word = LEARNT if method == "textual_inversion" else f"{RARE} {shape}"
        found: dict[str, Any] = count(groups, [*flags_with(method, result, args.ckpt), *args.draw], look, (name, word))
        say(f"{METHODS[method]}: {found} of {args.n}")
        found["values"], found["steps"] = trained_values(folder)
        found |= {"bytes": result.stat().st_size, "seconds": seconds}
        results["methods"][method] = found
        save(results, args)
    text = table(results, args)
    (args.outdir / "table.md").write_text(text, encoding="utf-8")
    if args.docs:
        page = ROOT / "docs" / "finetuning.md"
        head, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
        page.write_text(f"{head}{MARKS[0]}\n{text}{MARKS[1]}{rest.partition(MARKS[1])[2]}", encoding="utf-8")
    say(f"{text}written: {args.outdir}/table.md, results.json" + (", docs/finetuning.md" if args.docs else ""))


def main() -> int:
    """Exit code."""
    args = build_parser().parse_args()
    return guarded(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
