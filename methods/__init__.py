"""What can be chosen by name beside the method itself: support/registry.py imports every file."""
