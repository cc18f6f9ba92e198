"""Tests of what a device can do."""
