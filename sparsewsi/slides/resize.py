"""Regions of px resized to exactly the size asked for: shrinking keeps the mean colour."""

import functools
from typing import Any

import numpy as np
from PIL import Image


def resize(pixels: np.ndarray, box: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
    """The box (x0, y0, x1, y1) of uint8 (h, w, 3), fractions of px included, as size = (w, h) px.

    Shrinking averages over the exact area of each new px, so that the mean colour is kept (Pillow's BOX filter takes
    each px wholly or not at all); enlarging is bicubic.
    """
    x0, y0, x1, y1 = box
    ratio = (x1 - x0) / size[0]
    if ratio < 1:
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC, box))
    if all(abs(v - round(v)) < 1e-3 for v in (x0, y0)) and abs(ratio - round(ratio)) * max(size) < 1e-3:
        left, top, whole = round(x0), round(y0), round(ratio)
        pixels = pixels[top : top + size[1] * whole, left : left + size[0] * whole]
        return pixels if whole == 1 else np.asarray(Image.fromarray(pixels).reduce(whole))
    height, width = pixels.shape[:2]
    rows = _area_weights(y0, y1, size[1], height) @ pixels.reshape(height, width * 3)  # (h, W * 3) float32
    out = _area_weights(x0, x1, size[0], width) @ _transpose(rows)  # (w, h * 3)
    return _transpose((out + 0.5).astype(np.uint8)).reshape(size[1], size[0], 3)


@functools.lru_cache(maxsize=64)
def _area_weights(start: float, stop: float, count: int, length: int) -> Any:
    """Sparse float32 (count, length): row i averages the i-th of count equal stretches of [start, stop), in px."""
    from scipy import sparse  # 0.2 s that most commands do not need

    edges = np.linspace(start, stop, count + 1)
    low, high = edges[:-1, None], edges[1:, None]
    first = np.floor(low).astype(np.int64)
    index = first + np.arange(int((np.ceil(high) - first).max()))  # (count, taps)
    share = np.clip(np.minimum(index + 1, high) - np.maximum(index, low), 0, None) / (high - low)
    taps = (share.astype(np.float32).ravel(), np.clip(index, 0, length - 1).ravel())
    return sparse.csr_array((*taps, np.arange(count + 1) * index.shape[1]), shape=(count, length))


def _transpose(rows: np.ndarray) -> np.ndarray:
    """(h, w * 3) -> (w, h * 3): rows and columns of px swapped, a px moved as one piece (three times as fast)."""
    px = np.dtype((np.void, 3 * rows.itemsize))
    return np.ascontiguousarray(rows.view(px).T).view(rows.dtype)
