"""What things cost: FLOPs counted, memory compiled, time in interleaved rounds, and how each grows with length."""
