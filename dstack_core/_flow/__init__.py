"""What to do, written once as generators; who waits, and how, is the drivers' affair."""
