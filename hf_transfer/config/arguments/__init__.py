"""Every key, declared once, a file per topic."""
