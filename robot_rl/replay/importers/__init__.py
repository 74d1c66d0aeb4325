"""Import other recordings into an episode store."""

from robot_rl.replay.importers.base import (
    CommonOptions,
    FormatError,
    Importer,
    ImportSource,
    detect,
    formats,
    open_dataset,
    parse_option_strings,
    register_format,
)
from robot_rl.replay.importers.transfer import ImportReport, import_into

__all__ = [
    "CommonOptions",
    "FormatError",
    "ImportReport",
    "ImportSource",
    "Importer",
    "detect",
    "formats",
    "import_into",
    "open_dataset",
    "parse_option_strings",
    "register_format",
]
