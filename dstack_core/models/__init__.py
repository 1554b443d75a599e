"""The plain data that callers pass in and get back."""
