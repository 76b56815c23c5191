"""What `compare` can be told. Imports no MLX, so that the command line can show it at once."""

from __future__ import annotations

from dataclasses import dataclass

from ..option import option, settle


@dataclass(frozen=True)
class CompareOptions:
    """What `compare` can be told. Raises OptionError for a value of the wrong type."""

    window: int = option(512, "Tokens read together; each window starts with an empty context.")
    force: bool = option(False, "Go on where there is too little memory.")

    def __post_init__(self) -> None:
        settle(self)
