"""Carrying the plan out."""
