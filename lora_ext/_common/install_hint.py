"""How to install an extra of this package."""


def install_hint(extra: str) -> str:
    """Returns the command that installs ``extra``."""
    return f"pip install '.[{extra}]' in a checkout of lora_ext"
