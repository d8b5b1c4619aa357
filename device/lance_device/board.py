"""Which board this is, and what it advises where the user said nothing."""

from collections.abc import Mapping
from typing import Any

from lance_device.machine import describe_self
from lance_edge.boards import Board, board_called, load_board

AUTO = "auto"
ADVISED = ("threads", "micro_batch")


def choose_board(name: str | None) -> Board:
    """The board called `name`; with `auto` or nothing, what this machine says it is.

    Raises:
        PlatformError: if there is no profile of this name.
    """
    return board_called(describe_self()) if name in (None, AUTO) else load_board(str(name))


def advice_note(board: Board, given: Mapping[str, Any], chosen: Mapping[str, Any]) -> str | None:
    """One line that says what the board decided; `None` where the user decided everything.

    Args:
        given: the options as asked for, `None` where nothing was said.
        chosen: what they came to.
    """
    decided = [f"--{name.replace('_', '-')} {chosen[name]}" for name in ADVISED if given.get(name) is None]
    return f"board: {board.name} ({board.label}): {', '.join(decided)}" if decided else None
