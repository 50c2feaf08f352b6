"""Decoded tiles of a slide on a server, the least recently used of which go first."""

import threading
from collections import OrderedDict
from collections.abc import Hashable

import numpy as np


class TileCache:
    """Tiles by their places, of at most so many bytes together (but always the last one). Threads may share it."""

    def __init__(self, most: int):
        self.held = 0  # bytes
        self._most = most
        self._tiles: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, place: Hashable) -> np.ndarray | None:
        with self._lock:
            if place in self._tiles:
                self._tiles.move_to_end(place)
            return self._tiles.get(place)

    def put(self, place: Hashable, pixels: np.ndarray) -> None:
        with self._lock:
            if place not in self._tiles:
                self._tiles[place] = pixels
                self.held += pixels.nbytes
            while self.held > self._most and len(self._tiles) > 1:
                self.held -= self._tiles.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        with self._lock:
            self._tiles.clear()
            self.held = 0
