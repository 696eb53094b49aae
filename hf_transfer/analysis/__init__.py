"""What frozen features say about the data before anything is trained."""
