"""Encoders of conditionings: text, class labels."""
