"""What `--lora` and `--embedding` name: files, with a weight or a word after a colon. Imports no torch.

A picture records every one of them as `FILE:VALUE`, its value written out, and the hash of its file. When it is drawn again the flags
only say where the files lie now; the recorded values stay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ldm.util import UserError

FLAGS = ("lora", "embedding")


def split_spec(text: str) -> tuple[str, str | None]:
    """`FILE:VALUE` -> (file, value); `FILE`, also one whose name has a colon, -> (file, None)."""
    if Path(text).exists() or ":" not in text:
        return text, None
    path, _, value = text.rpartition(":")
    return path, value


def lora_spec(text: str) -> tuple[str, float]:
    """(file, weight) of a `--lora`; the weight is 1 where none is said."""
    path, value = split_spec(text)
    try:
        weight = 1.0 if value is None else float(value)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"--lora {text!r}: {value!r} is no number: give FILE:WEIGHT, such as {path}:0.8")
    return path, weight


def embedding_spec(text: str) -> tuple[str, str | None]:
    """(file, word) of an `--embedding`; None: the word that the file says, or its name."""
    path, word = split_spec(text)
    file = next((text[:i] for i, sign in enumerate(text) if sign == ":" and Path(text[:i]).is_file()), path)
    if word is not None and file != path and not Path(path).exists():
        check_word(file, text[len(file) + 1 :])
    if word is not None and (not word.strip() or word.split() != [word]):
        raise UserError(f"--embedding {text!r}: {word!r} is no word: give FILE:WORD, such as {path}:<mine>")
    return path, word


def check_word(path: str, word: str) -> None:
    """Refuse a word with a colon, whoever says it: the record could not tell it from the name of its file."""
    if ":" in word:
        plain = word.replace(":", "") or "mine"
        raise UserError(f"--embedding {path!r}: its word {word!r} has a colon: name another one by --embedding {path}:{plain}")


def check_additions(lora: Sequence[str], embedding: Sequence[str]) -> list[str]:
    """What is wrong with these flags, a clause each."""
    problems: list[str] = []
    words: list[str] = []
    for flag, texts in (("lora", lora), ("embedding", embedding)):
        for text in texts:
            try:
                path, value = lora_spec(text) if flag == "lora" else embedding_spec(text)
            except UserError as error:
                problems.append(str(error))
                continue
            if not Path(path).exists():
                problems.append(f"--{flag} {path!r} does not exist")
            if flag == "embedding":
                words.append(str(value or Path(path).stem))
    if twice := sorted({word for word in words if words.count(word) > 1}):
        problems.append(f"--embedding: {', '.join(twice)} is the word of several files: give another one as FILE:WORD")
    return problems


def moved(flag: str, recorded: Sequence[str], given: Sequence[str] | None) -> list[str]:
    """Recorded entries of `--lora` or `--embedding`, with the files that are given in their places.

    Raises UserError unless as many are given as were recorded, without values that contradict the record.
    """
    if not all(isinstance(text, str) for text in recorded):
        raise UserError(f"the picture was tampered with: its record says {flag} = {list(recorded)!r}")
    if given is None:
        return list(recorded)
    if len(given) != len(recorded):
        raise UserError(f"the picture was drawn with {len(recorded)} --{flag}, and {len(given)} are given: name each file, in that order")
    found = []
    for then, now in zip(recorded, given, strict=True):
        value = then.rpartition(":")[2] if ":" in then else None  # the file it was read from need not be there any more
        path, said = split_spec(now)
        if said is not None and said != value:
            raise UserError(f"--{flag} {now!r}: the picture was drawn with {value or then}: leave out what follows the file's name")
        found.append(path if value is None else f"{path}:{value}")
    return found
