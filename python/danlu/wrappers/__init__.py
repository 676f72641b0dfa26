"""Optimizers made of another optimizer."""
