"""LoRA: what low-rank adapters reach in every family, and the families' rows in peft's own table."""
