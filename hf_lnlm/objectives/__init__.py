"""What is learnt: collators, metrics and fit checks of the pre-training objectives."""
