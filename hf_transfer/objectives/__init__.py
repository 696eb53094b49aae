"""What is minimized: losses, their weight under accumulation, and penalties."""
