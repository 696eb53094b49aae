"""What is minimized: the loss, and the penalties beside it."""
