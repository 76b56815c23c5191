"""LoRA layers, the targets they may have, and an adapter's directory, ours or PEFT's."""
