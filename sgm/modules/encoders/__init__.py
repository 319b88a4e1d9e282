"""Encoders of conditionings."""
