"""Runs PEFT's LoRA layers on lora_ext's ops; models, files and API stay PEFT's.

from lora_ext.integrations.peft import accelerate, report

model = accelerate(get_peft_model(base, config))
print(report(model))
"""

try:
    import peft  # noqa: F401
except ModuleNotFoundError as error:
    from lora_ext._common.messages import install_hint

    raise ImportError(f"lora_ext.integrations.peft needs peft ({error}): {install_hint('peft')}") from error

from lora_ext.integrations.peft.reporting import LayerReport, Report, report
from lora_ext.integrations.peft.swap import accelerate, restore

__all__ = ["LayerReport", "Report", "accelerate", "report", "restore"]
