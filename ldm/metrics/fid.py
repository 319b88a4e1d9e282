"""Frechet distance between two sets of features (arXiv:1706.08500), from statistics that are gathered batch by batch. Pure."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from ldm.util import UserError


class Statistics:
    """Mean and covariance of features (B, D) seen so far, in float64, without keeping any of them."""

    def __init__(self, dim: int) -> None:
        self.n = 0
        self.mean = np.zeros(dim)
        self._scatter = np.zeros((dim, dim))  # sum of (x - mean)(x - mean)^T

    def add(self, features: np.ndarray) -> None:
        """Take in a batch (B, D); in any order and split the result is the same to rounding."""
        x = np.asarray(features, dtype=np.float64)
        if x.ndim != 2 or x.shape[1] != len(self.mean):
            raise ValueError(f"features of shape {x.shape}: (B, {len(self.mean)}) are needed")
        if not np.isfinite(x).all():
            raise UserError("the features hold NaN or infinite numbers: the weights are damaged")
        if not len(x):
            return
        mean = x.mean(0)
        centred, shift, total = x - mean, mean - self.mean, self.n + len(x)
        self._scatter += centred.T @ centred + np.outer(shift, shift) * (self.n * len(x) / total)  # Chan et al. 1979
        self.mean += shift * (len(x) / total)
        self.n = total

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased, (D, D)."""
        if self.n < 2:
            raise UserError(f"a covariance needs two pictures or more; there {'is' if self.n == 1 else 'are'} {self.n}")
        return self._scatter / (self.n - 1)

    def save(self, path: str | Path) -> None:
        """As an .npz with mu and sigma, the form in which statistics are exchanged, and the count n."""
        if Path(path).suffix != ".npz":
            raise UserError(f"statistics are saved as .npz; {path} has another ending")
        if Path(path).exists():
            raise UserError(f"{path} exists already: choose another name")
        np.savez(path, mu=self.mean, sigma=self.covariance, n=np.int64(self.n))


def read_statistics(path: str | Path) -> tuple[np.ndarray, np.ndarray, int | None]:
    """(mean (D,), covariance (D, D), count if the file says it) of an .npz with mu and sigma."""
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = (np.asarray(file[name], dtype=np.float64) for name in ("mu", "sigma"))
            count = int(file["n"]) if "n" in file.files else None
    except FileNotFoundError:
        raise UserError(f"statistics {path} do not exist") from None
    except (KeyError, ValueError, OSError, BadZipFile) as error:
        raise UserError(f"{path} holds no statistics (mu and sigma): {error}") from None
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or not np.isfinite(covariance).all():
        raise UserError(f"{path} holds no statistics: mu has the shape {mean.shape}, sigma {covariance.shape}")
    return mean, covariance, count


def frechet_distance(mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other_covariance: np.ndarray) -> float:
    """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), with no smallest eigenvalue asked for.

    tr (C C')^(1/2) is the sum of the roots of the eigenvalues of C^(1/2) C' C^(1/2), which is symmetric: no complex root, and no
    offset on the diagonal where there are fewer pictures than dimensions.
    """
    if mean.shape != other_mean.shape:
        raise UserError(f"features of {len(mean)} and of {len(other_mean)} dimensions cannot be compared: use one network for both")
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(0.0))) @ vectors.T
    inner = root @ other_covariance @ root
    cross = np.sqrt(np.linalg.eigvalsh((inner + inner.T) / 2.0).clip(0.0)).sum()
    shift = mean - other_mean
    return float(max(shift @ shift + np.trace(covariance) + np.trace(other_covariance) - 2.0 * cross, 0.0))
