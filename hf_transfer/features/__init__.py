"""What a frozen model computes, stored once and read by everything that needs it."""
