"""Several runs that answer one question: comparisons over keys and seeds, and whether pretraining helped."""
