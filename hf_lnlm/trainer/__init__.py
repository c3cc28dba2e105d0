"""A Trainer that survives a kill, scales every loss right and carries recurrent state across batches."""
