"""Command lines as the commands parse them, and runs that say nothing."""

from __future__ import annotations

import argparse

from lora_ext import cli


def parsed(*arguments: str, command: str = "finetune") -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    module = getattr(cli, command)
    module.add_parser(commands)
    return parser.parse_args([command, *cli.config_file.with_config(commands.choices[command], arguments)])


def silent(line: str) -> None:
    pass
