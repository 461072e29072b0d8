"""What a run leaves for others. `python -m jaxtune.export` writes whole models; here are the adapters."""

from jaxtune.export.adapter import load_peft_adapter, save_peft_adapter

__all__ = ["load_peft_adapter", "save_peft_adapter"]
