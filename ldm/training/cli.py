"""The command line of a training: parse, merge the YAML files and `key=value` pairs, hand over to `run`.

Knows no torch: `--help` and wrong arguments answer at once.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ldm.processes import label
from ldm.util import ConfigError, UserError

_TRUE, _FALSE = ("true", "yes", "y", "1", "t"), ("false", "no", "n", "0", "f")
_SWITCHES = ("-t", "--train", "--scale_lr", "--no-test", "--no_test", "-d", "--debug")

_EXAMPLES = """examples:
  python main.py --base configs/shapes/tiny.yaml --train --name first
  python main.py --base a.yaml b.yaml model.params.use_ema=false data.params.batch_size=8 --train
  python main.py --resume logs/2026-01-31T12-00-00_first --train lightning.trainer.max_steps=20000
"""


class _Parser(argparse.ArgumentParser):
    """Errors are one line."""

    def error(self, message: str) -> Any:
        self.exit(2, f"error: {message}; see main.py --help\n")


def _switch(text: str) -> bool:
    if text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def build_parser() -> argparse.ArgumentParser:
    """All flags; switches take an optional true or false (`-t`, `-t True`, `--train=false`)."""
    parser = _Parser(
        prog="main.py",
        description="Train a model from YAML configs. Later files and key=value pairs override earlier ones.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    switch: dict[str, Any] = {"nargs": "?", "const": True, "default": False, "type": _switch, "metavar": "BOOL"}
    add = parser.add_argument
    add("-b", "--base", nargs="*", default=[], action="extend", metavar="YAML", help="config files, merged from left to right")
    add("overrides", nargs="*", metavar="key=value", help="entries of the merged config, such as model.base_learning_rate=1e-4")
    add("-t", "--train", **switch, help="train (without it, the config is only built and checked)")
    add("-n", "--name", default="", help="name of the run, after the timestamp in its folder's name")
    add("-r", "--resume", default="", metavar="RUN", help="go on with a run exactly where it stopped: its folder, or a .ckpt file in it")
    add("--init_from", default="", metavar="WEIGHTS", help="start from weights only (.safetensors or .ckpt), with a new optimizer")
    add("--init_ema", choices=("auto", "ema", "raw"), default="auto", help="which weights of --init_from to take (default: auto)")
    add("-l", "--logdir", default="logs", help="folder for all runs (default: logs)")
    add("-p", "--project", default="", help="folder below --logdir for this run")
    add("-f", "--postfix", default="", help="added to the name of the run's folder")
    add("-s", "--seed", type=int, default=None, help="seed of weights, noise and data order (default: 23, or the resumed run's)")
    add("--scale_lr", **switch, help="multiply the learning rate by devices x batch size x accumulated batches (default: off)")
    add("--accelerator", default=None, help="cpu, gpu, mps, auto, ... (default: auto)")
    add("--devices", default=None, help="how many devices, or which: 2 or 0,1 (default: 1)")
    add("--num_nodes", type=int, default=None, help="machines (default: 1)")
    add("--strategy", default=None, help="ddp, fsdp, deepspeed_stage_2, ... (default: auto)")
    add("--gpus", default=None, help="legacy: 0,1 means --accelerator gpu --devices 0,1")
    add("--no-test", "--no_test", dest="no_test", **switch, help="no test after the training")
    add("--trust", action="append", default=[], metavar="PACKAGE", help="let the config name classes of this package")
    add("-d", "--debug", **switch, help="log more, and show tracebacks of all errors")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse; unknown flags and malformed pairs end with one line and exit code 2."""
    parser = build_parser()
    options, rest = parser.parse_known_args(_settle_switches(list(sys.argv[1:] if argv is None else argv)))
    unknown = [word for word in rest if word.startswith("-")]
    if unknown:
        parser.exit(2, f"error: unknown flag {unknown[0]}{_did_you_mean(parser, unknown[0])}; see main.py --help\n")
    pairs = [*options.overrides, *rest, *(word for word in options.base if _is_pair(word))]
    options.base = [word for word in options.base if not _is_pair(word)]
    options.overrides = pairs
    return options


def _is_pair(word: str) -> bool:
    return "=" in word and not Path(word).exists()


def _settle_switches(argv: list[str]) -> list[str]:
    """Join a switch and its value, and give it one where it has none, so that it never swallows the next argument."""
    settled, i = [], 0
    while i < len(argv):
        word = argv[i]
        if word in _SWITCHES:
            name = {"-t": "--train", "-d": "--debug"}.get(word, word)
            has_value = i + 1 < len(argv) and argv[i + 1].lower() in _TRUE + _FALSE
            word = f"{name}={argv[i + 1] if has_value else 'true'}"
            i += has_value
        settled.append(word)
        i += 1
    return settled


def _did_you_mean(parser: argparse.ArgumentParser, word: str) -> str:
    import difflib

    close = difflib.get_close_matches(word.split("=")[0], list(parser._option_string_actions), n=2)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def load_yaml(path: str | Path) -> Any:
    """One config file as an OmegaConf mapping; `ConfigError` when it is missing or no mapping."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"config {str(path)!r} does not exist") from None
    except OSError as error:
        raise ConfigError(f"config {str(path)!r} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"config {str(path)!r} is no valid YAML: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(config):
        raise ConfigError(f"config {str(path)!r} must hold keys and values (model:, data:, lightning:)")
    return config


def merge_configs(base: Sequence[str | Path], overrides: Sequence[str] = (), resolve: bool = True) -> dict[str, Any]:
    """YAML files and `a.b=value` pairs, later ones first in rank -> one plain dict, interpolations resolved, or left as they are."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    wrong = [pair for pair in overrides if not pair.partition("=")[0].strip() or "=" not in pair]
    if wrong:
        raise ConfigError(f"{wrong[0]!r} is neither a flag nor a key=value pair such as data.params.batch_size=8")
    try:
        merged = OmegaConf.merge(*(load_yaml(path) for path in base), _dotlist(overrides))
        if missing := sorted(_open_keys(OmegaConf.to_container(merged))):
            raise ConfigError(f"the config leaves open what you must give: add {' '.join(f'{key}=VALUE' for key in missing)}")
        config = OmegaConf.to_container(merged, resolve=resolve)
    except OmegaConfBaseException as error:
        raise ConfigError(f"the configs do not fit together: {str(error).splitlines()[0]}") from None
    assert isinstance(config, dict)
    return config


def _open_keys(value: Any, key: str = "") -> Iterator[str]:
    """Keys whose value is `???`, as they are written on the command line; not those that only refer to such a one."""
    if value == "???":
        yield key
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _open_keys(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _open_keys(item, f"{key}.{i}")


def _dotlist(pairs: Sequence[str]) -> Any:
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config = OmegaConf.create({})
    for pair in pairs:
        try:
            config = OmegaConf.merge(config, OmegaConf.from_dotlist([pair]))
        except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
            raise ConfigError(f"cannot read {pair!r}: {str(error).splitlines()[0]}") from None
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: exit code 0, 2 for an error of the user, 128 + n when stopped by signal n."""
    options = parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("ldm").setLevel(logging.DEBUG if options.debug else logging.INFO)
    try:
        from ldm.training.run import run

        return run(options)
    except UserError as error:
        if options.debug:
            raise
        sys.stderr.write(f"error{label()}: {' '.join(str(error).split())}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
