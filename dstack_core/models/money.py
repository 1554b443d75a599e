"""Money, for a person."""

from __future__ import annotations

from decimal import Decimal


def format_usd(amount: float | Decimal) -> str:
    """Return an amount of money such as ``0.50 USD``: two decimals, below 1 USD up to four."""
    amount = float(amount)
    whole, _, decimals = f"{amount:.4f}".partition(".")
    if abs(amount) >= 1:
        return f"{amount:.2f} USD"
    return f"{whole}.{decimals[:2]}{decimals[2:].rstrip('0')} USD"


def format_price(amount: float) -> str:
    """Return a price such as ``1.20 USD per hour``."""
    return f"{format_usd(amount)} per hour"
