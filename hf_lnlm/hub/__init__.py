"""What a checkpoint folder holds beside its weights: its code, its card, and the check of both."""
