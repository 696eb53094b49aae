"""What the benchmarks against other ways to train share: the race, and text and image data, models and trainers."""
