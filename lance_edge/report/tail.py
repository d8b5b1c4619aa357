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
            text, zero, after = (rest + chunk).partition(b"\0")
            whole, newline, rest = text.rpartition(b"\n")
            yield from self._parse(whole + newline)
            if zero:
                self._expect_no_row_after(after, file)
                self.is_torn = True
                return
            if len(rest) > MOST_LINE_BYTES:
                raise DataError(
                    f"{self.path} line {self._line + 1}: longer than {MOST_LINE_BYTES} bytes; expected a CSV"
                    " file of a training run"
                )
        self.is_torn = bool(rest)

    def _expect_no_row_after(self, data: bytes, file: BinaryIO) -> None:
        """Of a row that zeros tore, as a power cut leaves them: it must be the last one."""
        has_ended = False
        while True:
            if not has_ended:
                _, newline, data = data.partition(b"\n")
                has_ended = bool(newline)
            if data.strip(b"\0\r\n"):
                raise DataError(
                    f"{self.path} line {self._line + 1}: zero bytes instead of a row, and rows after them; the"
                    " file is damaged: copy it again"
                )
            if not (data := file.read(CHUNK_BYTES)):
                return

    def _parse(self, data: bytes) -> Iterator[Any]:
        """Whole lines; where one is no row, the place stays before it, so that it is met again."""
        lines = [line + b"\n" for line in data.split(b"\n")[:-1]]
        reader, done = csv.reader(self._texts(lines)), 0
        try:
            for texts in reader:
                row = self._row(texts)
                self._line, done = self._line + 1, reader.line_num
                if row is not None:
                    yield row
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(
                f"{self.path} line {self._line + 1}: not a readable CSV file ({error}); copy it again"
            ) from None
        finally:
            read = b"".join(lines[:done])
            self._offset += len(read)
            self._remembered = (self._remembered + read)[-REMEMBERED_BYTES:]

    def _texts(self, lines: Sequence[bytes]) -> Iterator[str]:
        for line in lines:
            yield line.decode("utf-8-sig" if self._line == 0 else "utf-8")  # some editors put a mark first

    def _row(self, texts: list[str]) -> Any:
        """`None` of the header."""
        if self._parser is None:
            self._parser = self._parser_of(texts)
            return None
        return self._parser.row(texts, self._line + 1)

    def _parser_of(self, header: list[str]) -> RowParser[Any]:
        kind = min(self._kinds, key=lambda kind: len(set(header) ^ set(columns(kind))))
        parser: RowParser[Any] = RowParser(kind, str(self.path))
        parser.check_header(header)
        return parser
