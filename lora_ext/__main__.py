import sys

from lora_ext.cli import command

sys.exit(command())
