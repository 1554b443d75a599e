"""Plain data that callers give and get."""
