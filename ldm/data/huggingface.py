"""A data set that Hugging Face's `datasets` has saved to disk. The library is an extra: pip install "latent-diffusion-workshop[data]"."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.data.buckets import Size
from ldm.data.captions import CAPTION_COLUMNS
from ldm.data.files import check_options, data_path, digest_files, files_below, need_folder
from ldm.data.pictures import CaptionedPictures, picture_size
from ldm.imaging import load_image
from ldm.util import ConfigError, UserError


class HuggingFaceDataset(CaptionedPictures):
    """{"image", "caption"}, the three sizes, and "class_label", of a folder made by `Dataset.save_to_disk`.

    Nothing is downloaded: `path` is a folder. A caption that is a list gives its first entry.
    """

    def __init__(
        self,
        path: str,
        size: int | Sequence[int] | None = None,
        split: str | None = "train",  # of a folder with several; without effect where there is one
        image_column: str = "image",
        caption_column: str | None = None,  # None: text, caption or prompt, whichever there is; "" for no captions
        label_column: str | None = None,  # becomes class_label
        **options: Any,  # of CaptionedPictures: buckets, crop, flip, interpolation, image_key, caption_key
    ) -> None:
        check_options(type(self).__name__, CaptionedPictures, options, HuggingFaceDataset)
        self.path = need_folder(type(self).__name__, data_path(path), "path", "a data set made by save_to_disk")
        self.table = _open(self.path, split)  # as it is; pictures and texts are read apart, for neither needs the other
        columns = self.table.column_names
        if caption_column is None:
            caption_column = next((name for name in CAPTION_COLUMNS if name in columns), None)
            if caption_column is None:
                raise ConfigError(f"{path} has no caption column: name one of {', '.join(columns)} as caption_column, or '' for none")
        self.image_column, self.caption_column, self.label_column = image_column, caption_column, label_column
        wanted = [name for name in (image_column, caption_column, label_column) if name]
        if lost := [name for name in wanted if name not in columns]:
            raise ConfigError(f"{path} has no column {', '.join(lost)}; it has {', '.join(columns)}")
        self.pictures = self.table.select_columns([image_column]).cast_column(image_column, _undecoded())
        self.texts = self.table.select_columns([name for name in (caption_column, label_column) if name])
        super().__init__(size, **options)

    def __len__(self) -> int:
        return len(self.table)

    def _file(self, i: int) -> Any:
        """Picture i as a binary file or a path."""
        value = self.pictures[i][self.image_column]
        if not value or not (value.get("bytes") or value.get("path")):
            raise UserError(f"row {i} of {self.path} has no picture in the column {self.image_column!r}")
        return io.BytesIO(value["bytes"]) if value.get("bytes") else value["path"]

    def picture(self, i: int) -> Image.Image:
        """Picture i, RGB, upright."""
        try:
            return load_image(self._file(i))
        except UserError as error:
            raise UserError(f"row {i} of {self.path}: {error}") from None

    def sizes(self) -> list[Size]:
        """(height, width) of all pictures."""
        return [picture_size(self._file(i)) for i in range(len(self))]

    def facts(self, i: int) -> Mapping[str, Any]:
        """Caption and class of row i."""
        row = self.texts[i]
        facts: dict[str, Any] = {}
        if self.caption_column:
            said = row[self.caption_column]
            said = said[0] if isinstance(said, (list, tuple)) and said else said
            if not isinstance(said, str):
                raise UserError(f"row {i} of {self.path} has no caption in the column {self.caption_column!r}")
            facts["caption"] = said
        if self.label_column:
            facts["class_label"] = int(row[self.label_column])
        return facts

    def content(self, memo: Path | None = None) -> str:
        """A digest of the folder's tables; `memo` as for `FolderDataset.content`."""
        return digest_files(self.path, files_below(self.path, (".arrow",)), memo)


def _open(path: Path, split: str | None) -> Any:
    try:
        import datasets
    except ImportError:
        raise ConfigError('HuggingFaceDataset needs the package datasets: pip install "latent-diffusion-workshop[data]"') from None
    try:
        found = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError, OSError) as error:
        raise ConfigError(f"{path} is not a data set made by save_to_disk: {str(error).splitlines()[0]}") from None
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise ConfigError(f"{path} has no split {split!r}; it has {', '.join(found)}")
        found = found[split]
    if len(found) == 0:
        raise ConfigError(f"{path} is empty")
    return found


def _undecoded() -> Any:
    import datasets

    return datasets.Image(decode=False)
