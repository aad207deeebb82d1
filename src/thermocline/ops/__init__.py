"""The arithmetic: one contract, several implementations."""
