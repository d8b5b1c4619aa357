"""Reading a CSV file that still grows: every call gives the whole rows that are new."""

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from lance_edge.errors import DataError
from lance_edge.profiles import RowParser, columns

CHUNK_BYTES = 1 << 16
MOST_LINE_BYTES = 1 << 16
REMEMBERED_BYTES = 256  # of what was read last: they tell whether the file is still the same


class StartedOver(Exception):  # noqa: N818 - no failure
    """The file is not the one that was read: another, or rows were taken back. Read it from the start."""


class Tail:
    """A place in a CSV file.  Memory does not grow with the file."""

    def __init__(self, path: Path, kinds: Sequence[type]) -> None:
        """`kinds`: what the rows may be; the file's header decides."""
        self.path = path
        self.is_torn = False  # the last line was cut off, or is being written
        self._kinds = kinds
        self._begin()

    def _begin(self) -> None:
        self._offset, self._line = 0, 0
        self._remembered = b""
        self._parser: RowParser[Any] | None = None

    def rows(self) -> Iterator[Any]:
        """Whole rows since the last call; none while there is no file.  To be read to the end.

        Raises:
            DataError: naming file, line and column of the first thing that is no row.
            StartedOver: if what was read before is not there any more; the next call reads from the start.
        """
        try:
            with self.path.open("rb") as file:
                self._expect_the_same(file)
                yield from self._rest(file)
        except FileNotFoundError:
            self._start_over_if_begun()
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot read ({error.strerror or error}); expected a CSV file of a training run"
            ) from None

    def _expect_the_same(self, file: BinaryIO) -> None:
        start = self._offset - len(self._remembered)
        if os.fstat(file.fileno()).st_size < self._offset:
            self._start_over_if_begun()
        file.seek(start)
        if file.read(len(self._remembered)) != self._remembered:
            self._start_over_if_begun()

    def _start_over_if_begun(self) -> None:
        if self._offset:
            self._begin()
            raise StartedOver

    def _rest(self, file: BinaryIO) -> Iterator[Any]:
        file.seek(self._offset)
        rest = b""
        while chunk := file.read(CHUNK_BYTES):
            whole, newline, rest = (rest + chunk).rpartition(b"\n")
            whole += newline
            self._offset += len(whole)
            self._remembered = (self._remembered + whole)[-REMEMBERED_BYTES:]
            if len(rest) > MOST_LINE_BYTES:
                raise DataError(
                    f"{self.path} line {self._line + 1}: longer than {MOST_LINE_BYTES} bytes; expected a CSV"
                    " file of a training run"
                )
            yield from self._parse(whole)
        self.is_torn = bool(rest)

    def _parse(self, data: bytes) -> Iterator[Any]:
        try:
            text = data.decode("utf-8-sig" if self._line == 0 else "utf-8")  # some editors put a mark first
            for texts in csv.reader(text.split("\n")[:-1]):
                self._line += 1
                if self._parser is None:
                    self._parser = self._parser_of(texts)
                else:
                    yield self._parser.row(texts, self._line)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{self.path}: not a readable CSV file ({error}); copy it again") from None

    def _parser_of(self, header: list[str]) -> RowParser[Any]:
        kind = next((kind for kind in self._kinds if tuple(header) == columns(kind)), self._kinds[0])
        parser: RowParser[Any] = RowParser(kind, str(self.path))
        parser.check_header(header)
        return parser
