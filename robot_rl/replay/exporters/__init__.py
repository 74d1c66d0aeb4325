"""Export a selection of an episode store to other formats."""

from robot_rl.replay.exporters.base import ExportReport, export, export_from, formats

__all__ = ["ExportReport", "export", "export_from", "formats"]
