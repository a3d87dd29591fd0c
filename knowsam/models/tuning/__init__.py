"""Tunings: functions that attach small trainable parts to a finished encoder and mask decoder."""

from knowsam.models.tuning.adapter import Adapter, add_adapters

__all__ = ["Adapter", "add_adapters"]
