"""What a corpus holds, told before anything is trained on it."""
