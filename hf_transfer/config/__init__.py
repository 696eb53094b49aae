"""Single keys: default, help, unit, bounds, and what resuming makes of them."""
