"""Flax modules only: arrays in, arrays out. No schedule, no loss, no batch, no config."""
