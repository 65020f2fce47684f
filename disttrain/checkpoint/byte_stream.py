"""Bytes to disk: the checksum of a piece is computed while it is written, and the disk starts before the last piece."""

from __future__ import annotations

import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

PIECE_BYTES = 8 * 2**20
_INLINE_BYTES = 2**18
"""Below this a checksum costs less than handing it to another thread."""


class ByteStream:
    """A new file; after the `with` block its bytes survive a power cut. OSError when the disk refuses."""

    def __init__(self, path: Path) -> None:
        self.crc32 = 0
        self._file = path.open("xb", buffering=2**20)
        self._thread = ThreadPoolExecutor(1, "crc32")
        self._unsent_bytes = 0

    def __enter__(self) -> ByteStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        try:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def write(self, block: bytes | memoryview) -> None:
        """Append `block`, bytes or a contiguous view of them."""
        view = memoryview(block).cast("B")
        for start in range(0, len(view), PIECE_BYTES):
            piece = view[start : start + PIECE_BYTES]
            if len(piece) < _INLINE_BYTES:
                self._file.write(piece)
                self.crc32 = zlib.crc32(piece, self.crc32)
            else:
                checksum = self._thread.submit(zlib.crc32, piece, self.crc32)
                self._file.write(piece)
                self.crc32 = checksum.result()
            self._send(len(piece))

    def _send(self, nbytes: int) -> None:
        """Have the disk begin with what is there, so that the final fsync waits for little."""
        self._unsent_bytes += nbytes
        if self._unsent_bytes >= 2 * PIECE_BYTES and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._unsent_bytes = 0
