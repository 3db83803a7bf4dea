"""What a model costs before it is trained: FLOPs, memory, communication, time."""
