import sys

from lora_ext.commands import command

sys.exit(command())
