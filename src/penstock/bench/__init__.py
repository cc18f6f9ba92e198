"""Measuring: the engine alone, a server under load, Penstock beside other engines."""
