"""Some items of a data set more often than others, by what the data set knows of them.

Owns which item of the data set stands at which place. The pictures, captions and caches stay those of the data set: a `CachedLatents`
inside need not be made anew when the weights change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ldm.data.loading import tell_epoch
from ldm.util import ConfigError, instantiate_from_config, plain


class WeightedDataset(Dataset):
    """Items of `dataset`, item i as many times an epoch as `weights` says for its fact `key`; 0 leaves it out.

    The data set tells its facts without opening pictures: `facts(i)`, a mapping, for example with `caption`, `class_label` or, for the
    shapes world, `kind`. Copies of an item are equal but for what is random in a training. An epoch is as long as all weights together.
    """

    def __init__(
        self,
        dataset: Any,  # {target, params}, or a data set, with `facts`
        key: str,  # the fact to go by
        weights: Mapping[Any, int],  # {value of the fact: how many times}, whole numbers from 0 on
        default: int = 1,  # of values that are not named
    ) -> None:
        super().__init__()
        self.dataset = instantiate_from_config(plain(dataset)) if hasattr(dataset, "keys") else dataset
        named = {str(value): _times(value, times) for value, times in dict(plain(weights)).items()}
        default = _times("default", default)
        values = [self._value(i, key) for i in range(len(self.dataset))]
        if strangers := sorted(set(named) - set(values)):
            known = ", ".join(sorted(set(values))[:20])
            raise ConfigError(f"WeightedDataset: no item has {key} {', '.join(strangers)}; the data set has {known}")
        self.index = np.repeat(np.arange(len(values)), [named.get(value, default) for value in values])
        if not len(self.index):
            raise ConfigError(f"WeightedDataset: the weights {named} leave no item")
        buckets = getattr(self.dataset, "bucket_of", None)
        self.bucket_of = None if buckets is None else np.asarray(buckets)[self.index]
        if hasattr(self.dataset, "caption_for"):  # others ask whether there is one
            self.caption_for = self._caption_for
        if hasattr(self.dataset, "content"):
            self.content = self._content

    def _value(self, i: int, key: str) -> str:
        if not hasattr(self.dataset, "facts"):
            raise ConfigError(f"WeightedDataset: {type(self.dataset).__name__} tells no facts of its items (no method facts)")
        facts = self.dataset.facts(i)
        if key not in facts:
            raise ConfigError(f"WeightedDataset: item {i} has no fact {key!r}; it has {', '.join(sorted(facts)) or 'none'}")
        return str(facts[key])

    def set_epoch(self, epoch: int) -> None:
        """Tell the data set, if it wants to know."""
        tell_epoch(self.dataset, epoch)

    def facts(self, i: int) -> Mapping[str, Any]:
        """What the data set knows of item i without its picture."""
        return self.dataset.facts(int(self.index[i]))

    def _caption_for(self, i: int, epoch: int | None = None) -> str:
        """The caption of item i in an epoch."""
        return self.dataset.caption_for(int(self.index[i]), epoch)

    def _content(self, memo: Path | None = None) -> str:
        """A digest of the pictures and of which stands where: the facts that the weights go by may change, too."""
        return hashlib.sha256(self.dataset.content(memo).encode() + self.index.astype("<i8").tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Any:
        return self.dataset[int(self.index[i])]


def _times(value: Any, times: Any) -> int:
    if isinstance(times, bool) or not isinstance(times, int) or times < 0:
        raise ConfigError(f"WeightedDataset: the weight of {value!r} is {times!r}: it must be a whole number from 0 on")
    return times
