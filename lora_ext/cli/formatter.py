"""Formats the help of commands."""

from __future__ import annotations

import argparse


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Prints defaults, except None, True, False and empty ones."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is True or action.default in (None, False, "", [])
        return action.help if says_nothing else super()._get_help_string(action)
